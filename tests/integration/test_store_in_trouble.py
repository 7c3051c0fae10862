"""Rough treatment: processes killed, bits flipped, too little room for many, full disks and folders that vanish.

The same at full size: ``python bench/store_stress.py``.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cpucache.pml import parse_schema
from cpucache.reuse import Level
from cpucache.store import Store
from tests.support import stress
from tests.support.command import cpucache

Tiny = Callable[..., Path]
QUESTION = stress.prompt("s", 1, 4, 7)
ALL = stress.prompt("s", *range(30))
PLENTY = stress.PLENTY


@pytest.fixture(scope="module")
def expected(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``expected(prompt)`` is what an engine with nothing in its way, and nothing in its store, says."""

    def said(question: str, fidelity: Level | None = None) -> str:
        with stress.engine(tiny("llama"), tmp_path_factory.mktemp("undisturbed")) as engine:
            engine.add_schema(parse_schema(stress.schema("s", 30)))
            return stress.answer(engine, question, fidelity)

    return said


# ---- the short versions of what the script does ----------------------------------------------------------------------


def test_a_killed_process_leaves_whole_slices_or_none(tiny: Tiny, tmp_path: Path) -> None:
    seen = stress.crash(tiny("llama"), tmp_path, 15, saved=101)
    assert (seen.lost, seen.bad) == ([], [])
    assert seen.kills >= 15
    assert seen.saved > 100


def test_a_process_killed_while_it_evicts_leaves_the_account_right(tiny: Tiny, tmp_path: Path) -> None:
    seen = stress.crash(tiny("llama"), tmp_path, 10, budget=600_000)
    assert (seen.kills, seen.bad) == (10, [])


def test_no_flipped_bit_reaches_an_answer(tiny: Tiny, tmp_path: Path) -> None:
    seen = stress.flip(tiny("llama"), tmp_path, 60)
    assert seen.wrong == []
    assert (seen.tried, seen.caught + seen.harmless) == (60, 60)
    assert seen.caught >= seen.parts["payload"] > 0
    assert len(seen.parts) == 3


def test_many_processes_share_a_store_that_is_too_small(tiny: Tiny, tmp_path: Path) -> None:
    seen = stress.hammer(tiny("llama"), tmp_path, 4, rounds=40)
    assert (seen.failed, seen.warnings, seen.wrong, seen.twice) == ([], [], [], [])
    assert seen.answers == 4 * 40
    assert seen.evicted > 0, "the budget was large enough"
    assert seen.encoded < seen.answers * 5, "they did not share"
    assert seen.samples > 20
    assert seen.peak <= seen.budget + seen.largest


# ---- trouble with the disk -------------------------------------------------------------------------------------------


def mount(*arguments: str | Path) -> bool:
    return not subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or not mount("-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", folder):
        pytest.skip("file systems can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_on_a_full_disk_inference_goes_on(small_disk: Path, tiny: Tiny, expected: Callable[..., str]) -> None:
    with stress.warnings() as heard, stress.engine(tiny("llama"), small_disk, disk_budget=PLENTY) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        engine.encode("s")
        engine.store.flush()
        assert not engine.store.writable, "everything found room"
        assert stress.answer(engine, ALL) == expected(ALL)
    assert len(heard) == 1
    assert "No space left" in heard[0] or "full" in heard[0]
    # What had been written by then is whole, and nothing is left half-written.
    store = Store(small_disk, ram_budget=0, disk_budget=PLENTY)
    assert store.files is not None
    there = list(store.files)
    assert there
    assert all(store.files.check(key) for key in there)
    assert list(store.files.leftovers()) == []
    store.close()
    # And once more, from what is there and with still no room.
    with stress.engine(tiny("llama"), small_disk, disk_budget=PLENTY) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        assert stress.answer(engine, QUESTION, "high") == expected(QUESTION, "high")
        # Of what there is besides, some slices are missing.
        assert stress.answer(engine, QUESTION)


def run(tiny: Tiny, tmp_path: Path, folder: Path) -> tuple[int, str, list[str]]:
    """Ask on the command line: exit status, answer, and lines of warning."""
    schema = tmp_path / "s.xml"
    schema.write_text(stress.schema("s", 30))
    question = tmp_path / "question.xml"
    question.write_text(QUESTION)
    done = cpucache(
        *("run", question, "--schema", schema, "--model", tiny("llama"), "--ctx", "2048", "--threads", "1"),
        *("--max-tokens", "6"),
        CPUCACHE_HOME=str(folder),
    )
    return done.status, done.out, [line for line in done.err.splitlines() if "warning" in line]


def test_the_command_line_warns_once_of_a_full_disk(small_disk: Path, tiny: Tiny, tmp_path: Path) -> None:
    status, answer, warnings = run(tiny, tmp_path, tmp_path / "plenty")
    assert (status, warnings) == (0, [])
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(4096)):
                pass
        except OSError:
            pass
    status, said, warnings = run(tiny, tmp_path, small_disk)
    assert (status, said, len(warnings)) == (0, answer, 1)


def test_a_read_only_store_is_read_and_not_complained_about_twice(
    small_disk: Path, tiny: Tiny, tmp_path: Path, expected: Callable[..., str]
) -> None:
    with stress.engine(tiny("llama"), small_disk, disk_budget=PLENTY) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        stress.answer(engine, stress.prompt("s", 1, 4))
    assert mount("-o", "remount,ro", small_disk)
    with stress.warnings() as heard, stress.engine(tiny("llama"), small_disk) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        known = engine.encode_for(stress.prompt("s", 1, 4))
        assert known.slices == 0, "what is there was not used"
        assert stress.answer(engine, QUESTION) == expected(QUESTION)
        engine.store.flush()
        assert engine.encode_for(QUESTION).slices == 0, "not kept in memory"
    assert len(heard) == 1
    status, _, warnings = run(tiny, tmp_path, small_disk)
    assert (status, len(warnings)) == (0, 1)


def test_a_damaged_slice_on_a_read_only_disk_is_encoded_again_in_memory(
    small_disk: Path, tiny: Tiny, expected: Callable[..., str]
) -> None:
    with stress.engine(tiny("llama"), small_disk, disk_budget=PLENTY) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        stress.answer(engine, QUESTION)
        engine.store.flush()
        assert engine.store.files is not None
        for key in engine.store.files:
            path = engine.store.files.path(key)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    assert mount("-o", "remount,ro", small_disk)
    with stress.engine(tiny("llama"), small_disk, ram_budget=1) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        with stress.warnings() as heard:
            assert stress.answer(engine, QUESTION) == expected(QUESTION)
            assert stress.answer(engine, QUESTION) == expected(QUESTION)
    assert len(heard) == len(set(heard)), "said twice"


def test_a_slice_that_may_not_be_read_is_encoded_again(
    tiny: Tiny, tmp_path: Path, expected: Callable[..., str]
) -> None:
    with stress.engine(tiny("llama"), tmp_path) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        stress.answer(engine, QUESTION)
        engine.store.flush()
        assert engine.store.files is not None
        for key in engine.store.files:
            engine.store.files.path(key).chmod(0)
    if os.access(next((tmp_path / "slices").glob("??/*.safetensors")), os.R_OK):
        pytest.skip("permissions do not hold for this user")
    with stress.engine(tiny("llama"), tmp_path) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        assert stress.answer(engine, QUESTION) == expected(QUESTION)


def test_a_store_deleted_under_a_running_process(
    tiny: Tiny, tmp_path: Path, expected: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    caplog.set_level(logging.WARNING)
    # Without RAM to fall back on: what was on disk has to be encoded again.
    with stress.engine(tiny("llama"), folder, ram_budget=1) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        for question in (stress.prompt("s", 1, 4), QUESTION, ALL):
            assert stress.answer(engine, question) == expected(question)
            engine.store.flush()
            shutil.rmtree(folder)
        assert stress.answer(engine, QUESTION) == expected(QUESTION)
    assert len(caplog.records) <= 1


# ---- readers ---------------------------------------------------------------------------------------------------------

EVICT = """
import sys
from pathlib import Path
from cpucache.reuse import Level
from cpucache.store import Store
store = Store(Path(sys.argv[1]), ram_budget=0, disk_budget=0)
print(store.index.shrink(0, store.files.drop))
store.close()
"""


def test_a_state_stays_valid_when_another_process_evicts_its_file(tiny: Tiny, tmp_path: Path) -> None:
    with stress.engine(tiny("llama"), tmp_path, disk_budget=PLENTY) as engine:
        engine.add_schema(parse_schema(stress.schema("s", 30)))
        stress.answer(engine, QUESTION)
    reader = Store(tmp_path, ram_budget=0, disk_budget=PLENTY)
    assert reader.files is not None
    keys = list(reader.files)
    mapped = {key: reader.get(key) for key in keys}
    copies = {key: reader.files.path(key).read_bytes() for key in keys}
    freed = subprocess.run([sys.executable, "-c", EVICT, tmp_path], capture_output=True, check=True, text=True)
    assert int(freed.stdout) > 0
    assert list(reader.files) == []
    for key, state in mapped.items():
        assert state is not None
        assert np.array_equal(state, np.frombuffer(copies[key], np.uint8)[-len(state) :])
        assert reader.get(key) is None
        assert key not in reader
    reader.close()

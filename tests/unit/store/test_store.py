"""The store: states by key in RAM and on disk, whatever happens to the disk; and what slices are named by."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.store import Fingerprints, Kept, SliceInfo, Store, content_key, default_home, slice_key
from cpucache.store.ram import RAM, Bytes
from cpucache.store.slicefile import Damaged, SliceFiles, file_size
from cpucache.store.upkeep import collect, verify
from tests.support.changes import changes
from tests.support.held import no_collector, open_files
from tests.support.tries import tries

KEY, OTHER = "ab" * 16, "cd" * 16
TOKENS = np.array([5, 6, 7], np.int32)
INFO = SliceInfo("fp", "m", "s", "a.b", tokens=3, start=7, state_format="f/\u00e9", context="c", seconds=0.5)


def state(size: int = 1000, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def read(files: SliceFiles, key: str = KEY) -> Bytes:
    found = files.get(key)
    assert found is not None
    return found[0]


def same(one: Bytes | None, other: Bytes) -> bool:
    return one is not None and np.array_equal(one, other)


# ---- RAM -------------------------------------------------------------------------------------------------------------


def test_ram_drops_what_was_used_longest_ago() -> None:
    ram = RAM(30)
    for name in "abc":
        ram.put(name, state(10))
    assert ram.get("a") is not None
    ram.put("d", state(10))
    assert [name in ram for name in "abcd"] == [True, False, True, True]
    ram.put("e", state(20))
    assert [name in ram for name in "acde"] == [False, False, True, True]


def test_ram_keeps_nothing_larger_than_itself() -> None:
    ram = RAM(10)
    ram.put("a", state(10))
    ram.put("b", state(11))
    assert ("a" in ram, "b" in ram, ram.used) == (True, False, 10)
    ram.put("a", state(11))
    assert (len(ram), ram.used) == (0, 0)


@tries(200)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.sampled_from("abcde"), st.integers(1, 60))))
def test_ram_counts_what_it_holds(steps: list[tuple[str, str, int]]) -> None:
    ram = RAM(100)
    model: dict[str, int] = {}  # the least recently used first
    for action, key, size in steps:
        if action == "put":
            ram.put(key, state(size))
            model.pop(key, None)
            model[key] = size
            while sum(model.values()) > ram.budget:
                model.pop(next(iter(model)))
        elif action == "get":
            found = ram.get(key)
            assert (None if found is None else len(found)) == model.get(key)
            if found is not None:
                model[key] = model.pop(key)
        else:
            ram.drop(key)
            model.pop(key, None)
        assert (len(ram), ram.used) == (len(model), sum(model.values()))
        assert all(name in ram for name in model)
    ram.clear()
    assert (len(ram), ram.used) == (0, 0)


# ---- disk ------------------------------------------------------------------------------------------------------------


def test_a_slice_comes_back_from_disk(tmp_path: Path) -> None:
    files = SliceFiles(tmp_path)
    files.put(KEY, state(), TOKENS, INFO)
    assert KEY in files
    assert OTHER not in files
    assert same(read(files), state())
    assert files.get(OTHER) is None
    assert list(files) == [KEY]
    # Nothing else is left lying around.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [files.path(KEY)]
    files.put(KEY, state(seed=1), TOKENS, INFO)
    assert same(read(files), state(seed=1))


def test_a_mapped_state_outlives_its_file(tmp_path: Path) -> None:
    files = SliceFiles(tmp_path)
    files.put(KEY, state(100_000), TOKENS, INFO)
    mapped = read(files)
    files.drop(KEY)
    files.drop(KEY)
    assert KEY not in files
    assert same(mapped, state(100_000))
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_damaged(tmp_path: Path, left: int) -> None:
    files = SliceFiles(tmp_path)
    files.put(KEY, state(), TOKENS, INFO)
    path = files.path(KEY)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(Damaged, match=KEY):
        files.get(KEY)


def test_a_file_under_another_key_is_damaged(tmp_path: Path) -> None:
    files = SliceFiles(tmp_path)
    files.put(KEY, state(), TOKENS, INFO)
    files.path(OTHER).parent.mkdir()
    files.path(KEY).rename(files.path(OTHER))
    with pytest.raises(Damaged, match="do not agree"):
        files.get(OTHER)


def test_no_changed_byte_gives_a_changed_state(tmp_path: Path) -> None:
    files = SliceFiles(tmp_path)
    files.put(KEY, state(64), TOKENS, INFO)
    path, good = files.path(KEY), files.path(KEY).read_bytes()
    head = len(good) - 64
    for at in range(len(good)):
        for value in {good[at] ^ 1, ord("e"), 0} - {good[at]}:
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                found = read(files)
            except Damaged:
                continue
            assert same(found, state(64))
            assert at < head - len(TOKENS.tobytes()), "changed ids or a changed state were accepted"
            assert files.info(KEY) == (INFO, len(good)), "another description was accepted"  # all else is spelling


@tries(400)
@given(st.lists(changes(), min_size=1, max_size=4))
def test_a_file_gives_what_was_written_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Callable[[bytes], bytes]]
) -> None:
    files = SliceFiles(tmp_path_factory.getbasetemp() / "fuzz")
    files.put(KEY, state(), TOKENS, INFO)
    path = files.path(KEY)
    content = path.read_bytes()
    for step in steps:
        content = step(content)
    path.write_bytes(content)
    with contextlib.suppress(Damaged):
        assert same(read(files), state())
        assert files.info(KEY) == (INFO, len(content))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    files = SliceFiles(tmp_path)
    with small_files(), pytest.raises(OSError, match="File too large"):
        files.put(KEY, state(100_000), TOKENS, INFO)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 16 KiB: writing fails as on a full disk.

    Not a fixture: what the test runner prints may go to a longer file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- both tiers ------------------------------------------------------------------------------------------------------


def test_a_slice_is_in_both_tiers(tmp_path: Path) -> None:
    store = Store(tmp_path, ram_budget=1 << 20)
    assert KEY not in store
    assert store.get(KEY) is None
    store.put(KEY, state(), TOKENS, INFO)
    assert KEY in store.ram
    store.close()
    assert same(read(SliceFiles(tmp_path / "slices")), state())
    again = Store(tmp_path, ram_budget=1 << 20)
    assert KEY in again
    assert KEY not in again.ram
    assert same(again.get(KEY), state())
    assert KEY in again.ram


def test_a_store_without_a_folder_is_in_memory(tmp_path: Path) -> None:
    store = Store(None, ram_budget=2000)
    store.put(KEY, state(), TOKENS, INFO)
    assert same(store.get(KEY), state())
    store.discard(KEY)
    assert KEY not in store


def test_a_store_in_memory_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store(None, ram_budget=2000) as store:
        store.put(KEY, state(), TOKENS, INFO)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_in_memory_is_read_from_disk(tmp_path: Path) -> None:
    store = Store(tmp_path, ram_budget=0)
    store.put(KEY, state(), TOKENS, INFO)
    store.flush()
    assert KEY not in store.ram
    assert same(store.get(KEY), state())


def test_a_damaged_slice_is_set_aside_and_counts_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path, ram_budget=0)
    store.put(KEY, state(), TOKENS, INFO)
    store.close()
    path = SliceFiles(tmp_path / "slices").path(KEY)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    store = Store(tmp_path, ram_budget=1 << 20)
    assert store.get(KEY) is None
    assert KEY not in store
    assert path.with_suffix(".damaged").is_file()
    assert [record.name for record in caplog.records] == ["cpucache.store"]
    assert "its content has changed" in caplog.text
    store.put(KEY, state(), TOKENS, INFO)
    store.close()
    assert same(Store(tmp_path, ram_budget=0).get(KEY), state())


def test_a_slice_without_its_file_is_none_of_its_tokens(tmp_path: Path) -> None:
    """A plan takes what the index lists: it must be there."""
    content = "ef" * 16
    with Store(tmp_path, ram_budget=0) as store:
        for key in (KEY, OTHER):
            store.put(key, state(), TOKENS, replace(INFO, content=content))
    with Store(tmp_path, ram_budget=0) as store:
        assert store.files is not None
        assert [key for key, _ in store.variants([content])[content]] == [KEY, OTHER]
        store.files.path(KEY).unlink()
        assert [key for key, _ in store.variants([content])[content]] == [OTHER]


def test_a_slice_of_no_use_stops_neither_the_next_ones_nor_who_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path, ram_budget=0) as store:
        assert store.claim(KEY)
        store.put(KEY, state(), np.array(["no", "tokens"]), INFO)
        store.put(OTHER, state(), TOKENS, INFO)
        store.flush()
        assert (KEY in store, OTHER in store, store.writable) == (False, True, True)
        assert f"{KEY} was not written (ValueError" in caplog.text
        with Store(tmp_path, ram_budget=0) as other:
            assert other.claim(KEY)


def test_discarding_takes_a_slice_out_of_both_tiers(tmp_path: Path) -> None:
    store = Store(tmp_path, ram_budget=1 << 20)
    for aside in (False, True):
        store.put(KEY, state(), TOKENS, INFO)
        store.flush()
        store.discard(KEY, aside=aside)
        assert KEY not in store
        assert SliceFiles(tmp_path / "slices").path(KEY).with_suffix(".damaged").exists() == aside
    store.discard(KEY, aside=True)  # gone already: another process may have been faster


def test_a_folder_that_can_t_be_written_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file", ram_budget=1 << 20)
    assert KEY not in store
    assert store.get(KEY) is None
    for seed, key in enumerate((KEY, OTHER)):
        store.put(key, state(seed=seed), TOKENS, INFO)
        assert same(store.get(key), state(seed=seed))
    assert not store.writable
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(tmp_path / "file") in caplog.text


@pytest.mark.parametrize("packs", [False, True])
def test_a_slice_is_as_large_as_its_file(packs: bool, tmp_path: Path) -> None:
    """For the budget, too: header and tokens are on the disk as well as the state."""

    class Halving:
        def pack(self, state: Bytes) -> Bytes:
            return state[: len(state) // 2]

        def unpack(self, packed: Bytes) -> Bytes:
            return np.tile(packed, 2)

    described = [
        INFO,
        replace(INFO, module="b" * 300, seconds=1 / 3),
        replace(INFO, schema="\u00e9", tokens=900, start=10**6, content="ab" * 16, attends_to="cd" * 800),
        replace(INFO, tokens=0),
    ]
    keys = [f"{number:032x}" for number in range(len(described))]
    with Store(tmp_path, ram_budget=0, packing=Halving() if packs else None) as store:
        for number, (key, info) in enumerate(zip(keys, described, strict=True)):
            store.put(key, state(1000 * number + 1000), np.zeros(info.tokens, np.int32), info)
        store.flush()
        assert store.files is not None and store.index is not None
        sizes = {key: store.files.path(key).stat().st_size for key in keys}
        assert {row.key: row.bytes for row in store.index.rows()} == sizes
        assert store.kept(keys).bytes == store.index.totals()["bytes"] == sum(sizes.values())
        assert [store.size(key) for key in keys] == list(sizes.values())
    (tmp_path / "index.sqlite").unlink()
    with Store(tmp_path, ram_budget=0) as store:
        assert store.kept(keys).bytes == sum(sizes.values())


def test_a_budget_given_to_one_process_evicts_nothing_that_others_keep(tmp_path: Path) -> None:
    keys = [f"{number:032x}" for number in range(8)]
    size = file_size(KEY, INFO, 1000)

    def put(store: Store, number: int) -> None:
        store.put(keys[number], state(1000, number), TOKENS, INFO)

    with Store(tmp_path, ram_budget=0) as store:
        for number in range(5):
            put(store, number)
        assert store.kept(keys) == Kept(5, 5 * size, 3, 5 * size)
    with Store(tmp_path, ram_budget=0, disk_budget=3 * size) as store:
        put(store, 5)
        assert store.kept([keys[5]]) == Kept(0, 0, 1, 6 * size)
        assert store.kept(keys[:5]).missing == 0
        assert store.writable
    with Store(tmp_path, ram_budget=0, disk_budget=6 * size) as store:
        put(store, 5)
        put(store, 6)
        assert store.kept(keys) == Kept(6, 6 * size, 2, 7 * size)
    with Store(None, ram_budget=1 << 20) as store:
        put(store, 0)
        assert store.kept(keys[:2]) == Kept(0, 0, 2, 0)


def test_a_large_budget_that_was_given_is_the_default_from_then_on(tmp_path: Path) -> None:
    quarter = Store(tmp_path, ram_budget=0).disk_budget
    with Store(tmp_path, ram_budget=0, disk_budget=2 * quarter) as store:
        store.put(KEY, state(), TOKENS, INFO)
    with Store(tmp_path, ram_budget=0) as store:
        assert store.disk_budget == 2 * quarter
    # As far as there is room.
    with Store(tmp_path, ram_budget=0, disk_budget=1 << 60) as store:
        store.put(OTHER, state(), TOKENS, INFO)
    with Store(tmp_path, ram_budget=0) as store:
        assert 3 * quarter < store.disk_budget <= shutil.disk_usage(tmp_path).total


def test_a_full_disk_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path, ram_budget=1 << 20)
    with small_files():
        for seed, key in enumerate((KEY, OTHER)):
            store.put(key, state(100_000, seed), TOKENS, INFO)
            assert same(store.get(key), state(100_000, seed))
            store.flush()
    assert "kept in memory only" in caplog.text
    assert not store.writable
    assert len(caplog.records) == 1


def create_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(b"x" * 100)
    path.symlink_to(target)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link": create_link,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_set_aside_unread(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path, ram_budget=0)
    assert store.files is not None
    NO_FILES[what](store.files.prepared(KEY))
    assert store.get(KEY) is None
    assert KEY not in store
    store.put(KEY, state(), TOKENS, INFO)
    store.close()
    assert same(read(SliceFiles(tmp_path / "slices")), state())
    assert ["not a regular file; it is set aside" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("what", NO_FILES)
def test_looking_after_a_store_does_not_wait_for_what_is_no_file(what: str, tmp_path: Path) -> None:
    with Store(tmp_path, ram_budget=0) as store:
        assert store.files is not None
        key = slice_key(INFO.fingerprint, INFO.state_format, INFO.context, TOKENS, INFO.start)
        store.put(key, state(), TOKENS, INFO)
        store.flush()
        NO_FILES[what](store.files.prepared(KEY))
    (tmp_path / "index.sqlite").unlink()
    with Store(tmp_path, ram_budget=0) as store:  # filled from the files again
        assert store.index is not None
        assert [row.key for row in store.index.rows()] == [key]
        for repair in (False, True):
            assert ("damaged", KEY) in [(each.kind, each.name) for each in verify(store, repair=repair)]
        collect(store)
        assert [each for each in verify(store) if each.kind != "leftover"] == []


def test_an_index_that_is_no_file_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "index.sqlite")
    store = Store(tmp_path, ram_budget=1 << 20)
    store.put(KEY, state(), TOKENS, INFO)
    assert same(store.get(KEY), state())
    store.close()
    assert ["can't save slices" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_slices_are_readable_by_their_owner_only(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with Store(tmp_path / "new" / "store", ram_budget=0) as store:
            assert store.claim(KEY)
            store.put(KEY, state(), TOKENS, INFO)
            assert store.claim(OTHER)
            modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*.lock")}
            assert modes == {0o600}
    finally:
        os.umask(before)
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_closed_store_holds_no_file(tmp_path: Path) -> None:
    """At once: not only when the collector of cycles runs."""
    with no_collector():
        for _ in range(3):
            store = Store(tmp_path, ram_budget=1 << 20)
            for key in (KEY, OTHER):
                if key not in store:
                    store.put(key, state(), TOKENS, INFO)
                assert store.get(key) is not None
            store.prefetch([KEY]).result()
            store.close()
            del store
            assert open_files(tmp_path) == []


def test_the_default_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CPUCACHE_HOME", "~/slices")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_home() == tmp_path / "slices"
    monkeypatch.delenv("CPUCACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_home().is_relative_to(tmp_path)
    assert default_home().name == "cpucache"


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_every_part_of_what_decides_a_state_is_in_its_key() -> None:
    tokens = np.arange(5, dtype=np.int32)
    base = ("model", "format", "context", tokens, 7)
    keys = {
        slice_key(*base),
        slice_key("model2", *base[1:]),
        slice_key(base[0], "format2", *base[2:]),
        slice_key(*base[:2], "another", *base[3:]),
        slice_key(*base[:2], "", *base[3:]),
        slice_key(*base[:3], tokens[:4], 7),
        slice_key(*base[:3], tokens[::-1], 7),
        slice_key(*base[:3], np.append(tokens, 0), 7),
        slice_key(*base[:4], 8),
        slice_key("modelf", "ormat", *base[2:]),
        slice_key("model", "format7", base[2], tokens, 7),
    }
    assert len(keys) == 11
    assert all(len(key) == 32 and set(key) <= set("0123456789abcdef") for key in keys)
    assert slice_key(*base) == slice_key(*base[:3], tokens.copy(), 7)
    # How the array lies in memory is no part of it.
    assert slice_key(*base) == slice_key(*base[:3], np.repeat(tokens, 2)[::2], 7)


def test_slices_of_the_same_tokens_have_their_content_in_common() -> None:
    tokens = np.arange(5, dtype=np.int32)
    keys = {
        content_key("model", "format", tokens),
        content_key("model2", "format", tokens),
        content_key("model", "format2", tokens),
        content_key("modelf", "ormat", tokens),
        content_key("model", "format", tokens[:4]),
    }
    assert len(keys) == 5
    assert content_key("model", "format", np.repeat(tokens, 2)[::2]) in keys


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_read_once_while_the_file_stays_the_same(tmp_path: Path) -> None:
    path, index = tmp_path / "model", tmp_path / "new" / "index.sqlite"
    path.write_bytes(b"x" * 5_000_000)
    read: list[int] = []
    first = Fingerprints(index).of(path, read.append)
    assert read == [4 << 20, 5_000_000]
    assert Fingerprints(index).of(path, read.append) == first
    assert len(read) == 2
    # A link to it is the same file.
    (tmp_path / "link").symlink_to(path)
    assert Fingerprints(index).of(tmp_path / "link", read.append) == first
    assert len(read) == 2


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    path, fingerprints = tmp_path / "model", Fingerprints(tmp_path / "index.sqlite")
    path.write_bytes(b"one")
    first = fingerprints.of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    second = fingerprints.of(path)
    assert first != second
    # Another file of the same size and time replaces it.
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, ns=(1, 1))
    other.replace(path)
    assert fingerprints.of(path) not in (first, second)


def test_equal_files_have_equal_fingerprints(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    fingerprints = Fingerprints(tmp_path / "index.sqlite")
    assert fingerprints.of(tmp_path / "a") == fingerprints.of(tmp_path / "b") == Fingerprints(None).of(tmp_path / "a")


def test_fingerprints_do_without_an_index_that_is_of_no_use(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"one")
    expected = Fingerprints(None).of(path)
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"no database at all, and long enough to be read as one" * 20)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE files (something TEXT)")
    database.close()
    for index in (broken, other, path / "below a file" / "index.sqlite", tmp_path):
        assert Fingerprints(index).of(path) == expected

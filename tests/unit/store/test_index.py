"""The index: who leaves when the budget is reached, what it counts, and how it comes back when it is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from cpucache.store import SliceInfo, Store, slice_key
from cpucache.store.index import Index, Kept
from cpucache.store.slicefile import SliceFiles
from cpucache.store.startup import rebuild
from tests.support.tries import tries


def info(seconds: float = 1.0, module: str = "m") -> SliceInfo:
    return SliceInfo("fp", "model", "schema", module, 3, 0, "format", "context", seconds)


class Shelf:
    """An index whose slices have no files: what is deleted is noted."""

    def __init__(self, path: Path, budget: int) -> None:
        self.index = Index(path)
        self.budget = budget
        self.deleted: list[str] = []

    def add(self, key: str, size: int = 10, seconds: float = 1.0, keep: set[str] | None = None) -> bool:
        if not self.index.reserve(key, info(seconds), size, self.budget, keep or set(), self.deleted.append):
            return False
        self.index.commit(key)
        return True

    @property
    def keys(self) -> set[str]:
        return {row.key for row in self.index.rows()}

    @property
    def bytes(self) -> float:
        return self.index.totals()["bytes"]


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path / "new" / "index.sqlite", 100)
    yield shelf
    shelf.index.close()


# ---- who leaves ------------------------------------------------------------------------------------------------------


def test_what_is_cheapest_to_encode_for_its_bytes_leaves_first(shelf: Shelf) -> None:
    shelf.add("cheap", 20, 1)
    shelf.add("dear", 20, 4)
    shelf.add("large", 60, 6)
    shelf.add("new", 20, 4)
    assert shelf.deleted == ["cheap"]
    shelf.add("other", 30, 9)
    assert shelf.deleted == ["cheap", "large"]
    assert shelf.keys == {"dear", "new", "other"}
    assert shelf.index.totals()["evicted"] == 2


def test_what_is_used_stays_longer(shelf: Shelf) -> None:
    for key in "abcde":
        shelf.add(key, 20)
    shelf.index.touch({"a": 1, "c": 2, "d": 1, "e": 1})
    shelf.add("f", 20)
    assert shelf.deleted == ["b"]


def test_as_many_leave_as_it_takes(shelf: Shelf) -> None:
    for number in range(10):
        shelf.add(str(number), 10, number + 1)
    shelf.add("large", 35, 100)
    assert shelf.deleted == ["0", "1", "2", "3"]
    assert shelf.bytes == 95


def test_pinned_slices_and_those_in_use_stay(shelf: Shelf) -> None:
    for key in "abcde":
        shelf.add(key, 20)
    shelf.index.pin(["a", "b"], pinned=True)
    assert shelf.add("f", 60, keep={"c"}) is False
    assert (shelf.deleted, shelf.keys) == ([], set("abcde"))
    assert shelf.add("f", 40, keep={"c"})
    assert shelf.keys == set("abcf")
    shelf.index.pin(["a", "b"], pinned=False)
    assert shelf.add("g", 60, keep={"f"})
    assert shelf.keys == set("fg")


def test_more_than_the_budget_is_refused_and_drives_nobody_out(shelf: Shelf) -> None:
    shelf.add("a", 50)
    assert shelf.add("b", 101) is False
    assert (shelf.keys, shelf.bytes, shelf.deleted) == ({"a"}, 50, [])


def test_a_smaller_budget_than_others_had_evicts_nothing(shelf: Shelf) -> None:
    for key in "abcde":
        shelf.add(key, 20)
    shelf.budget = 60
    assert shelf.add("f", 20) is False
    assert (shelf.keys, shelf.deleted) == (set("abcde"), [])
    shelf.index.remove(["a", "b", "c"])
    assert shelf.add("g", 20)  # up to its own, it adds
    assert shelf.add("h", 20) is False
    assert (shelf.keys, shelf.deleted) == (set("deg"), [])
    # One with the larger budget goes on as before.
    shelf.budget = 100
    assert shelf.add("i", 60)
    assert shelf.bytes <= 100
    # After shrinking by command, the smaller budget is that of all.
    shelf.index.shrink(60, shelf.deleted.append, given=True)
    shelf.budget = 60
    assert shelf.add("j", 60)
    assert shelf.keys == {"j"}


def test_what_is_not_given_counts_as_it_is_today(shelf: Shelf) -> None:
    """A quarter of what is free is more on one day and less on another."""

    def add(key: str, size: int, budget: int) -> bool:
        done = shelf.index.reserve(key, info(), size, budget, set(), shelf.deleted.append, given=False)
        shelf.index.commit(key)
        return done

    assert add("a", 60, 100)
    assert add("b", 30, 100)
    assert add("c", 30, 50)
    assert shelf.keys == {"c"}
    shelf.budget = 40
    assert shelf.add("d", 30) is False
    shelf.budget = 60
    assert shelf.add("e", 30)
    assert shelf.add("f", 30)
    assert shelf.bytes == 60


def test_it_tells_what_was_kept_and_what_the_rest_would_take(shelf: Shelf) -> None:
    shelf.add("own", 30, 0.1)
    for key in "abcd":
        shelf.add(key, 30)
    assert shelf.add("large", 200) is False
    assert shelf.deleted == ["own", "a"]
    assert shelf.index.kept("abcd") == Kept(3, 90, 1, 120)
    assert shelf.index.kept(["large", "d"]) == Kept(1, 30, 1, 290)
    assert shelf.index.kept(["never saved"]) == Kept(0, 0, 1, 90)
    assert shelf.index.absent("schema") == {"model": ["a", "large", "own"]}
    assert shelf.index.absent("another") == {}
    shelf.budget = 290
    assert shelf.add("large", 200)
    assert shelf.index.kept(["large", *"bcd"]) == Kept(4, 290, 0, 290)
    assert shelf.index.absent("schema") == {"model": ["a", "own"]}


def test_a_failed_delete_changes_nothing(shelf: Shelf) -> None:
    shelf.add("a", 60)

    def refuse(key: str) -> None:
        raise PermissionError(key)

    with pytest.raises(PermissionError):
        shelf.index.reserve("b", info(), 60, 100, set(), refuse)
    assert (shelf.keys, shelf.bytes) == ({"a"}, 60)
    assert shelf.add("b", 40)


@tries(60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "use", "remove", "pin", "off"]), st.sampled_from("abcdefgh"), st.integers(1, 60)
        ),
        max_size=40,
    )
)
def test_the_budget_always_holds_and_the_sum_is_right(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
) -> None:
    shelf = Shelf(tmp_path_factory.mktemp("index") / "index.sqlite", 100)
    pinned: set[str] = set()
    for action, key, size in steps:
        if action == "add":
            shelf.add(key, size, 1 + size % 7)
        elif action == "use":
            known = key in shelf.keys
            assert shelf.index.touch({key: size}) == ([] if known else [key])
        elif action == "remove":
            shelf.index.remove([key])
            pinned.discard(key)
        else:
            shelf.index.pin([key], pinned=action == "pin")
            pinned = pinned | {key} if action == "pin" and key in shelf.keys else pinned - {key}
        assert shelf.bytes == sum(row.bytes for row in shelf.index.rows()) <= 100
        assert pinned <= shelf.keys
        assert pinned == {row.key for row in shelf.index.rows() if row.pinned}
    shelf.index.close()


# ---- the decay of LMCache issue 4663 ---------------------------------------------------------------------------------


def test_always_new_documents_do_not_push_out_what_is_used_daily(tmp_path: Path) -> None:
    """Thousands of documents come by once, each day twice what the store holds; the daily set stays, and whole."""
    shelf = Shelf(tmp_path / "index.sqlite", 1000)
    chance = random.Random(0)
    daily = [f"daily {number}" for number in range(40)]
    for key in daily:
        shelf.add(key)
    hits = asked = 0
    for day in range(30):
        for hour in range(5):
            there = shelf.keys
            asked += len(daily)
            hits += len(there.intersection(daily))
            shelf.index.touch(dict.fromkeys(daily, 1))
            for number in range(24):
                # As expensive to encode, for their bytes, as the daily ones, and of all sizes.
                size = chance.randint(5, 30)
                assert shelf.add(f"document {day} {hour} {number}", size, size / 10)
            assert shelf.bytes <= 1000
    assert (hits, asked) == (6000, 6000)
    assert shelf.index.totals()["evicted"] > 3000
    shelf.index.close()


def test_what_is_used_once_a_day_comes_to_stay(tmp_path: Path) -> None:
    """A day brings twice what the store holds: at first the daily set is pushed out, but it is remembered."""
    shelf = Shelf(tmp_path / "index.sqlite", 1000)
    daily = [f"daily {number}" for number in range(40)]
    found = []
    for day in range(20):
        there = shelf.keys
        found.append(len(there.intersection(daily)))
        shelf.index.touch({key: 1 for key in daily if key in there})
        for key in daily:
            if key not in there:
                assert shelf.add(key)
        for number in range(200):
            assert shelf.add(f"document {day} {number}", 10, 1.0)
    assert found[1] == 0
    assert found[5:] == [40] * 15
    shelf.index.close()


def test_what_was_used_daily_once_leaves_in_the_end(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "index.sqlite", 100)
    shelf.add("old")
    shelf.index.touch({"old": 20})
    for number in range(400):
        shelf.add(str(number))
    assert "old" not in shelf.keys
    shelf.index.close()


# ---- what it counts --------------------------------------------------------------------------------------------------


def test_uses_are_counted(shelf: Shelf) -> None:
    shelf.add("a", 10, 0.5)
    shelf.add("b", 10, 2.0)
    before = time.time()
    assert shelf.index.touch({"a": 3, "b": 1, "gone": 2}, misses=4) == ["gone"]
    totals = shelf.index.totals()
    assert (totals["misses"], totals["seconds_saved"], totals["bytes"]) == (4, 3.5, 20)
    assert totals["hits"] == 6
    rows = {row.key: row for row in shelf.index.rows()}
    assert (rows["a"].hits, rows["b"].hits) == (3, 1)
    assert rows["a"].used >= before
    assert (rows["a"].info, rows["a"].bytes, rows["a"].pinned) == (info(0.5), 10, False)


def test_a_slice_is_listed_when_it_is_whole(shelf: Shelf) -> None:
    for _ in range(2):  # also when two write the same
        assert shelf.index.reserve("a", info(), 60, 100, set(), shelf.deleted.append)
        assert (shelf.keys, shelf.bytes) == (set(), 60)
    # Its bytes are spoken for, and it can't be evicted while it is written.
    assert shelf.add("b", 60) is False
    assert shelf.index.unfinished(60) == []
    assert shelf.index.unfinished(-1) == ["a"]
    shelf.index.commit("a")
    assert (shelf.keys, shelf.index.unfinished(-1)) == ({"a"}, [])


def test_shrinking_evicts_what_is_worth_least(shelf: Shelf) -> None:
    for number in range(10):
        shelf.add(str(number), 10, number + 1)
    shelf.index.pin(["0"], pinned=True)
    assert shelf.index.shrink(100, shelf.deleted.append) == 0
    assert shelf.index.shrink(75, shelf.deleted.append) == 30
    assert shelf.deleted == ["1", "2", "3"]
    assert shelf.index.shrink(0, shelf.deleted.append) == 60
    assert (shelf.keys, shelf.bytes) == ({"0"}, 10)


def test_several_indexes_of_one_file_never_exceed_the_budget_together(tmp_path: Path) -> None:
    indexes = [Index(tmp_path / "index.sqlite") for _ in range(4)]
    there: set[str] = set()
    lock = threading.Lock()
    most = 0

    def work(number: int) -> None:
        nonlocal most
        for step in range(40):
            key = f"{number} {step}"
            if indexes[number].reserve(key, info(1 + step % 5), 10, 100, set(), there.discard):
                with lock:
                    there.add(key)
                    most = max(most, len(there))
                indexes[number].commit(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert 5 <= most <= 10
    assert {row.key for row in indexes[0].rows()} == there
    assert indexes[0].totals()["bytes"] == 10 * len(there) <= 100
    for index in indexes:
        index.close()


# ---- lost and found --------------------------------------------------------------------------------------------------
TOKENS = np.array([5, 6, 7], np.int32)


def key_of(number: int) -> str:
    return slice_key("fp", "format", "context", TOKENS, number)


def slice_info(number: int) -> SliceInfo:
    return SliceInfo("fp", "model \u00e9", "schema", f"m{number}", 3, number, "format", "context", 0.1 + number)


def state(number: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, 1000 + number, np.uint8)


def filled(folder: Path, count: int = 3) -> list[str]:
    """A store with so many slices, closed again."""
    store = Store(folder, ram_budget=0)
    keys = [key_of(number) for number in range(count)]
    for number, key in enumerate(keys):
        store.put(key, state(number), TOKENS, slice_info(number))
    store.close()
    return keys


@pytest.mark.parametrize("loss", ["deleted", "no database", "empty"])
def test_a_lost_index_is_rebuilt_from_the_files(loss: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = filled(tmp_path)
    path = tmp_path / "index.sqlite"
    for file in tmp_path.glob("index.sqlite*"):
        file.unlink()
    if loss != "deleted":
        path.write_bytes(b"" if loss == "empty" else os.urandom(5000))
    store = Store(tmp_path, ram_budget=0)
    assert store.index is not None and store.writable
    rows = {row.key: row for row in store.index.rows()}
    assert rows.keys() == set(keys)
    assert [rows[key].info for key in keys] == [slice_info(number) for number in range(3)]
    assert store.index.totals()["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [len(warned), "is damaged" in "".join(warned)] == [loss == "no database", loss == "no database"]
    store.close()
    caplog.clear()
    Store(tmp_path, ram_budget=0).close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_index_of_an_earlier_version_is_brought_up_to_this_one(tmp_path: Path) -> None:
    filled(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as database:
        database.executescript(
            "DROP TABLE absent; CREATE TABLE past (key TEXT PRIMARY KEY, uses INTEGER, gone REAL) WITHOUT ROWID;"
            "CREATE INDEX by_gone ON past (gone); DELETE FROM totals WHERE name IN ('budget', 'default');"
        )
    index = Index(tmp_path / "index.sqlite")
    assert {"absent", "by_gone"} <= {name for (name,) in index._database.execute("SELECT name FROM sqlite_master")}
    assert {"budget", "default"} <= index.totals().keys()
    index.close()


def test_rebuilding_takes_in_what_is_sound_and_not_known(tmp_path: Path) -> None:
    keys = filled(tmp_path)
    index, files = Index(tmp_path / "index.sqlite"), SliceFiles(tmp_path / "slices")
    assert rebuild(index, files) == 0
    index.remove(keys)
    files.path(keys[0]).write_bytes(b"no slice")
    assert rebuild(index, files) == 2
    assert {row.key for row in index.rows()} == set(keys[1:])
    index.close()


def test_a_file_that_was_never_listed_is_when_it_is_used(tmp_path: Path) -> None:
    keys = filled(tmp_path)
    store = Store(tmp_path, ram_budget=0)
    assert store.index is not None
    store.index.remove(keys[:2])
    assert store.get(keys[0]) is not None
    store.flush()
    assert {row.key for row in store.index.rows()} == {keys[0], keys[2]}
    store.close()


def test_a_slice_whose_file_was_deleted_is_saved_again(tmp_path: Path) -> None:
    keys = filled(tmp_path)
    store = Store(tmp_path, ram_budget=0)
    assert store.files is not None and store.index is not None
    store.files.drop(keys[1])
    assert keys[1] not in store
    assert store.get(keys[1]) is None
    store.put(keys[1], state(1), TOKENS, slice_info(1))
    store.flush()
    assert store.files.check(keys[1])
    assert store.index.totals()["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    store.close()


def test_slice_files_are_safetensors(tmp_path: Path) -> None:
    files = SliceFiles(tmp_path)
    files.put(key_of(0), state(0), TOKENS, slice_info(0))
    tensors = load_file(files.path(key_of(0)))
    assert tensors.keys() == {"state", "tokens"}
    assert np.array_equal(tensors["state"], state(0))
    assert np.array_equal(tensors["tokens"], TOKENS)
    assert tensors["tokens"].dtype == np.int32
    with safe_open(files.path(key_of(0)), "np") as opened:
        metadata = opened.metadata()
    assert (metadata["key"], metadata["model"], metadata["seconds"]) == (key_of(0), "model \u00e9", "0.1")

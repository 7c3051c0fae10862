"""Which slices there are of some tokens: the store answers from its index, whatever it holds, and across processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np

from cpucache.store import SliceInfo, Store, content_key

_processes = multiprocessing.get_context("forkserver")
MANY = 20_000


def info(content: str) -> SliceInfo:
    return SliceInfo(
        "fp", "m", "s", "a", tokens=1, start=0, state_format="f", context="c", seconds=0.1, content=content
    )


def content(number: int) -> str:
    return content_key("fp", "f", np.array([number], np.int32))


def _look(folder: Path, answer: multiprocessing.Queue[list[int]]) -> None:
    with Store(folder, ram_budget=0) as store:
        assert store.index is not None
        found = [info.content for _, info in store.index.variants([content(7), content(8), content(MANY)])]
        answer.put([found.count(content(each)) for each in (7, 8, MANY)])


def test_variants_among_many_slices(tmp_path: Path) -> None:
    with Store(tmp_path, ram_budget=0) as store:
        assert store.index is not None
        # Two of each text, among many others.
        store.index.add_all((f"{number:032x}", info(content(number // 2)), 1) for number in range(20))
        with store.index._change() as database:
            columns = [row[1] for row in database.execute("PRAGMA table_info(slices)")]
            drawn = ["lower(hex(randomblob(16)))" if name in ("key", "content") else name for name in columns]
            database.execute(
                "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?) INSERT INTO "
                f"slices SELECT {', '.join(drawn)} FROM numbers, (SELECT * FROM slices ORDER BY key LIMIT 1)",
                (MANY,),
            )
        # The rows have no files: the store, which looks for them, would not give these.
        found = store.index.variants([content(7)])
        assert sorted(key for key, _ in found) == [f"{number:032x}" for number in (14, 15)]
        (plan,) = store.index._database.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM slices WHERE content IN (?, ?) AND whole = 1", ("", "")
        ).fetchall()
        assert "INDEX" in plan[-1] and "SCAN" not in plan[-1]
        answer = _processes.Queue()
        other = _processes.Process(target=_look, args=(tmp_path, answer))
        other.start()
        assert answer.get(timeout=60) == [2, 2, 0]
        other.join(60)
        assert other.exitcode == 0

"""Two KV caches over one folder: what both need is made once, and each of them answers right."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpucache.store import Store
from cpucache.store.claims import Claims
from tests.support.workbench import (
    PLENTY,
    SLICES,
    TOLERANCE,
    Desk,
    bench,
    chain,
    cut,
    distance,
    opened,
    plan_of,
    some_tokens,
)

TinyModel = Callable[..., Path]

ENCODE = """
import json, sys
from pathlib import Path
from cpucache.store import Store
from tests.support.workbench import SLICES, Desk, chain, cut, opened, some_tokens

slices = chain(cut(some_tokens(700), 100, 200, 300, 400, 500, 600))
with opened(Path(sys.argv[1])) as context, Store(Path(sys.argv[2]), ram_budget=1 << 30) as store:
    kv_cache = Desk(context, store, SLICES)
    print("ready", flush=True)
    sys.stdin.readline()
    report = kv_cache.encode(slices)
    print(json.dumps({"slices": report.slices, "all": all(each.key in store for each in slices)}))
"""


def test_two_processes_make_each_slice_once(tiny: TinyModel, tmp_path: Path) -> None:
    path = tiny("llama")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENCODE, str(path), str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        reports = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sum(report["slices"] for report in reports) == 7
    assert all(report["all"] for report in reports)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 7


def test_two_stores_make_each_slice_once_and_answer_right(tiny: TinyModel, tmp_path: Path) -> None:
    path, tokens = tiny("llama"), some_tokens(400)
    start = threading.Barrier(2)

    def work(number: int) -> tuple[int, float]:
        with bench(path, home=tmp_path) as b:
            slices = chain(cut(tokens[:360], 60, 120, 180, 240, 300))
            plan = plan_of(*slices, tokens[360:])
            expected = b.expected(plan)
            start.wait(60)
            spent = b.prefill(plan)
            return spent.encoded_tokens, distance(b.kv_cache.context.logits(), expected)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    assert sum(encoded for encoded, _ in results) == 360
    assert all(wrong < TOLERANCE["f32"] for _, wrong in results)


def test_who_waits_too_long_makes_it_too(tiny: TinyModel, tmp_path: Path) -> None:
    (slice_,) = chain([some_tokens(40)])
    with opened(tiny("llama")) as context, Store(tmp_path, ram_budget=PLENTY, patience=0.2) as store:
        kv_cache = Desk(context, store, SLICES)
        somebody = Claims(tmp_path / "claims")
        assert somebody.take(slice_.key)
        started = time.monotonic()
        assert kv_cache.encode([slice_]).slices == 1
        assert time.monotonic() - started >= 0.2
        store.flush()
        assert list(store.files or ()) == [slice_.key]
        somebody.release([slice_.key])


def test_a_claim_that_is_given_back_is_taken_over(tiny: TinyModel, tmp_path: Path) -> None:
    (slice_,) = chain([some_tokens(40)])
    with opened(tiny("llama")) as context, Store(tmp_path, ram_budget=PLENTY) as store:
        kv_cache = Desk(context, store, SLICES)
        key = slice_.key
        somebody = Claims(tmp_path / "claims")
        assert somebody.take(key)
        timer = threading.Timer(0.2, somebody.release, ([key],))
        timer.start()
        assert kv_cache.encode([slice_]).slices == 1
        timer.join()
        store.flush()
        # And it is free again.
        assert somebody.take(key)
        somebody.release([key])


def test_claims(tmp_path: Path) -> None:
    one, other = Store(tmp_path, ram_budget=0), Store(tmp_path, ram_budget=0)
    assert one.claim("a")
    assert not other.claim("a")
    assert other.claim("b")
    one.release(["a", "b"])
    assert other.claim("a")
    assert not one.claim("b")
    other.release(["a", "b"])
    assert one.claim("a") and one.claim("b")
    one.close()
    other.close()
    assert Store(None, ram_budget=0).claim("a")

"""Two KV caches or engines over one folder: what both need is encoded once, and each of them answers right."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cpucache import Engine
from cpucache.pml import parse_schema
from cpucache.store import Store
from cpucache.store.claims import Claims
from tests.support.command import PROMPT, SCHEMA
from tests.support.serving import until
from tests.support.sessions import engine
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


def test_two_processes_encode_each_slice_once(tiny: TinyModel, tmp_path: Path) -> None:
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


def test_two_stores_encode_each_slice_once_and_answer_right(tiny: TinyModel, tmp_path: Path) -> None:
    path, tokens = tiny("llama"), some_tokens(400)
    start = threading.Barrier(2)

    def work(number: int) -> tuple[int, float]:
        with bench(path, folder=tmp_path) as b:
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


def test_who_waits_too_long_encodes_it_too(tiny: TinyModel, tmp_path: Path) -> None:
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


# ---- whoever waits lets others go first ------------------------------------------------------------------------------
@contextmanager
def halted(model: Path, folder: Path) -> Iterator[threading.Event]:
    """An engine that has begun to encode the schema, and goes on once the event is set."""
    go_on, begun = threading.Event(), threading.Event()
    with engine(model, folder) as running, ThreadPoolExecutor(1) as pool:
        evaluate = running.context.evaluate

        def waiting(*arguments: Any) -> None:
            begun.set()
            assert go_on.wait(120)
            evaluate(*arguments)

        running.context.evaluate = waiting  # type: ignore[method-assign, assignment]
        running.add_schema(parse_schema(SCHEMA))
        encoding = pool.submit(running.encode, "shop")
        assert begun.wait(60)
        try:
            yield go_on
        finally:
            go_on.set()
            encoding.result(60)


def waits(running: Engine) -> bool:
    """Whether what an engine is at waits for another process."""
    job = running.host.core._scheduler.prefill
    return job is not None and job.waits


def answers(model: Path, folder: Path, *texts: str) -> list[str]:
    """What an engine that nobody disturbs answers to the prompt, and to texts."""
    with engine(model, folder) as running:
        running.add_schema(parse_schema(SCHEMA))
        first = running.generate(PROMPT, max_tokens=8).text
        return [first] + [running.generate(text=text, max_tokens=8).text for text in texts]


@pytest.mark.parametrize("parallel", [1, 2])
def test_who_waits_for_another_process_lets_others_go_first(parallel: int, tiny: TinyModel, tmp_path: Path) -> None:
    model, text = tiny("llama"), "rain on the roof " * 20
    undisturbed = answers(model, tmp_path / "undisturbed", text)
    with halted(model, tmp_path) as go_on, engine(model, tmp_path, parallel=parallel) as running:
        running.add_schema(parse_schema(SCHEMA))
        asked = running.stream(PROMPT, max_tokens=8)
        asked.begin()
        until(lambda: waits(running))
        others = [running.generate(text=text, max_tokens=8).text for _ in range(3)]
        assert not asked.request.ended
        assert others == undisturbed[1:] * 3
        until(lambda: waits(running))
        go_on.set()
        reply = asked.reply()
        assert reply.text == undisturbed[0]
        # What the schema ends with is evaluated together with the question.
        assert reply.metrics.encoded_tokens <= 2


def test_those_that_take_turns_in_waiting_are_patient_no_longer(tiny: TinyModel, tmp_path: Path) -> None:
    """The time that one has waited counts on after it has let another go first."""
    model = tiny("llama")
    undisturbed = answers(model, tmp_path / "undisturbed")
    with halted(model, tmp_path), engine(model, tmp_path) as running, ThreadPoolExecutor(3) as pool:
        running.store.patience = 3.0
        running.add_schema(parse_schema(SCHEMA))
        started = time.monotonic()
        replies = list(pool.map(lambda _: running.generate(PROMPT, max_tokens=8), range(3)))
        assert [reply.text for reply in replies] == undisturbed * 3
        assert time.monotonic() - started >= 3.0
        # One of them has encoded the slices.
        assert sorted(reply.metrics.encoded_tokens > 2 for reply in replies) == [False, False, True]


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

"""The core: many requests on one llama.cpp context, each answered as by itself, each ended without touching another."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache import Engine, InputError
from cpucache.engine import Stream
from cpucache.engine.answer import Answer
from cpucache.engine.request import Priority, Request
from cpucache.engine.scheduler import WAITS, Job, Scheduler
from cpucache.errors import ContextFull, CpucacheError
from cpucache.pml import parse_schema
from cpucache.reuse import Plan
from cpucache.reuse.work import Task, Work
from cpucache.runtime import Batch, Run, Sampler, Stopped
from tests.support.command import SCHEMA
from tests.support.pace import slow
from tests.support.serving import until
from tests.support.sessions import engine, greedy, message, said, truth
from tests.support.tiny import ARCHS
from tests.support.workbench import Logits, distance, tolerance

Tiny = Callable[..., Path]

TEXTS = [
    "the sea",
    "a mill by the water " * 9,
    "hay in the barn",
    "the old tin",
    "rain on the roof " * 30,
    "47",
    "of bees and honey",
    "x",
]
PROMPTS = [
    f'<prompt schema="shop">{modules}<user>{text}</user></prompt>'
    for text in ("What is there?", "And why?")
    for modules in ('<winter/><hours opens="ten"/>', '<hours opens="nine"/>', "<summer/>", "")
]


@pytest.fixture
def parallel(tiny: Tiny, tmp_path: Path) -> Iterator[Engine]:
    """An engine that answers four prompts at a time."""
    with engine(tiny("llama"), tmp_path, n_ctx=4096, parallel=4) as running:
        yield running


def begin(*streams: Stream) -> None:
    """Ask for the first piece of each, at the same time."""
    with ThreadPoolExecutor(len(streams)) as pool:
        list(pool.map(lambda stream: next(stream, ""), streams))


# ---- side by side ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ARCHS)
def test_answers_side_by_side_are_those_given_one_by_one(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """Each token of each was chosen from the logits of plain evaluation."""
    model = tiny(arch)
    with engine(model, tmp_path, n_ctx=4096, parallel=4) as running, truth(model, n_ctx=4096) as true:
        slow(running, 0.002)
        context, sample = running.context, running.context.sample
        rows: dict[Sampler, list[Logits]] = defaultdict(list)
        together: list[int] = []

        def noting(sampler: Sampler, index: int) -> int:
            together.append(len(running.host.core._scheduler.running))
            rows[sampler].append(context.logits(index))
            return sample(sampler, index)

        context.sample = noting  # type: ignore[method-assign, assignment]
        streams = [running.stream(text=text, max_tokens=12) for text in TEXTS]
        begin(*streams)
        for stream in streams:
            stream.reply()
        assert max(together) == 4
        for stream in streams:
            (found,) = (
                each
                for each in rows.values()
                if [int(row.argmax()) for row in each][: len(stream.tokens)] == stream.tokens
            )
            tokens = np.concatenate([stream.plan.tokens, np.array(stream.tokens[: stream.evaluated], np.int32)])
            assert len(found) == stream.evaluated + 1
            for row, expected in zip(found, true.rows(tokens, len(found)), strict=True):
                assert distance(row, expected) < tolerance(arch, "f32")


@pytest.mark.parametrize("arch", ["llama", "mpt", "gemma3"])
def test_modules_at_the_same_position_share_their_cells(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """The first request loads the cells. The others load nothing, and answer as by themselves."""
    with engine(tiny(arch), tmp_path, n_ctx=2048, parallel=4) as running:
        running.add_schema(parse_schema(SCHEMA))
        running.encode("shop")
        one_by_one = [running.generate(prompt, max_tokens=10).text for prompt in PROMPTS]
        running.forget()
        slow(running)
        loads: list[int] = []
        load = running.context.load

        def noting(sequence: int, state: Any) -> bool:
            loads.append(len(running.host.core._scheduler.answers))
            return load(sequence, state)

        running.context.load = noting  # type: ignore[method-assign]
        streams = [running.stream(prompt, max_tokens=10) for prompt in PROMPTS]
        begin(*streams)
        assert [stream.reply().text for stream in streams] == one_by_one
        same = [running.stream(PROMPTS[0], max_tokens=100) for _ in range(4)]
        loads.clear()
        begin(*same)
        assert len({stream.reply().text for stream in same}) == 1
        assert not any(loads)


def test_a_prompt_that_comes_meanwhile_does_not_hold_answers_up(parallel: Engine) -> None:
    """Its prefill goes into the batches of the answers, in chunks."""
    sizes: list[int] = []
    evaluate = parallel.context.evaluate

    def noting(batch: Batch, *arguments: Any) -> None:
        time.sleep(batch.size * 1e-3)
        if answer.tokens and answer.metrics.finish == "interrupted":
            sizes.append(batch.size)
        evaluate(batch, *arguments)

    answer = parallel.stream(text="the sea", max_tokens=300)
    parallel.context.evaluate = noting  # type: ignore[method-assign, assignment]
    next(answer)
    long = parallel.stream(text="hay " * 500, max_tokens=1)
    next(long)
    assert len(answer.tokens) > 50
    assert len(sizes) > 50
    # One after the other would be a batch of 500.
    assert max(sizes) < 100


def test_a_prompt_waits_for_cells_that_others_have(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, n_ctx=512, parallel=4) as running:
        slow(running)
        one_by_one = [running.generate(text=text, max_tokens=40).text for text in TEXTS]
        most: list[int] = []
        sample = running.context.sample

        def noting(*arguments: Any) -> int:
            most.append(len(running.host.core._scheduler.running))
            return sample(*arguments)

        running.context.sample = noting  # type: ignore[method-assign, assignment]
        # 150 cells each: three fit.
        streams = [running.stream(text=text, max_tokens=130) for text in TEXTS[:1] * 6]
        begin(*streams)
        assert len({stream.reply().text for stream in streams}) == 1
        assert max(most) == 3
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda text: running.generate(text=text, max_tokens=40).text, TEXTS)) == one_by_one


def answer_to(running: Engine, plan: Plan) -> Answer:
    return Answer(running.kv_cache, lambda: plan, greedy(), max_tokens=5, started=0.0, label="(text)")


def test_a_prompt_that_needs_more_cells_than_it_said_waits_for_them(tiny: Tiny, tmp_path: Path) -> None:
    """Encoding missing slices may take more cells than the prompt has tokens."""
    with engine(tiny("llama"), tmp_path, n_ctx=512, parallel=3) as running:
        slow(running, 0.005)
        by_itself = running.generate(text="y" * 450, max_tokens=5).text
        wanted = running.generate(text="the sea", max_tokens=150)
        running.forget()
        other = running.stream(text="the sea", max_tokens=150)
        until(lambda: bool(next(other)) and len(other.tokens) > 100)
        plan = running.plan(text="y" * 450)
        more = Stream(running.host, answer_to(running, plan), n_tokens=1)
        assert more.reply().text == by_itself
        assert other.reply().text == wanted.text
        # By itself, a request has nothing to wait for.
        too_long = running.slices.plan((), np.tile(plan.tokens, 2))
        with pytest.raises(ContextFull):
            Stream(running.host, answer_to(running, too_long), n_tokens=1).reply()
        assert running.generate(text="the sea", max_tokens=150).text == wanted.text


# ---- ended -----------------------------------------------------------------------------------------------------------
def test_closing_while_another_thread_generates(tiny: Tiny, tmp_path: Path) -> None:
    """The answer ends, with what there is of it; what waits ends, too; and nothing is asked afterwards."""
    running = Engine(tiny("llama"), store=tmp_path, n_ctx=2048, threads=1)
    slow(running)
    streams = [running.stream(text=text, max_tokens=2000) for text in TEXTS[:3]]
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(stream.reply) for stream in streams]
        until(lambda: any(len(stream.tokens) > 3 for stream in streams))
        running.close()
        ended = [reply.result(10) for reply in replies]
    assert [reply.metrics.finish for reply in ended] == ["interrupted"] * 3
    assert sorted(bool(reply.text) for reply in ended) == [False, False, True]
    for call in (lambda: running.generate(text="x"), lambda: running.encode_for(PROMPTS[0])):
        with pytest.raises((CpucacheError, InputError)):
            call()
    running.close()


def test_no_request_waits_for_a_stream_left_half_read(parallel: Engine) -> None:
    by_itself = parallel.generate(text="a mill", max_tokens=5).text
    left = parallel.stream(text="the sea", max_tokens=3000)
    next(left)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(parallel.generate, text="a mill", max_tokens=5) for _ in range(6)]
        assert [each.result(60).text for each in asked] == [by_itself] * 6
    # Forgotten, it ends.
    core = parallel.host.core
    assert core._scheduler.running
    del left
    gc.collect()
    until(lambda: not core.busy)


@pytest.mark.parametrize("namespace", [None, "a"])
def test_a_forgotten_engine_ends_once_no_stream_needs_it(namespace: str | None, tiny: Tiny, tmp_path: Path) -> None:
    def ask() -> Stream:
        running = Engine(tiny("llama"), store=tmp_path, n_ctx=512, threads=1)
        return (running.within(namespace) if namespace else running).stream(text="the sea", max_tokens=20)

    stream = ask()
    gc.collect()
    assert stream.reply().metrics.completion_tokens == 20
    store, context, core = stream._host.store, stream._host.context, stream._host.core
    assert core._thread.is_alive()
    del stream
    gc.collect()
    until(lambda: not core._thread.is_alive())
    store.close()
    context.close()
    context.model.close()


def test_with_one_slot_a_stream_left_half_read_ends_by_itself(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        left = running.stream(text="the sea", max_tokens=50)
        next(left)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(running.generate, text="a mill", max_tokens=5).result(60).text
        assert left.reply().metrics.completion_tokens == 50


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_stream_is_ended_in_any_state(how: str, parallel: Engine) -> None:
    slow(parallel, 0.005)
    wanted = parallel.generate(text="rain", max_tokens=30).text
    other = parallel.stream(text="rain", max_tokens=30)
    next(other)
    busy = [parallel.stream(text=text, max_tokens=1000) for text in TEXTS[:3]]
    begin(*busy)
    # Not begun, waiting for a slot, its prompt being evaluated, answering, ended.
    fresh = parallel.stream(text="not begun", max_tokens=10)
    waiting = parallel.stream(text="waiting", max_tokens=10)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(waiting.reply)
        until(lambda: waiting.request.begun)
        for stream in (fresh, waiting):
            getattr(stream, how)()
        assert read.result(10).text == ""
    assert (list(fresh), fresh.metrics.finish) == ([], "interrupted")
    assert waiting.metrics.finish == "interrupted"
    for stream in busy:
        getattr(stream, how)()
        stream.reply()
        assert stream.metrics.finish == "interrupted"
        assert 0 < stream.metrics.completion_tokens < 1000
    long = parallel.stream(text="y" * 3000, max_tokens=10)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(long.reply)
        until(lambda: parallel.host.core._scheduler.prefill is not None)
        getattr(long, how)()
        assert read.result(10).metrics.completion_tokens == 0
    assert other.reply().text == wanted
    getattr(other, how)()
    assert (other.text, other.metrics.finish) == (wanted, "length")
    assert parallel.generate(text="rain", max_tokens=30).text == wanted


@pytest.mark.parametrize("arch", ["llama", "mamba", "gemma3"])
def test_what_a_stopped_prompt_has_evaluated_is_kept(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """As clients do that lose patience, and ask again."""
    model = tiny(arch)
    text = message(1, 400)
    with engine(model, tmp_path, n_ctx=4096) as running, truth(model, n_ctx=4096) as true:
        evaluated: list[int] = []
        evaluate = running.context.evaluate

        def stopping(batch: Batch, *arguments: Any) -> None:
            evaluate(batch, *arguments)
            evaluated.append(batch.size)
            if sum(evaluated) >= 1000:
                stream.stop()

        running.context.evaluate = stopping  # type: ignore[method-assign, assignment]
        stream = running.stream(text=text, max_tokens=4)
        assert stream.reply().metrics.completion_tokens == 0
        # Whole steps of 256 tokens and more are in the store, but for the last; that is in the slot, and found there.
        known = sum(evaluated) if arch == "llama" else sum(evaluated) - 512
        evaluated.clear()
        answer = said(running, running.stream(text=text, max_tokens=1))
        assert sum(evaluated) <= answer.stream.plan.n_tokens - known + 2
        true.check(arch, answer)


def test_what_was_stopped_for_nobody_goes_on(parallel: Engine) -> None:
    """A request that comes stops an evaluation, and is cancelled before it begins."""
    wanted = parallel.generate(text="y" * 600, max_tokens=5, use_cache=False).text
    evaluate, calls = parallel.context.evaluate, 0

    def stopping(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise Stopped
        evaluate(*arguments)

    parallel.context.evaluate = stopping  # type: ignore[method-assign, assignment]
    assert parallel.generate(text="y" * 600, max_tokens=5).text == wanted
    assert calls > 3


def test_an_error_is_its_own_caller_s(parallel: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(parallel, 0.005)
    wanted = parallel.generate(text="rain", max_tokens=30).text
    other = parallel.stream(text="rain", max_tokens=30)
    next(other)

    def fail() -> Any:
        raise RuntimeError("no plan")

    broken = parallel.stream(text="x", max_tokens=2)
    monkeypatch.setattr(broken._answer, "planned", fail)
    with pytest.raises(RuntimeError, match="no plan"):
        broken.reply()
    assert list(broken) == []
    told = parallel.stream(text="a mill by the sea", max_tokens=20, progress=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        told.reply()
    assert other.reply().text == wanted


INTERRUPTED = """
import os, signal, sys, threading, time
from cpucache import Engine
signal.signal(signal.SIGINT, signal.default_int_handler)

def slowly(*arguments):
    time.sleep(0.005)
    evaluate(*arguments)

with Engine(sys.argv[1], store=sys.argv[2], n_ctx=4096, threads=1, parallel=2) as engine:
    evaluate, engine.context.evaluate = engine.context.evaluate, slowly
    other = engine.stream(text="other", max_tokens=2000)
    next(other)
    stream = engine.stream(text="the sea", max_tokens=3000)
    next(stream)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        print(stream.metrics.finish, bool(stream.text), 0 < stream.metrics.completion_tokens < 3000)
    print(len(other.reply().text) > 10, other.metrics.finish != "interrupted")
"""


def test_ctrl_c_ends_the_answer_that_is_waited_for(tiny: Tiny, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny("llama")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines() == ["interrupted True True", "True True"]


def test_an_engine_that_nobody_closes_keeps_no_program_running(tiny: Tiny, tmp_path: Path) -> None:
    code = """
import sys
from cpucache import Engine
engine = Engine(sys.argv[1], store=sys.argv[2], n_ctx=4096, threads=1)
stream = engine.stream(text="the sea", max_tokens=4000)
print(bool(next(stream)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny("llama")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# ---- in order --------------------------------------------------------------------------------------------------------
def test_answers_overtake_encoding(tiny: Tiny, tmp_path: Path) -> None:
    """Interrupted in the middle of an evaluation, encoding goes on after the answers, and saves the same slices."""
    modules = "".join(f"<module name='m{index}'>{chr(65 + index) * 400}</module>" for index in range(8))
    schema = parse_schema(f"<schema name='s'>{modules}</schema>")
    with engine(tiny("llama"), tmp_path / "undisturbed", n_ctx=4096) as running:
        running.add_schema(schema)
        keys = {slice_.key for slice_ in running.encode("s").wanted}
    with engine(tiny("llama"), tmp_path, n_ctx=4096) as running:
        running.add_schema(schema)
        slow(running, 0.05)
        with ThreadPoolExecutor(1) as pool:
            encoding = pool.submit(running.encode, "s")
            until(lambda: running.host.core._scheduler.prefill is not None)
            for _ in range(3):
                assert running.generate(text="the sea", max_tokens=2).text
                assert not encoding.done()
            encoded = encoding.result(60)
        assert {slice_.key for slice_ in encoded.wanted} == keys
        assert {slice_.key for slice_ in encoded.new} == keys
        assert all(key in running.store for key in keys)


def test_of_each_priority_the_first_comes_first() -> None:
    scheduler = Scheduler(1, 100, 512)
    nothing: Any = iter(())
    requests: list[Request[Any]] = [Request(lambda _: nothing, priority=Priority(each)) for each in (2, 0, 1, 0, 2)]
    for request in requests:
        scheduler.add(request)
    assert [scheduler.next() for _ in range(6)] == [*(requests[index] for index in (1, 3, 2, 0, 4)), None]


def test_a_request_that_only_waits_lets_those_that_can_start_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def task(*works: Work) -> Task[None]:
        yield from works

    def of(priority: Priority, cells: int = 10) -> Request[None]:
        return Request(lambda _: task(Work([])), priority=priority, cells=cells)

    scheduler = Scheduler(4, 100, 512)
    answering = Job(of(Priority.ANSWER, 50))
    scheduler.answers = [answering]
    waiting = scheduler.prefill = Job(of(Priority.ENCODE))
    waiting.start()
    assert waiting.waits
    scheduler.add(of(Priority.ENCODE))
    # Not at once: two that wait would only take turns.
    assert scheduler.overtaken() is None
    monkeypatch.setattr(waiting, "started", waiting.started - WAITS)
    assert scheduler.overtaken() is waiting
    scheduler.waiting[Priority.ENCODE].clear()
    for request in (of(Priority.PREPARE), of(Priority.ENCODE, 60)):
        scheduler.add(request)
        assert scheduler.overtaken() is None
    scheduler.add(of(Priority.ANSWER, 60))
    assert scheduler.overtaken() is waiting
    scheduler.waiting[Priority.ANSWER].clear()
    scheduler.answers = []
    assert scheduler.overtaken() is waiting
    # And not while it has something to do.
    waiting.work = Work([Run(0, 0, np.zeros(5, np.int32))])
    assert scheduler.overtaken() is None


def test_a_chunk_takes_as_long_as_two_steps() -> None:
    def batch(scheduler: Scheduler, chunk: int) -> Batch:
        batch = Batch()
        jobs, size = scheduler.fill(batch)
        assert (len(jobs), size) == (3, chunk)
        return batch

    def running(count: int, *, answers: bool = False) -> Job:
        def task() -> Task[None]:
            yield Work([Run(0, 0, np.zeros(count, np.int32))], answers=answers)

        job = Job(Request(lambda _: task()))
        job.start()
        return job

    scheduler = Scheduler(4, 10_000, 512)
    scheduler.answers = [running(1, answers=True), running(1, answers=True)]
    scheduler.learn(0, 0.1)
    scheduler.prefill = running(5000)
    # Nobody knows yet.
    assert batch(scheduler, 16).size == 18
    # 16 tokens in 0.08 s are 200 in a second, 40 in two steps.
    scheduler.learn(16, 0.18)
    for job in scheduler.answers:
        job.work = Work([Run(0, 0, np.zeros(1, np.int32))], answers=True)
    assert batch(scheduler, 40).size == 42
    # Without answers beside it, a whole batch.
    scheduler.answers = []
    whole = Batch()
    assert scheduler.fill(whole)[1] == 512


@pytest.mark.parametrize("parallel", [0, 17])
def test_too_many_or_too_few_slots_are_refused(parallel: int, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"parallel={parallel}: must be from 1 to 16"):
        Engine(tiny("llama"), store=tmp_path, parallel=parallel)


def test_sessions_side_by_side(parallel: Engine) -> None:
    def talk(name: str) -> list[str]:
        with parallel.session(name) as session:
            return [session.send(f"{message(number)} {name[-1]}", max_tokens=6).text for number in range(4)]

    one_by_one = {name: talk(f"single {name}") for name in "abcdef"}
    with ThreadPoolExecutor(6) as pool:
        together = dict(zip("abcdef", pool.map(talk, [f"with {name}" for name in "abcdef"]), strict=True))
    assert together == one_by_one


def test_a_stream_is_begun_once_by_many_threads(parallel: Engine) -> None:
    """What it needs is held while it waits, and let go when it has ended."""
    text = "the sea " * 40
    parallel.generate(text=text, max_tokens=1)
    slow(parallel)
    let_go = parallel.store.let_go
    held: dict[str, int] = defaultdict(int)
    hold = parallel.store.hold

    def holding(keys: list[str]) -> None:
        time.sleep(0.02)
        for key in keys:
            held[key] += 1
        hold(keys)

    def letting_go(keys: list[str]) -> None:
        for key in keys:
            held[key] -= 1
        let_go(keys)

    parallel.store.hold = holding  # type: ignore[method-assign, assignment]
    parallel.store.let_go = letting_go  # type: ignore[method-assign, assignment]
    other = parallel.stream(text="a mill", max_tokens=30)
    other.begin()
    stream = parallel.stream(text=text, max_tokens=2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: stream.begin(), range(4)))
    assert stream.reply().metrics.completion_tokens == 2
    other.close()
    until(lambda: not any(held.values()))
    assert held and not any(held.values())

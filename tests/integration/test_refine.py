"""Refining: what was asked becomes exact when there is time, whatever interrupts it, and whoever else is at it."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cpucache import Engine
from cpucache.engine.core import PAUSE
from cpucache.runtime.hardware import on_mains
from cpucache.store.upkeep import verify
from tests.support.prompting import written
from tests.support.sessions import engine, logits
from tests.support.workbench import distance, tolerance

TinyModel = Callable[..., Path]

SCHEMA = "Root. " + "".join(
    f"<module name='{name}'>{name} is a module with some text of its own, to be reused {name}.</module>"
    for name in "abcde"
)
ORDERS = ("<d/><b/><a/>", "<e/><c/>", "<b/>new text <a/>")
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def prompt(order: str) -> str:
    return f"<prompt schema='s'>{order}<user>And what of b and d?</user></prompt>"


@pytest.fixture
def asked(tiny: TinyModel, tmp_path: Path) -> Iterator[Engine]:
    """An engine with prompts that are not exact yet, the first of them asked most."""
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(written(SCHEMA))
        running.encode("s")
        for order in (*ORDERS, ORDERS[0]):
            running.generate(prompt(order), max_tokens=1)
        yield running


def check_is_exact(running: Engine, order: str) -> None:
    """Asked again, it is full prefill, and costs its new text."""
    plan = running.plan(prompt(order))
    assert plan.exact and not any(span.missing or span.recomputed for span in plan.spans)
    reply = running.generate(prompt(order), max_tokens=1)
    assert (reply.metrics.encoded_tokens, reply.metrics.encode_ms) == (0, 0)
    assert reply.metrics.exact_tokens == reply.metrics.cached_tokens == plan.n_cached
    full = logits(running, plan.without_reuse(), fresh=True)
    assert distance(logits(running, plan), full) < tolerance("llama", "f32")


def test_what_was_asked_is_exact_afterwards(asked: Engine) -> None:
    assert not any(asked.plan(prompt(order)).exact for order in ORDERS)
    told: list[tuple[int, int]] = []
    refined = asked.refine(progress=lambda done, total: told.append((done, total)))
    assert refined.slices > 5
    assert told[-1] == (refined.tokens, refined.tokens)
    assert {total for _, total in told} == {refined.tokens}
    for order in ORDERS:
        check_is_exact(asked, order)
    assert asked.refine().slices == 0


def test_the_most_asked_comes_first_and_other_schemas_can_wait(asked: Engine) -> None:
    assert asked.refine("another").slices == 0
    wanted = asked.refine("s").wanted
    for order in ORDERS:
        assert set(asked.plan(prompt(order)).slices) <= set(wanted)
    first = asked.plan(prompt(ORDERS[0])).slices
    assert set(wanted[: len(first)]) == set(first)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_interrupted_at_any_step_it_leaves_the_store_sound(asked: Engine, steps: int) -> None:
    def told(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == steps:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        asked.refine(progress=told)
    asked.store.flush()
    assert verify(asked.store) == []
    # What was begun is no hindrance to anybody.
    asked.generate(prompt("<c/><a/>"), max_tokens=2)
    asked.refine()
    assert verify(asked.store) == []
    for order in ORDERS:
        check_is_exact(asked, order)


def test_answers_come_first(asked: Engine) -> None:
    """Answers interrupt refining, and refining goes on after the answers."""
    wanted = asked.generate(prompt("<a/>"), max_tokens=5).text
    answers: list[str] = []
    dones: list[int] = []

    def told(done: int, total: int) -> None:
        dones.append(done)
        if done < total:
            answers.append(asked.generate(prompt("<a/>"), max_tokens=5).text)

    asked.refine(progress=told)
    assert answers and set(answers) == {wanted}
    # However often it starts over, its progress is told once.
    assert dones == sorted(set(dones))
    for order in ORDERS:
        check_is_exact(asked, order)


def _refine(model: Path, folder: Path) -> None:
    with engine(model, folder) as running:
        running.refine()


def test_two_processes_refine_one_store(asked: Engine, tmp_path: Path) -> None:
    asked.store.flush()
    others = [_processes.Process(target=_refine, args=(asked.model.path, tmp_path)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(120)
        assert other.exitcode == 0
    assert verify(asked.store) == []
    asked.refine()
    for order in ORDERS:
        check_is_exact(asked, order)


# ---- by itself -------------------------------------------------------------------------------------------------------


def becomes(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def test_it_refines_when_nothing_is_asked(tiny: TinyModel, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, refine="idle") as running:
        running.add_schema(written(SCHEMA))
        running.encode("s")
        running.generate(prompt(ORDERS[0]), max_tokens=1)
        assert becomes(lambda: running.plan(prompt(ORDERS[0])).exact)
        check_is_exact(running, ORDERS[0])


def test_it_refines_after_an_answer_that_took_long(tiny: TinyModel, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, refine="idle") as running:
        running.add_schema(written(SCHEMA))
        running.encode("s")
        answer = running.stream(prompt(ORDERS[0]), max_tokens=8)
        next(answer)
        time.sleep(2 * PAUSE)
        answer.reply()
        assert becomes(lambda: running.plan(prompt(ORDERS[0])).exact)


@pytest.mark.parametrize("refines", ["off", "idle"])
def test_on_battery_or_unless_told_it_does_not(
    refines: str, tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refines == "idle":
        battery = SimpleNamespace(power_plugged=False)
        monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
        assert not on_mains()
    with engine(tiny("llama"), tmp_path, refine=refines) as running:
        running.add_schema(written(SCHEMA))
        running.encode("s")
        running.generate(prompt(ORDERS[0]), max_tokens=1)
        time.sleep(2.5)
        assert not running.plan(prompt(ORDERS[0])).exact


@pytest.mark.parametrize("pause", [0, 1.2])
def test_closing_does_not_wait_for_all_of_it(pause: float, tiny: TinyModel, tmp_path: Path) -> None:
    running = Engine(tiny("llama"), store=tmp_path / "slices", threads=1, n_ctx=1024, refine="idle")
    running.add_schema(written(SCHEMA))
    running.encode("s")
    for order in ORDERS:
        running.generate(prompt(order), max_tokens=1)
    time.sleep(pause)
    closing = threading.Thread(target=running.close)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()

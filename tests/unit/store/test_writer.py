"""The writer: jobs in order, in the background, with a limit on what waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from cpucache.store.writer import Writer

PATIENCE = 30.0
"""Seconds until something counts as never happening."""
LIMIT = 100


@dataclass
class Desk:
    """A writer whose jobs are done one by one, when told."""

    done: list[str] = field(default_factory=list)
    idle: int = 0
    begun: threading.Event = field(default_factory=threading.Event)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.writer: Writer[str] = Writer(self.write, self.rest, limit=LIMIT)

    def write(self, key: str, job: str) -> None:
        self.begun.set()
        assert self.go.acquire(timeout=PATIENCE)
        self.done.append(f"{key}={job}")

    def rest(self) -> None:
        self.idle += 1

    def proceed(self, times: int = 1000) -> None:
        self.go.release(times)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.proceed()
    desk.writer.close()


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def beside(action: Callable[[], object]) -> threading.Thread:
    """Do something in another thread."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(PATIENCE)
    return not thread.is_alive()


def stands(thread: threading.Thread) -> bool:
    thread.join(0.05)
    return thread.is_alive()


def test_jobs_are_done_in_order_by_another_thread(desk: Desk) -> None:
    for key in "cab":
        desk.writer.put(key, key.upper(), 10)
    assert desk.done == []
    assert desk.writer.get("a") == "A"
    assert "b" in desk.writer
    desk.proceed()
    desk.writer.flush()
    assert desk.done == ["c=C", "a=A", "b=B"]
    assert "a" not in desk.writer
    assert desk.writer.get("a") is None


def test_what_is_being_written_is_still_found(desk: Desk) -> None:
    desk.writer.put("a", "A", 10)
    assert desk.begun.wait(PATIENCE)
    assert desk.writer.get("a") == "A"
    desk.writer.put("a", "again", 10)
    desk.proceed()
    desk.writer.flush()
    assert desk.done == ["a=A"]


def test_a_caller_with_too_much_waits(desk: Desk) -> None:
    desk.writer.put("a", "A", 60)
    desk.writer.put("b", "B", 40)
    third = beside(lambda: desk.writer.put("c", "C", 1))
    assert stands(third)
    assert "c" not in desk.writer
    desk.proceed(1)
    assert ended(third)
    assert "c" in desk.writer


def test_a_job_larger_than_the_limit_is_taken_when_nothing_waits(desk: Desk) -> None:
    desk.writer.put("a", "A", 10 * LIMIT)
    second = beside(lambda: desk.writer.put("b", "B", 1))
    assert stands(second)
    desk.proceed(1)
    assert ended(second)


def test_a_dropped_job_is_not_done(desk: Desk) -> None:
    for key in "abc":
        desk.writer.put(key, key, LIMIT // 3)
    assert desk.begun.wait(PATIENCE)
    desk.writer.drop("b")
    desk.writer.drop("not there")
    assert "b" not in desk.writer
    desk.writer.put("d", "d", LIMIT // 3)  # in the room that it left
    first = beside(lambda: desk.writer.drop("a"))  # under way: its end is waited for
    assert stands(first)
    desk.proceed()
    assert ended(first)
    desk.writer.flush()
    assert desk.done == ["a=a", "c=c", "d=d"]


def test_idle_is_called_when_nothing_is_left_or_on_wake(desk: Desk) -> None:
    desk.proceed()
    desk.writer.wake()
    until(lambda: desk.idle == 1)
    desk.writer.put("a", "A", 1)
    until(lambda: desk.idle == 2)
    assert desk.done == ["a=A"]


def test_closing_does_what_waits_and_may_be_repeated(desk: Desk) -> None:
    for key in "ab":
        desk.writer.put(key, key, 1)
    desk.proceed()
    desk.writer.close()
    assert desk.done == ["a=a", "b=b"]
    desk.writer.close()
    # Somebody came late: nothing hangs, and nothing is lost.
    desk.writer.put("c", "c", 1)
    desk.writer.flush()
    assert desk.done[2:] == ["c=c"]


# ---- giving way ------------------------------------------------------------------------------------------------------


@dataclass
class Polite:
    """A writer of jobs in three steps that give way."""

    steps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer: Writer[int] = Writer(self.write, lambda: None, limit=LIMIT)

    def write(self, key: str, job: int) -> None:
        for step in range(job):
            self.writer.give_way()
            self.steps.append(f"{key}{step}")


@pytest.fixture
def polite() -> Iterator[Polite]:
    polite = Polite()
    yield polite
    polite.writer.close()


def test_nothing_is_written_while_the_writer_is_paused(polite: Polite) -> None:
    with polite.writer.paused():
        with polite.writer.paused():
            polite.writer.put("a", 3, 1)
        time.sleep(0.05)
        assert polite.steps == []
    until(lambda: len(polite.steps) == 3)


@pytest.mark.parametrize("who", ["put", "flush", "close", "drop"])
def test_who_waits_for_the_disk_comes_before_the_pause(who: str, polite: Polite) -> None:
    with polite.writer.paused():
        polite.writer.put("a", 3, LIMIT)
        time.sleep(0.02)
        assert polite.steps == []
        waiting = {
            "put": lambda: polite.writer.put("b", 1, LIMIT),
            "flush": polite.writer.flush,
            "close": polite.writer.close,
            "drop": lambda: polite.writer.drop("a"),
        }[who]
        assert ended(beside(waiting))
        assert polite.steps[:3] == ["a0", "a1", "a2"]


# ---- what nobody expected --------------------------------------------------------------------------------------------


def test_a_job_that_fails_is_logged_and_the_next_ones_are_done(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def write(key: str, job: str) -> None:
        if job == "bad":
            raise TypeError("of no use")
        done.append(key)

    def rest() -> None:
        raise RuntimeError("nothing to note")

    writer: Writer[str] = Writer(write, rest, limit=LIMIT)
    for key, job in (("a", "bad"), ("b", "good"), ("c", "bad"), ("d", "good")):
        writer.put(key, job, LIMIT)
    assert ended(beside(writer.flush))
    assert done == ["b", "d"]
    writer.wake()
    writer.put("e", "good", 1)
    assert ended(beside(writer.close))
    assert done == ["b", "d", "e"]
    assert caplog.text.count("was not written (TypeError: of no use)") == 2
    assert "could not be recorded (RuntimeError: nothing to note)" in caplog.text

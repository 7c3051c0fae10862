"""What an open session or a waiting request needs is fetched ahead, and stays where it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpucache.engine import Engine
from cpucache.engine.session import Session
from cpucache.store import Store
from tests.support.pace import slow
from tests.support.sessions import SYSTEM, engine, message, said, sizes, truth
from tests.support.tiny import RECURRENT_ARCHS

Tiny = Callable[..., Path]
TEXT = message(1, 60)


def needed(running: Engine, session: Session) -> list[str]:
    """The keys of the slices that the next turn of a session needs: those of its plan, as far as there are any."""
    plan = session.stream("?", max_tokens=1).planned()
    keys = [key for key in running.kv_cache.keys(plan) if key in running.store]
    assert keys
    return keys


def stream_by(running: Engine, count: int) -> None:
    """Other prompts, a few slices each."""
    for number in range(count):
        running.generate(text=message(1000 + number, 40), max_tokens=1)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def begun(model: Path, folder: Path, disk_budget: int | None = None) -> int:
    """Begin a session of three turns; gives the bytes of its slices."""
    with (
        engine(model, folder, segment_tokens=(8, 16), disk_budget=disk_budget) as running,
        running.session("s", system=SYSTEM) as session,
    ):
        for number in range(3):
            session.send(message(number), max_tokens=5)
        return running.store.ram.used


@pytest.mark.parametrize("is_open", [True, False])
def test_what_an_open_session_needs_stays_in_memory(is_open: bool, tiny: Tiny, tmp_path: Path) -> None:
    size = begun(tiny("llama"), tmp_path)
    with engine(tiny("llama"), tmp_path, segment_tokens=(8, 16), ram_budget=2 * size) as running:
        session = running.session("s")
        keys = needed(running, session)
        running.prefetch(session).result()
        if not is_open:
            session.close()
        stream_by(running, 20)
        assert running.store.ram.used <= 2 * size
        assert all(key in running.store.ram for key in keys) == is_open


@pytest.mark.parametrize("is_open", [True, False])
def test_what_an_open_session_needs_stays_on_disk(is_open: bool, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    size = begun(model, tmp_path / "elsewhere")
    # A budget smaller than one that was kept to before evicts nothing.
    begun(model, tmp_path, disk_budget=2 * size)
    with (
        engine(model, tmp_path, segment_tokens=(8, 16), ram_budget=1, disk_budget=2 * size) as running,
        truth(model) as true,
    ):
        session = running.session("s")
        keys = needed(running, session)
        known = sum(sizes(session))
        if not is_open:
            session.close()
        assert running.store.files is not None
        for _ in range(3):
            stream_by(running, 20)
            running.store.flush()
        there = [key in running.store.files for key in keys]
        assert all(there) == is_open
        if is_open:
            answer = said(running, session.stream(message(9), max_tokens=3))
            assert answer.fresh == answer.stream.plan.n_tokens - known
            true.check("llama", answer)


def test_what_a_closed_session_held_is_let_go(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        with running.session("s", system=SYSTEM) as session:
            for number in range(3):
                session.send(message(number), max_tokens=5)
                assert len(running.store._using) == 1 + 2 * (number + 1)
            said(running, session.edit(2, "Again", max_tokens=3))
            assert len(running.store._using) == 5
        assert not running.store._using


def test_a_session_that_is_opened_is_read_into_memory(tiny: Tiny, tmp_path: Path) -> None:
    size = begun(tiny("llama"), tmp_path)
    with engine(tiny("llama"), tmp_path, segment_tokens=(8, 16)) as running, running.session("s"):
        assert eventually(lambda: running.store.ram.used == size)


@pytest.mark.parametrize("arch", RECURRENT_ARCHS)
def test_of_a_recurrent_model_one_state_is_read(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """The last, which is that of everything before, besides the cells of all slices."""
    size = begun(tiny(arch), tmp_path)
    with engine(tiny(arch), tmp_path) as running, running.session("s") as session:
        session.prefetch().result()
        assert running.store.files is not None
        found = {key: running.store.files.info(key) for key in session.keys}
        points = [key for key, info in found.items() if info and not info[0].tokens]
        assert len(points) == 1
        assert 0 < running.store.ram.used < size
        # It is the one.
        assert session.send(message(9), max_tokens=1).metrics.cached_tokens > sum(sizes(session)[:-2]) - 2


def test_a_prompt_is_read_ahead_on_demand(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, segment_tokens=(8, 16)) as running:
        running.generate(text=TEXT, max_tokens=1)
    with engine(tiny("llama"), tmp_path, segment_tokens=(8, 16)) as running:
        keys = running.kv_cache.keys(running.plan(text=TEXT))
        assert len(keys) > 3
        assert not any(key in running.store.ram for key in keys)
        running.prefetch(text=TEXT).result()
        assert all(key in running.store.ram for key in keys)
        # What is not there is no trouble.
        running.prefetch(text=message(77, 60)).result()


def test_what_waits_for_its_turn_is_read_ahead_and_kept(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path, segment_tokens=(8, 16)) as running:
        running.generate(text=TEXT, max_tokens=1)
        size = running.store.ram.used
    with engine(model, tmp_path, segment_tokens=(8, 16), ram_budget=size * 3 // 2) as running:
        keys = running.kv_cache.keys(running.plan(text=TEXT))
        slow(running, 0.03)
        under_way = running.stream(text="First come, first served.", max_tokens=10_000)
        next(under_way)
        fresh: list[int] = []
        waiting = threading.Thread(
            target=lambda: fresh.append(running.generate(text=TEXT, max_tokens=1).metrics.fresh_tokens)
        )
        waiting.start()
        assert eventually(lambda: all(key in running.store.ram for key in keys))
        # There is no room for as much again, and nothing is evicted for it.
        other = running.kv_cache.keys(running.plan(text=message(5, 60)))
        state = running.store.get(keys[0])
        assert state is not None
        for key in other:
            running.store.ram.put(key, state)
        assert not all(key in running.store.ram for key in other)
        assert all(key in running.store.ram for key in keys)
        assert not fresh
        under_way.close()
        waiting.join(30)
        plan = running.plan(text=TEXT)
        assert fresh == [plan.n_tokens - plan.n_cached]
        assert not running.store._using


def test_reading_ahead_stops_when_the_store_closes(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, segment_tokens=(2, 4)) as running:
        running.generate(text=TEXT, max_tokens=1)
        keys = running.kv_cache.keys(running.plan(text=TEXT))
    store = Store(tmp_path / "slices", ram_budget=1 << 30)
    assert store.files is not None
    get, read, first = store.files.get, [], threading.Event()

    def slow(*arguments: object, **settings: object) -> object:
        first.set()
        time.sleep(0.02)
        read.append(arguments)
        return get(*arguments, **settings)  # type: ignore[arg-type]

    store.files.get = slow  # type: ignore[method-assign, assignment]
    store.prefetch(keys)
    later = store.prefetch(keys)
    assert first.wait(30)
    store.close()
    assert 0 < len(read) < len(keys)
    assert later.cancelled()

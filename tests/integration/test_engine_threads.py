"""One engine, several threads: each gets its own answer, whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from cpucache import CpucacheError, Engine

TinyModel = Callable[..., Path]


@pytest.fixture
def engine(tiny: TinyModel, tmp_path: Path) -> Iterator[Engine]:
    with Engine(
        tiny("llama"), store=tmp_path / "store", sessions=tmp_path / "sessions", threads=1, n_ctx=512
    ) as opened:
        yield opened


def test_threads_take_turns(engine: Engine) -> None:
    texts = ["the sea", "a mill", "hay in the barn", "the old tin", "rain", "47"]
    one_by_one = [engine.generate(text=text, max_tokens=8).text for text in texts]
    assert len(set(one_by_one)) == len(one_by_one)

    def ask(text: str) -> list[str]:
        whole = engine.generate(text=text, max_tokens=8).text
        # A stream that another thread overtakes before its first piece is asked for.
        stream = engine.stream(text=text, max_tokens=8)
        return [whole, "".join(stream)]

    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in range(5):
            assert list(pool.map(ask, texts)) == [[text, text] for text in one_by_one]


def test_streams_of_one_thread_touch_not_one_another(engine: Engine) -> None:
    texts = ["one text", "other", "a third"]
    one_by_one = [engine.generate(text=text, max_tokens=8).text for text in texts]
    streams = [engine.stream(text=text, max_tokens=8) for text in texts]
    begun = [next(stream) for stream in streams]
    # Read to the end in another order than they were begun.
    assert [streams[index].reply().text for index in (2, 0, 1)] == [one_by_one[index] for index in (2, 0, 1)]
    assert all(text.startswith(piece) for text, piece in zip(one_by_one, begun, strict=True))


def test_sessions_of_one_engine_take_turns(engine: Engine) -> None:
    def talk(name: str, about: str) -> list[str]:
        with engine.session(name) as session:
            return [session.send(f"{about}, {number}", max_tokens=6).text for number in range(4)]

    subjects = ["the sea", "a mill", "hay", "the old tin"]
    with ThreadPoolExecutor(len(subjects)) as pool:
        together = list(pool.map(talk, [f"on {subject}" for subject in subjects], subjects))
    assert together == [talk(f"single, on {subject}", subject) for subject in subjects]


def test_a_session_that_is_closed_elsewhere_ends_its_answer(engine: Engine) -> None:
    session = engine.session("s")
    evaluated = Event()

    def told(_done: int, _total: int) -> None:
        evaluated.set()

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(session.send, "the sea " * 20, max_tokens=400, progress=told)
        assert evaluated.wait(60)
        session.close()
        reply = answer.result()
    assert reply.metrics.completion_tokens < 400
    assert reply.metrics.finish == "interrupted"
    with engine.session("s") as again:
        assert [entry.role for entry in again.entries][:1] == ["user"]


def test_a_session_may_be_closed_in_another_thread_than_it_was_opened_in(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as pool:
        session = pool.submit(engine.session, "s").result()
    with pytest.raises(CpucacheError, match="open in another window"):
        engine.session("s")
    session.close()
    with engine.session("s") as again:
        assert again.entries == []

"""Conversations go on as if they had never been interrupted: from disk, at every turn, with every architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache import Engine, Sampling
from cpucache.engine import Stream
from cpucache.errors import InputError
from tests.support import sessions
from tests.support.sessions import SYSTEM, Said, chatml, engine, message, rendered, said, sizes, truth
from tests.support.tiny import ARCHS
from tests.support.workbench import distance

Tiny = Callable[..., Path]

archs = pytest.mark.parametrize("arch", ARCHS)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

# How the answers of a conversation end: by their length, at a text to stop at, or closed by whoever reads them.
ENDINGS: list[dict[str, Any]] = [
    {"max_tokens": 7},
    {"max_tokens": 60, "sampling": Sampling(stop=LETTERS)},
    {"max_tokens": 20, "tokens": 3},
    {"max_tokens": 1},
    {"max_tokens": 40},
    {"max_tokens": 5},
]


def bare(text: str) -> str:
    """A text without control tokens."""
    return re.sub(r"<[a-z]+>|<\|[a-z_]+\|>", "", text)


def turn(running: Any, session: Any, text: str | None, *, tokens: int | None = None, **settings: Any) -> Said:
    return said(running, session.stream(text, **settings), tokens=tokens)


# ---- resumed ---------------------------------------------------------------------------------------------------------
@archs
@pytest.mark.parametrize("reopened", [True, False], ids=["reopened", "in the context"])
def test_every_turn_is_that_of_an_uninterrupted_conversation(
    arch: str, reopened: bool, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(arch)
    messages = [("system", SYSTEM)]
    unsaved = 0  # tokens that a recurrent model has to evaluate again: its state has gone on since
    with ExitStack() as opened, truth(model) as true:
        for number, ending in enumerate(ENDINGS):
            if reopened or not number:
                opened.close()
                running = opened.enter_context(engine(model, tmp_path, segment_tokens=(8, 16)))
                session = opened.enter_context(running.session("s", system=SYSTEM))
            text = message(number, words=4 + 9 * (number % 3))
            answer = turn(running, session, text, **ending)
            prompt = answer.stream.plan.tokens
            messages.append(("user", text))
            # A random model says control tokens now and then, which have no text.
            assert bare(rendered(running, prompt)) == bare(chatml(*messages))
            assert number or rendered(running, prompt) == chatml(*messages)
            messages.append(("assistant", answer.stream.text))
            new = len(prompt) - true.known(prompt)
            if number == 0:
                assert answer.fresh == len(prompt)
            elif arch == "mamba":
                assert new <= answer.fresh <= new + unsaved
            else:
                assert answer.fresh == new
            unsaved = len(answer.tokens) - (len(prompt) - new)
            true.check(arch, answer)
            assert [entry.text for entry in session.entries] == [text for _, text in messages]
        # What was said first matters, or this would show nothing.
        shortened = true.rows(answer.tokens[-12:], 1)
        assert distance(answer.rows[-1], shortened[0]) > 0.04


@archs
def test_answers_ended_in_every_way(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """The test above shows something: its answers do end as they are meant to."""
    with engine(tiny(arch), tmp_path) as running, running.session("s", system=SYSTEM) as session:
        finishes = [
            turn(running, session, message(number, words=4 + 9 * (number % 3)), **ending).stream.metrics.finish
            for number, ending in enumerate(ENDINGS[:4])
        ]
    assert finishes[1:] == ["stop", "interrupted", "length"]


@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
@pytest.mark.parametrize("system", [SYSTEM, None])
def test_a_text_that_begins_with_bos(tokenizer: str, system: str | None, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=tokenizer, add_bos=True)
    with truth(model) as true:
        for number in range(3):
            with engine(model, tmp_path) as running, running.session("s", system=system) as session:
                answer = turn(running, session, message(number), max_tokens=5)
                prompt = answer.stream.plan.tokens
                assert list(prompt).count(running.model.bos) == (prompt[0] == running.model.bos) == 1
                assert answer.fresh == len(prompt) - true.known(prompt)
                true.check("llama", answer)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba"])
def test_a_message_longer_than_a_batch(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """Blocks of it are slices of their own, and are there when the answer ends."""
    model = tiny(arch)
    with truth(model, n_ctx=4096) as true:
        for number, words in enumerate((300, 5, 250, 2)):
            with engine(model, tmp_path, n_ctx=4096) as running, running.session("s", system=SYSTEM) as session:
                answer = turn(running, session, message(number, words), max_tokens=4)
                prompt = answer.stream.plan.tokens
                if arch != "mamba":
                    assert answer.fresh == len(prompt) - true.known(prompt)
                true.check(arch, answer)


def test_with_the_types_of_keys_that_engines_have(tiny: Tiny, tmp_path: Path) -> None:
    """Resumed from disk and in the context are the same to the last bit but rounding, whatever is rounded."""
    model = tiny("llama")
    for kv_type, allowed in (("f16", 5e-3), ("q8_0", 0.1)):
        rows = []
        for reopened in (True, False):
            with ExitStack() as opened:
                for number in range(4):
                    if reopened or not number:
                        opened.close()
                        folder = tmp_path / f"{kv_type} {reopened}"
                        running = opened.enter_context(engine(model, folder, kv_type=kv_type))
                        session = opened.enter_context(running.session("s", system=SYSTEM))
                    answer = turn(running, session, message(number), max_tokens=3)
                rows.append(answer.rows[0])
        assert distance(*rows) < allowed


def test_other_prompts_in_between_do_no_harm(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path) as running, truth(model) as one, truth(model) as two:
        first, second = (running.session(name, system=SYSTEM) for name in ("first", "second"))
        for number in range(4):
            for true, session in ((one, first), (two, second)):
                answer = turn(running, session, f"{session.name} {message(number)}", max_tokens=5)
                prompt = answer.stream.plan.tokens
                # The system text is a slice that both have.
                known = true.known(prompt) or (sizes(session)[0] if session is second else 0)
                assert answer.fresh == len(prompt) - known
                true.check("llama", answer)
                running.generate(text="In between, something else.", max_tokens=3)


def test_a_turn_that_is_stopped_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path) as running, truth(model) as true, running.session("s", system=SYSTEM) as session:
        stream = session.stream(message(1), max_tokens=500)
        next(stream)
        stream.stop()
        running.generate(text="Something else.", max_tokens=2)
        assert stream.metrics.finish == "interrupted"
        assert [entry.role for entry in session.entries] == ["system", "user", "assistant"]
        assert session.entries[-1].text == stream.text
        true.rows(np.concatenate([stream.plan.tokens, stream.tokens]).astype(np.int32), 1)
        answer = turn(running, session, message(2), max_tokens=4)
        assert true.known(answer.stream.plan.tokens) == len(true.held)
        true.check("llama", answer)


def test_a_turn_that_was_never_read_is_not_kept(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running, running.session("s") as session:
        session.stream(message(1)).close()
        assert session.entries == []
        session.send(message(1), max_tokens=2)
        assert len(session.entries) == 2


def test_threads_take_turns(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running, running.session("s") as session:
        replies: dict[str, str] = {}

        def talk(first: int) -> None:
            for number in range(first, first + 5):
                replies[message(number)] = session.send(message(number), max_tokens=2).text

        with ThreadPoolExecutor(4) as threads:
            for talking in [threads.submit(talk, first) for first in range(0, 40, 10)]:
                talking.result()
        assert [entry.role for entry in session.entries] == ["user", "assistant"] * 20
        texts = [entry.text for entry in session.entries]
        assert dict(zip(texts[::2], texts[1::2], strict=True)) == replies


def test_a_turn_waits_for_the_answer_before(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running, running.session("s") as session:
        first = session.stream(message(1), max_tokens=20)
        next(first)
        second = session.stream(message(2), max_tokens=2).reply()
        assert first.metrics.completion_tokens == 20
        assert [entry.text for entry in session.entries] == [message(1), first.text, message(2), second.text]
        # What was not begun never is.
        third = session.stream(message(3), max_tokens=2)
        session.send(message(4), max_tokens=2)
        assert (list(third), third.metrics.finish) == ([], "interrupted")
        assert [entry.text for entry in session.entries[4::2]] == [message(4)]


def test_an_edit_that_never_begins_changes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(running: Engine, stream: Stream) -> None:
        """Read a stream that is stopped while its prompt is evaluated."""

        def evaluate(*arguments: Any, done: Any = running.context.evaluate) -> None:
            stream.stop()
            done(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(running.context, "evaluate", evaluate)
            assert list(stream) == []
        assert stream.metrics.finish == "interrupted"

    with engine(tiny("llama"), tmp_path) as running, running.session("s") as session:
        session.send(message(1), max_tokens=2)
        before = [entry.text for entry in session.entries]
        for ask in (partial(session.edit, 1, message(2)), session.regenerate):
            stopped(running, ask())
            assert [entry.text for entry in session.entries] == before
        # A new message is kept.
        stopped(running, session.stream(message(3)))
        assert [entry.text for entry in session.entries] == [*before, message(3)]
        assert session.unanswered
        session.regenerate(max_tokens=2).reply()
        assert [entry.role for entry in session.entries] == ["user", "assistant"] * 2


def test_closing_an_engine_ends_and_keeps_the_turn_under_way(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        stream = running.session("s").stream(message(1), max_tokens=50)
        next(stream)
    with engine(tiny("llama"), tmp_path) as running, running.session("s") as session:
        assert [entry.text for entry in session.entries] == [message(1), stream.text]


def test_a_turn_writes_only_its_own_cells(tiny: Tiny, tmp_path: Path) -> None:
    """A message and an answer: two slices, however long the conversation is."""
    seen = []
    for number in range(5):
        with engine(tiny("llama"), tmp_path) as running, running.session("s", system=SYSTEM) as session:
            session.send(message(number), max_tokens=5)
        seen.append(sessions.files(tmp_path))
    assert seen == [3, 5, 7, 9, 11]


# ---- what can't be ---------------------------------------------------------------------------------------------------
def test_another_model_another_beginning_or_a_closed_session_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        with running.session("s", system=SYSTEM) as session:
            session.send(message(1), max_tokens=2)
        with pytest.raises(InputError, match="has begun already, with another system text"):
            running.session("s", system="Something else.")
        with pytest.raises(InputError, match="when_full='never'"):
            running.session("s", when_full="never")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="closed"):
            session.send(message(2))
        with running.session("s") as session:
            with pytest.raises(InputError, match="no message to answer"):
                session.send()
            with pytest.raises(InputError, match="no message 2: there are 1 of yours"):
                session.edit(2, "x")
            with pytest.raises(TypeError, match="'warmth'"):
                session.send("x", warmth=2)  # type: ignore[call-arg]
    with engine(tiny("qwen2"), tmp_path) as running, pytest.raises(InputError, match="conversation 's' is with llama"):
        running.session("s")
    with engine(tiny("llama"), tmp_path) as running, running.session("new") as session:
        with pytest.raises(InputError, match="no answer to replace yet"):
            session.regenerate()
        assert not session.unanswered

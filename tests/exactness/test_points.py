"""Models with a recurrent state: cells by segment, the state at a few points, from which one goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpucache.runtime import Context, Run
from tests.support.sessions import engine, message, plain_spoken, said, truth
from tests.support.tiny import HYBRID_ARCHS, RECURRENT_ARCHS, WINDOW_ARCHS
from tests.support.workbench import distance, opened, some_tokens, tolerance

Tiny = Callable[..., Path]
SYSTEM = {"role": "system", "content": message(50, 30)}


def last_row(context: Context, start: int, tokens: np.ndarray) -> np.ndarray:
    context.decode([Run(0, start, tokens)], logits="last")
    return context.logits()


# ---- states ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", RECURRENT_ARCHS)
def test_cells_in_parts_and_one_state_are_all_there_is(arch: str, tiny: Tiny) -> None:
    tokens = some_tokens(120)
    with opened(tiny(arch)) as context:
        expected = last_row(context, 0, tokens)
        context.clear()
        context.decode([Run(0, 0, tokens[:90])])
        point = context.save_point(0)
        parts = []
        for begin, end in ((0, 50), (50, 90)):
            context.share(0, 5, begin, end)
            parts.append(context.save(5))
            context.remove(5)
        context.clear()
        for part in parts:
            assert context.load(5, part)
            context.share(5, 0)
            context.remove(5)
        assert context.last_position(0) == -1
        assert context.load_point(0, point)
        assert context.last_position(0) == 89
        found = last_row(context, 90, tokens[90:])
        if arch in WINDOW_ARCHS:
            # Fewer cells are there than before, so the same numbers are added in another order.
            assert distance(found, expected) < tolerance(arch, "f32")
        else:
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("arch", HYBRID_ARCHS)
def test_cells_are_saved_without_the_recurrent_state(arch: str, tiny: Tiny) -> None:
    with opened(tiny(arch, window=1000)) as context:
        context.decode([Run(0, 0, some_tokens(100))])
        half = len(context.save(0))
        context.decode([Run(0, 100, some_tokens(100))])
        # Twice the cells; of what has one size whatever is in it, next to nothing.
        assert 1.9 * half < len(context.save(0)) < 2 * half
        assert len(context.save_point(0)) < half


# ---- on disk ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", RECURRENT_ARCHS)
def test_the_disk_grows_with_the_text_and_no_faster(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """A conversation of 20 turns, sent whole each time: the cells once, and a state for each message."""
    model = plain_spoken(tiny(arch, window=4096))
    messages = [SYSTEM]
    sizes, tokens = [], []
    with engine(model, tmp_path, n_ctx=4096) as running:
        for number in range(20):
            messages.append({"role": "user", "content": message(number, 25)})
            reply = running.generate(messages, max_tokens=8)
            messages.append({"role": "assistant", "content": reply.text})
            running.store.flush()
            assert running.store.index is not None
            sizes.append(running.store.index.totals()["bytes"])
            tokens.append(reply.metrics.prompt_tokens)
        assert running.store.index is not None
        point = max(row.bytes for row in running.store.index.rows() if row.info.tokens == 0)
        context = running.context
        cells = running.host.do(lambda slot, _: _cells_of(context, tokens[-1]))
    messages_said = len(messages)
    # Each request ends before the model's answer, and each answer after it: two states a turn, and that of the system.
    assert sizes[-1] <= 1.3 * (cells + (messages_said + 2) * point)
    first, last = sizes[9] - sizes[4], sizes[19] - sizes[14]
    assert last < 1.2 * first * (tokens[19] - tokens[14]) / (tokens[9] - tokens[4])


def _cells_of(context: Context, count: int):  # type: ignore[no-untyped-def]
    """Bytes of the cells of so many tokens, in whatever pieces."""
    yield from ()
    context.clear()
    context.decode([Run(0, 0, some_tokens(count))])
    size = len(context.save(0))
    context.clear()
    return size


# ---- going on --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", RECURRENT_ARCHS)
def test_after_a_restart_the_tokens_after_the_last_message_are_evaluated(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    model = plain_spoken(tiny(arch))
    messages = [SYSTEM]
    held = 0
    with truth(model, n_ctx=4096) as true:
        for number in range(5):
            with engine(model, tmp_path, n_ctx=4096) as running:
                messages.append({"role": "user", "content": message(number, 40)})
                answer = said(running, running.stream(messages, max_tokens=8))
                true.check(arch, answer)
                assert answer.fresh == answer.stream.plan.n_tokens - held
                held = len(answer.tokens)
                messages.append({"role": "assistant", "content": answer.stream.text})


@pytest.mark.parametrize("arch", RECURRENT_ARCHS)
@pytest.mark.parametrize("reopened", [False, True], ids=["in the context", "reopened"])
def test_another_question_after_the_same_system_text(arch: str, reopened: bool, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(arch)
    with truth(model, n_ctx=4096) as true:
        running = None
        for number in range(3):
            if running is None or reopened:
                stack = engine(model, tmp_path, n_ctx=4096)
                running = stack.__enter__()
            asked = [SYSTEM, {"role": "user", "content": message(number, 10)}]
            answer = said(running, running.stream(asked, max_tokens=4))
            true.check(arch, answer)
            rest = len(running.plan(asked).tokens) - len(running.model.tokenize(SYSTEM["content"]))
            assert number == 0 or answer.fresh < rest
            if reopened:
                stack.__exit__(None, None, None)
        if not reopened:
            stack.__exit__(None, None, None)


@pytest.mark.parametrize("arch", HYBRID_ARCHS)
def test_long_text_has_a_state_now_and_then(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """So that text which differs late is not evaluated from its beginning."""
    text = message(1, 800)
    with engine(tiny(arch), tmp_path, n_ctx=4096) as running:
        running.generate(text=text, max_tokens=1)
    with engine(tiny(arch), tmp_path, n_ctx=4096) as running, truth(tiny(arch), n_ctx=4096) as true:
        answer = said(running, running.stream(text=text[: len(text) * 9 // 10] + " And then?", max_tokens=2))
        true.check(arch, answer)
        assert answer.stream.plan.n_tokens > 2048
        assert answer.fresh < 1024 + 512


@pytest.mark.parametrize("arch", RECURRENT_ARCHS)
def test_a_state_that_is_gone_is_evaluated_again(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny(arch), tmp_path) as running:
        first = said(running, running.stream(text=message(1, 100), max_tokens=3))
        running.store.flush()
        for row in running.store.index.rows() if running.store.index else ():
            if row.info.tokens == 0:
                running.store.discard(row.key)
    with engine(tiny(arch), tmp_path) as running, truth(tiny(arch)) as true:
        again = said(running, running.stream(text=message(1, 100), max_tokens=3))
        true.check(arch, again)
        assert again.fresh == first.fresh
    with engine(tiny(arch), tmp_path) as running:
        assert said(running, running.stream(text=message(1, 100), max_tokens=3)).fresh == 1


@pytest.mark.parametrize("arch", RECURRENT_ARCHS)
def test_a_session_goes_back_by_loading_only_a_state(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """The cells before what is left out stay where they are: one state is read, and no cells."""
    model = plain_spoken(tiny(arch))
    with engine(model, tmp_path) as running, truth(model) as true:
        session = running.session("s", system=SYSTEM["content"])
        for number in range(4):
            said(running, session.stream(message(number, 20), max_tokens=5))
        read: list[str] = []
        get = running.store.get

        def noting(key: str) -> object:
            read.append(key)
            return get(key)

        running.store.get = noting  # type: ignore[method-assign, assignment]
        edited = said(running, session.edit(3, "Something else?", max_tokens=4))
        true.check(arch, edited)
        assert edited.fresh < 40
        running.store.flush()
        assert running.store.index is not None
        tokens = {row.key: row.info.tokens for row in running.store.index.rows()}
        assert [tokens[key] for key in read] == [0]

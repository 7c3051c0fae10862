"""Models with sliding windows: what may be cut, shared and saved, and when what a window held has been overwritten."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cpucache.runtime import Run
from cpucache.runtime.context import Bytes
from tests.support.sessions import engine, message, plain_spoken, said, truth
from tests.support.tiny import HYBRID_ARCHS, WINDOW_ARCHS
from tests.support.workbench import bench, chain, distance, opened, plan_of, some_tokens, tolerance

Tiny = Callable[..., Path]
WINDOW = 16

archs = pytest.mark.parametrize("arch", WINDOW_ARCHS)


@archs
def test_what_a_window_has_lost_is_noticed(arch: str, tiny: Tiny) -> None:
    """A sequence is whole up to a position if, and only if, it can be gone on from there."""
    tokens, found = some_tokens(760), set()
    ends = (10, 100, 200, 290, 300, 350, 450, 600, 700, 749, 750)
    states = {}
    with opened(tiny(arch)) as context, opened(tiny(arch)) as truth:
        context.decode([Run(1, 0, tokens[:300])])
        for begin, end in pairwise((0, *ends)):
            context.decode([Run(0, begin, tokens[begin:end])])
            states[end] = context.save_point(0)
            if end == 300:
                # What comes is written before what is there, and then over what a window has left.
                context.remove(1)
        for end in reversed(ends):
            context.share(0, 2, 0, end)
            if context.memory.points:
                context.load_point(2, states[end])
            whole = context.whole(2, end, min(end, WINDOW))
            found.add(whole)
            if context.last_position(2) == end - 1:
                context.decode([Run(2, end, tokens[end : end + 5])], logits="last")
                truth.clear()
                truth.decode([Run(0, 0, tokens[: end + 5])], logits="last")
                exact = distance(context.logits(), truth.logits()) < tolerance(arch, "f32")
                assert exact == whole, end
            else:
                assert not whole
            context.remove(2)
    assert found == {True, False}


@archs
def test_a_slice_whose_window_is_lost_is_not_saved(arch: str, tiny: Tiny) -> None:
    """What was evaluated beside another sequence, and overwritten since, is evaluated again rather than saved."""
    tokens = some_tokens(800)
    with bench(tiny(arch)) as b:
        desk, slices = b.kv_cache, chain(np.split(tokens[:700], range(50, 700, 50)))
        b.prefill(plan_of(tokens[:10]))
        desk.context.decode([Run(20, 0, tokens[:300])])
        desk.append(tokens[10:300])
        desk.context.remove(20)
        desk.append(tokens[300:700])
        saved = desk.capture(desk.only, slices)
        there = [slice_ for slice_ in slices if slice_.key in desk.store]
        assert saved and 0 < len(there) < len(slices)
        for count in range(1, len(slices) + 1):
            plan = plan_of(*slices[:count], tokens[50 * count : 50 * count + 7])
            desk.reset()
            assert distance(b.logits(plan), b.full(plan.tokens)) < tolerance(arch, "f32")


@archs
def test_cells_that_the_window_has_left_are_not_loaded(arch: str, tiny: Tiny) -> None:
    """Of window layers only those of the last window, from which one goes on, and back, exactly."""
    tokens = some_tokens(420)
    with bench(tiny(arch)) as b:
        desk, slices = b.kv_cache, chain(np.split(tokens[:400], range(50, 400, 50)))
        desk.encode(slices)
        desk.reset()
        sizes: list[int] = []
        load = desk.context.load

        def noting(sequence: int, state: Bytes) -> bool:
            sizes.append(len(state))
            return load(sequence, state)

        desk.context.load = noting  # type: ignore[method-assign]
        for count in (8, 7, 3, 8):
            plan = plan_of(*slices[:count], tokens[50 * count : 50 * count + 20])
            assert distance(b.logits(plan), b.full(plan.tokens)) < tolerance(arch, "f32")
        saved = [desk.store.get(slice_.key) for slice_ in slices]
        *before, last = sizes[: len(slices)]
        assert max(before) < min(len(state) for state in saved if state is not None) == last


@pytest.mark.parametrize("arch", [arch for arch in WINDOW_ARCHS if arch not in HYBRID_ARCHS])
def test_a_session_goes_back_within_the_context(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """Nothing but the new message is evaluated, and nothing is loaded."""
    model = plain_spoken(tiny(arch))
    with engine(model, tmp_path) as running, truth(model) as true:
        session = running.session("s")
        for number in range(4):
            said(running, session.stream(message(number, 20), max_tokens=5))
        reads: list[str] = []
        get = running.store.get

        def noting(key: str) -> object:
            reads.append(key)
            return get(key)

        running.store.get = noting  # type: ignore[method-assign, assignment]
        edited = said(running, session.edit(3, "Something else?", max_tokens=4))
        true.check(arch, edited)
        assert not reads
        assert edited.fresh < 40


@archs
def test_the_disk_grows_with_the_text_and_no_faster(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """Each cell of a layer is saved once at most, however often a conversation is sent again."""
    model = plain_spoken(tiny(arch))
    messages: list[dict[str, str]] = []
    sizes: list[int] = []
    tokens: list[int] = []
    for begin in range(0, 20, 5):
        with engine(model, tmp_path, n_ctx=4096) as running:
            for number in range(begin, begin + 5):
                messages.append({"role": "user", "content": message(number, 25)})
                reply = running.generate(messages, max_tokens=8)
                messages.append({"role": "assistant", "content": reply.text})
            running.store.flush()
            assert running.store.index is not None
            sizes.append(int(running.store.index.totals()["bytes"]))
            tokens.append(reply.metrics.prompt_tokens)
            states = sum(row.bytes for row in running.store.index.rows() if row.info.tokens == 0)
    with opened(model, n_ctx=4096) as context:
        context.decode([Run(0, 0, some_tokens(tokens[-1]))])
        context.share(0, 1, 0, WINDOW)
        some, every = len(context.save(1)), len(context.save(0))
        base = (every - some) / (tokens[-1] - WINDOW)  # bytes of a token in layers without a window
    # Of layers with a window no more than the last cells of each segment are kept.
    assert base * tokens[-1] < sizes[-1] - states < 1.1 * some / WINDOW * tokens[-1]
    first, last = sizes[1] - sizes[0], sizes[3] - sizes[2]
    assert last < 1.2 * first * (tokens[3] - tokens[2]) / (tokens[1] - tokens[0])

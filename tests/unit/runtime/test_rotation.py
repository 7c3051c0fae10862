"""Saved states that are moved before they are loaded are the states that llama.cpp's own shift gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from cpucache.reuse.plan import Plan, Slice, Span
from cpucache.reuse.splicer import Splicer
from cpucache.runtime import Context, Model, Run
from cpucache.runtime.context import Bytes
from cpucache.runtime.layout import Layout, UnknownLayout
from cpucache.runtime.model import Tokens
from cpucache.runtime.rotation import _DELTAS, Floats, _fit, _rotate, learn
from tests.support.tiny import BYTES
from tests.support.workbench import drive

TinyModel = Callable[..., Path]

START = 300
YARN, LINEAR = gguf.RopeScalingType.YARN, gguf.RopeScalingType.LINEAR


def some_tokens(count: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(BYTES, BYTES + 256, count, np.int32)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Context]:
    with Model(path) as model:
        context = Context(model, n_threads=1, **{"n_ctx": 1024, **options})
        try:
            yield context
        finally:
            context.close()


def saved(context: Context, count: int = 100) -> Bytes:
    context.decode([Run(0, START, some_tokens(count))])
    state = context.save(0)
    context.clear()
    return state


def shifted(context: Context, state: Bytes, delta: int) -> Bytes:
    """A state as llama.cpp moves it. The context is left empty."""
    assert context.load(0, state)
    context.shift(0, delta)
    context.decode([Run(1, 0, some_tokens(1))])
    moved = context.save(0)
    context.clear()
    return moved


ROTARY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_factors": True}),
    ("qwen2", {}),
    ("qwen2", {"rope_base": 1e6}),
    ("qwen2", {"rope_scaling": LINEAR}),
    ("falcon", {}),
    ("mpt", {}),
]


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("flash", ["off", "on"])
@pytest.mark.parametrize(("arch", "settings"), ROTARY, ids=str)
def test_a_state_moved_here_is_what_llama_cpp_gives(
    tiny: TinyModel, arch: str, settings: dict[str, Any], kv_type: str, flash: str
) -> None:
    with opened(tiny(arch, **settings), kv_type=kv_type, flash=flash) as context:
        state = saved(context)
        before = state.copy()
        rotation = learn(context, state)
        assert rotation
        # Moved ones are what the next prompts move by as much as they are loaded: at any distance, either way.
        for delta in (1, -1, -START, 777, 3000):
            moved, expected = rotation.moved(state, delta), shifted(context, state, delta)
            assert moved is not None
            layout = Layout(expected)
            kept = np.ones(len(state), bool)
            for keys in layout.keys:
                kept[keys.start : keys.end] = False
                ours, theirs = keys.of(moved).astype(float), keys.of(expected).astype(float)
                rounded = 1e-3 if kv_type == "f16" else 2e-4
                assert np.abs(ours - theirs).max() <= rounded * np.abs(theirs).max()
            assert (moved[kept] == expected[kept]).all(), "positions and values"
        assert (state == before).all()


@pytest.mark.parametrize(("arch", "settings"), [*ROTARY, ("qwen2", {"rope_scaling": YARN})], ids=str)
def test_a_state_moved_here_is_what_is_evaluated_there(tiny: TinyModel, arch: str, settings: dict[str, Any]) -> None:
    # Not what llama.cpp's shift gives under YaRN: that scales keys a second time.
    with opened(tiny(arch, **settings), kv_type="f32") as context:
        state = saved(context)
        rotation = learn(context, state)
        assert rotation
        for delta in (-START, 777):
            moved = rotation.moved(state, delta)
            assert moved is not None
            context.decode([Run(0, START + delta, some_tokens(100))])
            expected = context.save(0)
            context.clear()
            for keys in Layout(expected).keys:
                assert np.abs(keys.of(moved) - keys.of(expected)).max() <= 5e-4 * np.abs(keys.of(expected)).max()


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_rounding_is_all_that_logits_show_of_a_move(tiny: TinyModel, kv_type: str) -> None:
    with opened(tiny("qwen2"), kv_type=kv_type) as context:
        state = saved(context)
        rotation = learn(context, state)
        assert rotation
        moved = rotation.moved(state, 500)
        assert moved is not None
        rows = []
        for each in (moved, shifted(context, state, 500), state):
            assert context.load(0, each)
            context.decode([Run(0, context.last_position(0) + 1, some_tokens(3, seed=1))], logits="last")
            rows.append(context.logits())
            context.clear()
        # The last one stands elsewhere, as a whole: distances are the same.
        assert np.abs(rows[0] - rows[1]).max() < 5e-3
        assert np.abs(rows[0] - rows[2]).max() < 5e-3


@pytest.mark.parametrize(
    ("arch", "options"),
    [("gemma3", {}), ("mamba", {}), ("llama", {"kv_type": "q8_0"}), ("llama", {"n_ctx": 8192})],
    ids=["window", "recurrent", "quantized keys", "longer than trained"],
)
def test_what_is_not_known_is_left_to_llama_cpp(tiny: TinyModel, arch: str, options: dict[str, Any]) -> None:
    with opened(tiny(arch), **options) as context:
        assert learn(context, saved(context)) is None


def test_states_of_another_layout_are_left_to_llama_cpp(tiny: TinyModel) -> None:
    with opened(tiny("llama")) as context, opened(tiny("llama", n_layer=2)) as other:
        state = saved(context)
        rotation = learn(context, state)
        assert rotation
        broken = [state[:-1], state[:30], np.append(state, state[:4]), np.zeros(len(state), np.uint8)]
        two_streams, two_sequences = state.copy(), state.copy()
        two_streams[8:12].view("<u4")[0] = 2
        two_sequences[20:24].view("<u4")[0] = 2
        for each in (*broken, two_streams, two_sequences):
            assert learn(context, each) is None
            assert rotation.moved(each, 5) is None
        assert rotation.moved(saved(other), 5) is None


Of = Callable[[np.ndarray], np.ndarray]


def turned(angle: Of, scale: Of = np.ones_like) -> tuple[Floats, Floats]:
    """Keys of two heads of 8 floats before and after moves; ``angle`` gives that of a distance for the first pair."""
    before = np.random.default_rng(0).standard_normal((len(_DELTAS), 4, 16), np.float32)
    heads = before.reshape(len(_DELTAS), 4, 2, 2, 4)
    deltas = np.array(_DELTAS, float)[:, None, None, None]
    pairs = (
        (heads[..., 0, :] + 1j * heads[..., 1, :]) * np.exp(1j * angle(deltas) * 0.5 ** np.arange(4)) * scale(deltas)
    )
    return before, np.stack([pairs.real, pairs.imag], axis=3).astype(np.float32).reshape(before.shape)


def test_keys_that_turn_in_another_way_are_not_taken_for_known() -> None:
    fit = _fit(*turned(lambda delta: 0.9 * delta), None)
    assert fit and fit.halves
    assert np.abs(fit.angles - 0.9 * 0.5 ** np.arange(4)).max() < 1e-6
    for strange in (
        turned(lambda delta: 0.9 * np.abs(delta) ** 0.9),
        turned(lambda delta: 0.9 * np.abs(delta)),
        turned(lambda delta: 0.9 * delta, lambda delta: 1 + delta / 100),
    ):
        with pytest.raises(UnknownLayout):
            _fit(*strange, None)
        with pytest.raises(UnknownLayout):
            _fit(*strange, fit)
    before, after = turned(lambda delta: 0.9 * delta)
    after[..., 3] = before[..., 3]
    with pytest.raises(UnknownLayout):
        _fit(before, after, None)


@pytest.mark.parametrize("halves", [True, False])
def test_parts_of_heads_may_turn(halves: bool) -> None:
    # Heads of 12 floats, of which those from the third to the tenth turn.
    before, after = np.random.default_rng(0).standard_normal((2, len(_DELTAS), 4, 2, 12), np.float32)
    after[..., :2], after[..., 10:] = before[..., :2], before[..., 10:]
    shape = (2, 4) if halves else (4, 2)
    axis = 3 if halves else 4
    one, other = np.moveaxis(before[..., 2:10].reshape(len(_DELTAS), 4, 2, *shape), axis, 0)
    angles = 0.3 ** np.arange(4) * np.array(_DELTAS)[:, None, None, None]
    pairs = (one + 1j * other) * np.exp(1j * angles)
    after[..., 2:10] = np.stack([pairs.real, pairs.imag], axis=axis).reshape(*pairs.shape[:3], 8)
    before, after = before.reshape(len(_DELTAS), 4, 24), after.reshape(len(_DELTAS), 4, 24)
    fit = _fit(before, after, None)
    assert fit and (fit.period, fit.begin, fit.size, fit.halves) == (12, 2, 8, halves)
    for rows, expected, delta in zip(before, after, _DELTAS, strict=True):
        ours = np.zeros_like(rows)
        _rotate(rows, ours, fit, delta)
        assert np.abs(ours - expected).max() < 1e-3


@pytest.mark.parametrize(("kv_type", "at_once"), [("f16", True), ("q8_0", False)])
def test_a_slice_spliced_elsewhere_leaves_nothing_for_llama_cpp_to_move(
    tiny: TinyModel, kv_type: str, at_once: bool
) -> None:
    with opened(tiny("qwen2"), kv_type=kv_type) as context:
        state = saved(context)
        slice_ = Slice("key", some_tokens(100), START, "", (), 0)
        splicer = Splicer(context)
        (slot,) = splicer.slots
        # The first 60 tokens of it.
        drive(context, splicer.build(slot, Plan((Span(10, slice_.tokens[:60], slice_),)), lambda _: state))
        spliced = context.save(0)
        drive(context, splicer.append(slot, some_tokens(3, seed=1)))
        logits = context.logits()
        splicer.reset(slot)
        expected = shifted(context, state, 10 - START)
        assert context.load(0, expected)
        context.remove(0, 70)
        if at_once:
            expected = context.save(0)
            for keys in Layout(expected).keys:
                ours, theirs = keys.of(spliced).astype(float), keys.of(expected).astype(float)
                assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()
        context.decode([Run(0, 70, some_tokens(3, seed=1))], logits="last")
        assert np.abs(logits - context.logits()).max() < 5e-3

"""States packed for the disk: half or a quarter as large, near to what they were, and never taken for another kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.runtime import Run
from cpucache.runtime.context import Bytes
from cpucache.runtime.layout import Layout
from cpucache.runtime.packing import AtRest, Packing
from tests.support.tries import tries
from tests.support.workbench import opened, some_tokens

Tiny = Callable[..., Path]

# What a float may be off, of the largest of its group: half a step, in 4 bits one of them, and roundings to f16.
STEPS: dict[AtRest, float] = {"q8_0": 1 / 254 + 1e-3, "q4_0": 1 / 8 + 1e-3}
kinds = pytest.mark.parametrize("kind", STEPS)


def state_of(path: Path, tokens: int, kv_type: str = "f16") -> Bytes:
    with opened(path, kv_type) as context:  # type: ignore[arg-type]
        context.decode([Run(0, 0, some_tokens(tokens))])
        return context.save(0)


def floats(state: Bytes) -> list[np.ndarray]:
    layout = Layout(state)
    return [block.of(state) for block in (*layout.keys, *layout.values)]


# ---- states ----------------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("tokens", [1, 31, 33, 200])
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_a_state_is_near_to_what_it_was(kind: AtRest, tokens: int, kv_type: str, tiny: Tiny) -> None:
    state = state_of(tiny("llama"), tokens, kv_type)
    packing = Packing(kind, 2)
    packed = packing.pack(state)
    again = packing.unpack(packed)
    assert len(again) == len(state)
    for one, other in zip(floats(state), floats(again), strict=True):
        largest = np.abs(one.astype(np.float32)).max()
        assert 0 < np.abs(one.astype(np.float32) - other.astype(np.float32)).max() <= STEPS[kind] * largest
    # What is no float is as it was: with zeros instead of floats, both are equal.
    for each in (*floats(state), *floats(again)):
        each[:] = 0
    assert again.tolist() == state.tolist()
    if tokens == 200:
        width = 4 if kv_type == "f32" else 2
        assert len(packed) / len(state) < {"q8_0": 1.2, "q4_0": 0.7}[kind] / width


@kinds
@tries(100)
@given(st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=100))
def test_any_floats_come_back_within_a_step(kind: AtRest, values: list[float]) -> None:
    """Also those of a state that is crafted: one cell, one layer, as many values as drawn."""
    numbers = np.array(values, "<f2")
    parts = [
        *(np.array(each, "<u4") for each in ([7, 7, 1, 1], [0, 1, 0], [1, 1], [1, 2 * len(numbers), 0])),
        numbers,
        *(np.array(each, "<u4") for each in ([1, 2, len(numbers)],)),
        numbers,
    ]
    state = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts])
    packing = Packing(kind)
    again = packing.unpack(packing.pack(state))
    for one, other in zip(floats(state), floats(again), strict=True):
        flat, back = one.astype(np.float64).reshape(-1), other.astype(np.float64).reshape(-1)
        for begin in range(0, len(flat), 32):
            group, found = flat[begin : begin + 32], back[begin : begin + 32]
            largest = np.abs(group).max()
            # The scale is a float of 16 bits itself, off by half of 2**-24 where it is as small as they get.
            assert np.abs(group - found).max() <= STEPS[kind] * largest + 127 * 2.0**-25


@kinds
def test_what_is_no_such_state_is_returned_unchanged(kind: AtRest, tiny: Tiny) -> None:
    packing = Packing(kind)
    for state in (np.arange(200, dtype=np.uint8), np.zeros(0, np.uint8), state_of(tiny("mamba"), 20, "f32")):
        assert packing.pack(state) is state
        assert packing.unpack(state) is state


@kinds
def test_a_packed_state_that_was_cut_is_an_error(kind: AtRest, tiny: Tiny) -> None:
    packing = Packing(kind)
    packed = packing.pack(state_of(tiny("llama"), 20))
    for size in (len(packed) - 1, len(packed) // 2, 24, 30):
        with pytest.raises(ValueError):
            packing.unpack(packed[:size])

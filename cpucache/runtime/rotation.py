"""Moves saved states to other positions: rotates their keys in memory, before llama.cpp reads them.

``Context.shift`` rotates all cells of the llama.cpp context, however few have moved. The cost of a rotation here
depends only on the size of the state. The angles are learnt from llama.cpp, which knows each model's variant of RoPE:
random keys are shifted in a small llama.cpp context of the same model, and the angles are computed from the result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cpucache.errors import ContextFull, CpucacheError
from cpucache.runtime.context import Bytes, Context, Run
from cpucache.runtime.layout import CELL, F32, HEAD, Layout, UnknownLayout

log = logging.getLogger(__name__)

_CELLS = 4  # random cells for each shift
_ROOM = 256  # cells of the smallest context that llama.cpp creates; ``_shifted`` fills it
_POWERS = [1 << power for power in range(13)]
_CHECKS = [-1, -1777, 3001]
# Shifts evaluated by llama.cpp: the angles are computed from the powers of two and checked with the rest.
_DELTAS = [*_POWERS, *_CHECKS]
# Maximum error of a key of size 1. llama.cpp computes angles as 32-bit floats: 3e-4 at a distance of 4,096. Rounding to
# f16 adds up to 5e-4.
_TOLERANCE = 1e-3
# Floats rotated at a time, so that they fit into a core's cache.
_CHUNK = 1 << 16

Floats = npt.NDArray[np.float32]
Angles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Turn:
    """Rotation of one layer's keys.

    A row of keys consists of parts of ``period`` floats. In each part, ``size`` floats from ``begin`` on are rotated,
    in pairs: adjacent floats, or with ``halves``, floats of the two halves of a head. ``angles`` holds the angle of
    each pair of a head for a shift by one position.
    """

    period: int
    begin: int
    size: int
    halves: bool
    angles: Angles

    def moving(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """View of the rotated floats of ``rows``: ``[n_rows, n_parts, size]``."""
        return rows.reshape(len(rows), -1, self.period)[:, :, self.begin : self.begin + self.size]

    def turn(self, floats: Floats, delta: int) -> None:
        """Rotates contiguous floats of ``moving`` in place, by ``delta`` positions."""
        angles = self.angles * delta
        if not self.halves:
            floats.view(np.complex64).reshape(-1, len(angles))[:] *= np.exp(1j * angles).astype(np.complex64)
            return
        heads = floats.reshape(-1, 2, len(angles))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        crossed = heads[:, ::-1] * np.stack([-sin, sin])
        heads *= cos
        heads += crossed


class Rotation:
    """Moves saved states of one llama.cpp context."""

    def __init__(self, turns: Sequence[_Turn | None], threads: int) -> None:
        self._turns = turns
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)  # its threads end when it is collected

    def moved(self, state: Bytes, delta: int) -> Bytes | None:
        """Copy of ``state`` with all cells moved by ``delta`` positions; ``None`` if its layout is unexpected."""
        try:
            layout = Layout(state)
        except UnknownLayout as why:
            log.debug("a state is shifted by llama.cpp: %s", why)
            return None
        if len(layout.keys) != len(self._turns) or not layout.plain:
            return None
        out = np.empty_like(state)
        first = layout.keys[0].start
        out[:first] = state[:first]
        out[HEAD : HEAD + layout.count * CELL.itemsize].view(CELL)["position"] += delta

        def move(layers: range) -> None:
            for layer in layers:
                keys, values = layout.keys[layer], layout.values[layer]
                # Includes the 12 bytes before each block: its type and size.
                for block in (keys, values):
                    out[block.start - 12 : block.start] = state[block.start - 12 : block.start]
                out[values.start : values.end] = state[values.start : values.end]
                _rotate(keys.of(state), keys.of(out), self._turns[layer], delta)

        shares = [range(first, len(self._turns), self._threads) for first in range(self._threads)]
        list(self._pool.map(move, shares))
        return out


def _rotate(source: npt.NDArray[np.floating], target: npt.NDArray[np.floating], turn: _Turn | None, delta: int) -> None:
    if turn is None or turn.size < turn.period:
        target[:] = source
    if turn is None:
        return
    step = max(1, _CHUNK // source.shape[1])
    for begin in range(0, len(source), step):
        rows = slice(begin, begin + step)
        floats = np.array(turn.moving(source[rows]), np.float32, order="C")
        turn.turn(floats, delta)
        turn.moving(target[rows])[:] = floats


# ---- learning --------------------------------------------------------------------------------------------------------


def learn(context: Context, state: Bytes) -> Rotation | None:
    """Learns the rotation of keys in states of ``context``; ``state`` is an example.

    Returns ``None`` if states have an unknown layout or keys rotate in an unknown way.
    """
    model = context.model
    # Beyond the context length of their original training, some models rotate keys in another way.
    trained = int(model.meta(f"{model.architecture}.rope.scaling.original_context_length") or model.n_ctx_train)
    try:
        if not context.memory.moves or context.memory.window or model.gpu_layers or context.n_ctx > trained:
            raise UnknownLayout("a kind of model or context whose keys only llama.cpp rotates")
        layout = Layout(state)
        turns = list(_learn(context, state, layout))
        if model.rotary and not any(turns):
            raise UnknownLayout("no key rotates")
    except (UnknownLayout, CpucacheError) as why:
        log.debug("states are shifted by llama.cpp: %s", why)
        return None
    return Rotation(turns, context.n_threads)


def _learn(context: Context, state: Bytes, like: Layout) -> Iterator[_Turn | None]:
    before, after = _shifted(context, like, state[:8])
    known: _Turn | None = None
    for keys, shifted in zip(before, after, strict=True):
        known = _fit(keys, shifted, known)
        yield known


def _shifted(context: Context, like: Layout, head: Bytes) -> tuple[list[Floats], list[Floats]]:
    """Random keys of each layer before and after llama.cpp's shifts by ``_DELTAS``: ``[n_shifts, n_cells, width]``."""
    random = np.random.default_rng(0)
    before = [random.standard_normal((len(_DELTAS), _CELLS, keys.shape[1]), np.float32) for keys in like.keys]
    # With flash attention, values have the same layout as keys, which saves time.
    small = Context(context.model, n_ctx=_ROOM, n_threads=context.n_threads, kv_type="f32", flash="on")
    try:
        # llama.cpp rotates keys before it evaluates, and evaluates nothing if no cell is free: so fill all cells.
        spare = small.n_ctx - len(_DELTAS) * _CELLS
        crafted = [[keys[sequence] for keys in before] for sequence in range(len(_DELTAS))]
        crafted.append([np.zeros((spare, keys.shape[1]), np.float32) for keys in like.keys])
        for sequence, keys in enumerate(crafted):
            if not small.load(sequence, _craft(head, like, keys)):
                raise UnknownLayout("llama.cpp refuses a test state")
        for sequence, delta in enumerate(_DELTAS):
            small.shift(sequence, delta)
        try:
            small.decode([Run(len(crafted), 0, np.array([context.model.filler], np.int32))])
        except ContextFull:
            pass
        else:
            raise UnknownLayout("a full context accepts more tokens")
        saved = [small.save(sequence) for sequence in range(len(_DELTAS))]
    finally:
        small.close()
    after = [np.stack([keys.of(state) for state in saved]) for keys in Layout(saved[0]).keys]
    return before, after


def _craft(head: Bytes, like: Layout, keys: Sequence[Floats]) -> Bytes:
    """Builds an f32 state with ``keys`` and values of 0, with the widths of ``like``."""
    count = len(keys[0])
    cells = np.zeros(count, CELL)
    cells["position"] = np.arange(count) - min(_DELTAS)
    cells["sequences"] = 1
    parts = [head, np.array([1, count], "<u4"), cells, np.array([0, len(keys)], "<u4")]
    widths = [values.shape[0 if like.transposed else 1] for values in like.values]
    for rows in (*keys, *(np.zeros((count, width), np.float32) for width in widths)):
        parts += [np.array([F32, rows.itemsize * rows.shape[1], 0], "<u4"), rows]
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


def _fit(before: Floats, after: Floats, guess: _Turn | None) -> _Turn | None:
    """Rotation of a layer's keys; ``None`` if they do not rotate. ``guess``: rotation of another layer, tried first."""
    turning = np.flatnonzero((before != after).any(axis=(0, 1)))
    if not len(turning):
        return None
    width = before.shape[-1]
    # The rotated floats must form runs of equal size and equal distance.
    ends = [index for index, (one, other) in enumerate(pairwise(turning)) if other != one + 1]
    starts = turning[[0, *(end + 1 for end in ends)]]
    sizes = np.diff([0, *(end + 1 for end in ends), len(turning)])
    period = int(width // len(starts))
    begin, size = int(starts[0]), int(sizes[0])
    regular = (sizes == size).all() and (starts == begin + period * np.arange(len(starts))).all()
    if not regular or width % period or begin + size > period or size % 2:
        raise UnknownLayout("rotated floats at irregular places")
    # Candidate head sizes divide ``size``; that of another layer is tried first. With pairs of adjacent floats, one
    # size covers all heads.
    shapes = [(True, size // parts) for parts in range(1, size // 2 + 1) if size % (2 * parts) == 0] + [(False, size)]
    if guess is not None:
        shapes.insert(0, (guess.halves, 2 * len(guess.angles)))
    for halves, head in shapes:
        angles = None if size % head else _angles(halves, head, before[..., turning], after[..., turning])
        if angles is not None:
            return _Turn(period, begin, size, halves, angles)
    raise UnknownLayout("keys that don't rotate by an angle for each position")


def _angles(halves: bool, head: int, before: Floats, after: Floats) -> Angles | None:
    """Angle of each pair of a head for one position, in radians; ``None`` if pairs of this shape do not fit."""
    pairs = [_pairs(floats, halves, head) for floats in (before, after)]
    turned = (pairs[1] * pairs[0].conj()).sum(axis=1) / (np.abs(pairs[0]) ** 2).sum(axis=1)
    angles: Angles = np.angle(turned[0])
    for power, measured in zip(_POWERS, turned, strict=False):
        # Smaller shifts determine the number of full turns; larger shifts determine the fraction more precisely.
        angles = angles + np.angle(measured * np.exp(-1j * angles * power)) / power
    # With YaRN, llama.cpp scales keys by a constant again at every shift. That scale is measured here and left out.
    scale = np.abs(turned).mean()
    expected = scale * pairs[0] * np.exp(1j * angles * np.array(_DELTAS)[:, None])[:, None]
    return angles if (np.abs(pairs[1] - expected) <= _TOLERANCE * np.maximum(1, np.abs(expected))).all() else None


def _pairs(floats: Floats, halves: bool, head: int) -> npt.NDArray[np.complex128]:
    """Pairs as complex numbers: ``[n_shifts, n_cells * n_heads, head // 2]``."""
    shape = (2, head // 2) if halves else (head // 2, 2)
    parts = floats.reshape(len(floats), -1, *shape).astype(np.float64)
    one, other = np.moveaxis(parts, 2 if halves else 3, 0)
    pairs: npt.NDArray[np.complex128] = one + 1j * other
    return pairs

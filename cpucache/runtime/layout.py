"""Layout of saved states: offsets of each layer's keys and values, as llama.cpp writes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpucache.runtime.context import Bytes

F32, F16 = 0, 1  # GGML_TYPE_F32, GGML_TYPE_F16 (ggml.h)
FLOATS: dict[int, np.dtype[np.floating]] = {F32: np.dtype("<f4"), F16: np.dtype("<f2")}
CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
# Models with positions in several dimensions (M-RoPE) write two more of them, and the token (llama_kv_cell_ext).
_WIDE_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("more", "<i4", 3), ("sequence", "<i4")])
HEAD = 16
"""Bytes before the cells: kind of the state, its sequence, number of streams, number of cells."""
_MOST_LAYERS = 1 << 16


class UnknownLayout(Exception):
    """A state has an unexpected layout; the message says why."""


@dataclass(frozen=True)
class Block:
    """Location of one layer's keys or values in a state: ``shape`` floats of ggml ``type`` from byte ``start``."""

    start: int
    type: int
    shape: tuple[int, int]

    @property
    def end(self) -> int:
        """Offset of the byte after the last float."""
        return self.start + self.shape[0] * self.shape[1] * FLOATS[self.type].itemsize

    def of(self, state: Bytes) -> npt.NDArray[np.floating]:
        """The floats of this block, as a view of ``state``."""
        return state[self.start : self.end].view(FLOATS[self.type]).reshape(self.shape)


class Layout:
    """Offsets of keys and values in a state, as ``llama_kv_cache::state_write`` writes it. Raises ``UnknownLayout``.

    The state of a sliding-window model holds two caches in a row: ``count`` (number of cells) and ``transposed`` belong
    to the first.
    """

    def __init__(self, state: Bytes) -> None:
        self._state = state
        self._at = 0
        self.keys: list[Block] = []
        self.values: list[Block] = []
        self.plain = True
        """Whether each cell has one position (no M-RoPE)."""
        self._take(8)
        self.count, self.transposed = self._cache()
        while self._at < len(state):
            self._cache()

    def _cache(self) -> tuple[int, int]:
        """Reads one cache; returns its number of cells and whether its values are transposed (0 or 1)."""
        streams, self._cells = self._numbers(2)
        if streams != 1 or not self._cells:
            raise UnknownLayout(f"a state of {streams} streams and {self._cells} cells")
        at = self._at
        for kind in (CELL, _WIDE_CELL):
            self._at = at
            cells = self._take(self._cells * kind.itemsize).view(kind)
            transposed, layers = self._numbers(2)
            if (cells["sequences"] == 1).all() and transposed <= 1 and layers <= _MOST_LAYERS:
                break
        else:
            raise UnknownLayout("cells that are not as expected")
        self.plain &= kind is CELL
        self.keys += [self._by_cell() for _ in range(layers)]
        self.values += [self._by_value() if transposed else self._by_cell() for _ in range(layers)]
        return self._cells, transposed

    def _take(self, size: int) -> Bytes:
        taken = self._state[self._at : self._at + size]
        if len(taken) != size:
            raise UnknownLayout("a state that ends early")
        self._at += size
        return taken

    def _numbers(self, count: int) -> list[int]:
        return [int(number) for number in self._take(4 * count).view("<u4")]

    def _by_cell(self) -> Block:
        """Block with a row of floats for each cell: ``[n_cells, width]``."""
        type_, row, high = self._numbers(3)
        if high or type_ not in FLOATS or row % FLOATS[type_].itemsize:
            raise UnknownLayout(f"rows of {row} bytes of type {type_}")
        return self._block(type_, (self._cells, row // FLOATS[type_].itemsize))

    def _by_value(self) -> Block:
        """Block with transposed values: ``[width, n_cells]``."""
        type_, size, width = self._numbers(3)
        if type_ not in FLOATS or size != FLOATS[type_].itemsize:
            raise UnknownLayout(f"values of {size} bytes of type {type_}")
        return self._block(type_, (width, self._cells))

    def _block(self, type_: int, shape: tuple[int, int]) -> Block:
        block = Block(self._at, type_, shape)
        self._take(block.end - block.start)
        return block

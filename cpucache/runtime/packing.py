"""Packing of saved states: keys and values in 8 or 4 bits, in groups of 32 with one scale, as ggml's q8_0 and q4_0.

A packed state is about half or a quarter as large as an f16 state, and approximates it. All data besides keys and
values is kept unchanged; a state with an unexpected layout is not packed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from cpucache.errors import InputError
from cpucache.runtime.context import Bytes
from cpucache.runtime.layout import Block, Layout, UnknownLayout

AtRest: TypeAlias = Literal["f16", "q8_0", "q4_0"]
"""Format of states on disk: unchanged (``f16``) or packed."""
AT_REST: tuple[AtRest, ...] = get_args(AtRest)

_GROUP = 32  # floats that share a scale
_MAGIC = 0x6B703031
_HEAD = np.dtype([("magic", "<u4"), ("bits", "<u4"), ("size", "<u8"), ("blocks", "<u4"), ("spare", "<u4")])
_TABLE = np.dtype([("start", "<u8"), ("type", "<u4"), ("spare", "<u4"), ("rows", "<u8"), ("columns", "<u8")])
_STEP = 1 << 14
"""Groups packed at a time, so that intermediate arrays fit into a core's cache."""
_Floats = npt.NDArray[np.float32]


class Packing:
    """Packs and unpacks states.

    Args:
        kind: ``"q8_0"`` or ``"q4_0"``.
        threads: Number of threads that unpack.
    """

    def __init__(self, kind: AtRest, threads: int = 1) -> None:
        if kind not in AT_REST[1:]:
            raise InputError(f"at_rest={kind!r}: must be one of {', '.join(AT_REST)}")
        self.kind = kind
        self._bits = 8 if kind == "q8_0" else 4
        self._pool = ThreadPoolExecutor(threads)  # its threads end when it is collected

    def pack(self, state: Bytes) -> Bytes:
        """Returns ``state`` packed, or unchanged if its layout is unexpected."""
        try:
            layout = Layout(state)
        except UnknownLayout:
            return state
        blocks = sorted([*layout.keys, *layout.values], key=lambda block: block.start)
        head = np.zeros(1, _HEAD)
        head[0] = (_MAGIC, self._bits, len(state), len(blocks), 0)
        table = np.array([(each.start, each.type, 0, *each.shape) for each in blocks], _TABLE)
        ends = [0, *(block.end for block in blocks)]
        rest = [state[end : block.start] for end, block in zip(ends, blocks, strict=False)]
        parts: list[npt.NDArray[Any]] = [head, table, *rest, state[ends[-1] :]]
        for block in blocks:
            parts += self._packed(block.of(state))
        return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])

    def unpack(self, packed: Bytes) -> Bytes:
        """Restores a state packed as either kind; returns others unchanged. Raises ``ValueError`` on a wrong size."""
        if len(packed) < _HEAD.itemsize or packed[:4].view("<u4")[0] != _MAGIC:
            return packed
        head = packed[: _HEAD.itemsize].view(_HEAD)[0]
        at = _HEAD.itemsize + int(head["blocks"]) * _TABLE.itemsize
        table = packed[_HEAD.itemsize : at].view(_TABLE)
        blocks = [Block(int(row["start"]), int(row["type"]), (int(row["rows"]), int(row["columns"]))) for row in table]
        size = int(head["size"])
        sizes = [_packed_size(block, int(head["bits"])) for block in blocks]
        floats = sum(block.end - block.start for block in blocks)
        if at + (size - floats) + sum(sizes) != len(packed):
            raise ValueError("a packed state whose size differs from its header")
        state = np.empty(size, np.uint8)
        end = 0
        for block in [*blocks, Block(size, 0, (0, 0))]:
            state[end : block.start] = packed[at : at + block.start - end]
            at += block.start - end
            end = block.end
        jobs = []
        for block, count in zip(blocks, sizes, strict=True):
            jobs.append(self._pool.submit(_unpacked, packed[at : at + count], block.of(state), int(head["bits"])))
            at += count
        for job in jobs:
            job.result()
        return state

    def _packed(self, floats: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.float16], Bytes]:
        groups = _groups(floats)
        scales = np.empty(len(groups), np.float16)
        codes = np.empty((len(groups), _GROUP * self._bits // 8), np.uint8)
        for begin in range(0, len(groups), _STEP):
            part = slice(begin, begin + _STEP)
            values = groups[part].astype(np.float32)
            if self._bits == 8:
                largest = np.abs(values).max(axis=1)
                scales[part] = largest / 127
                numbers = np.rint(values * _inverse(scales[part])[:, None]).clip(-127, 127)
                codes[part] = numbers.astype(np.int8).view(np.uint8)
                continue
            # The float with the largest magnitude gets code 0, which stands for -8, as in ggml.
            extreme = values[np.arange(len(values)), np.abs(values).argmax(axis=1)]
            scales[part] = extreme / -8
            halves = np.rint(values * _inverse(scales[part])[:, None] + 8).clip(0, 15).astype(np.uint8)
            codes[part] = halves[:, : _GROUP // 2] | (halves[:, _GROUP // 2 :] << 4)
        return scales, codes


def _inverse(scales: npt.NDArray[np.float16]) -> _Floats:
    wide = scales.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)


def _groups(floats: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Floats as ``[n_groups, 32]``; the last group is padded with zeros."""
    flat = floats.reshape(-1)
    if len(flat) % _GROUP:
        flat = np.concatenate([flat, np.zeros(-len(flat) % _GROUP, flat.dtype)])
    return flat.reshape(-1, _GROUP)


def _packed_size(block: Block, bits: int) -> int:
    groups = -(-block.shape[0] * block.shape[1] // _GROUP)
    return groups * (2 + _GROUP * bits // 8)


def _unpacked(packed: Bytes, floats: npt.NDArray[np.floating], bits: int) -> None:
    """Unpacks into ``floats``."""
    groups = -(-floats.size // _GROUP)
    scales = packed[: 2 * groups].view("<f2").astype(np.float32)
    codes = packed[2 * groups :].reshape(groups, -1)
    flat = floats.reshape(-1)
    for begin in range(0, groups, _STEP):
        part = slice(begin, begin + _STEP)
        if bits == 8:
            values = codes[part].view(np.int8) * scales[part, None]
        else:
            low, high = codes[part] & 15, codes[part] >> 4
            values = (np.concatenate([low, high], axis=1).astype(np.float32) - 8) * scales[part, None]
        place = flat[begin * _GROUP : (begin + _STEP) * _GROUP]
        place[:] = values.reshape(-1)[: len(place)]

"""One llama.cpp context: KV cells shared by up to ``SEQUENCES`` sequences, and the calls that move state in and out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cpucache.errors import ContextFull, CpucacheError, InputError
from cpucache.runtime import llama
from cpucache.runtime.hardware import default_threads
from cpucache.runtime.llama import api
from cpucache.runtime.memory import Memory
from cpucache.runtime.model import Model, Tokens
from cpucache.runtime.sampler import Sampler

KVType: TypeAlias = Literal["f16", "q8_0", "f32"]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Logits: TypeAlias = npt.NDArray[np.float32]
Wanted: TypeAlias = Literal["none", "last", "all"]
"""The tokens of a run whose logits are kept."""

# Sequences of one context. Each costs a row of logits (a vocabulary of floats); more than this many short modules in
# one batch gain nothing.
SEQUENCES = 32
_NO_CELLS, _ABORTED = 1, 2  # what llama_decode answers (llama.h)
BATCH = 512
"""Tokens of a batch at most: llama.cpp's own micro-batch, so that larger batches gain nothing."""
# llama.cpp asks its abort callback at every node of the graph, and each question goes through Python. That is lost in a
# long prefill and would cost several per cent of a single token, which ends within a fraction of a second anyway.
_LONG = 32
_WHOLE = 0
"""Flags of a state that has all of a sequence (llama.h)."""
_POINT_HEAD = 8  # bytes before a recurrent state: what a state is and of which sequence
_GGML_TYPES = {"f32": api.GGML_TYPE_F32, "f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}
_FLASH = {
    "auto": api.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": api.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


@dataclass(frozen=True)
class Run:
    """Tokens to evaluate at consecutive positions of a sequence, the first at ``start``."""

    sequence: int
    start: int
    tokens: Tokens

    def split(self, count: int) -> tuple[Run, Run]:
        """The first ``count`` tokens, and the rest."""
        head, tail = self.tokens[:count], self.tokens[count:]
        return Run(self.sequence, self.start, head), Run(self.sequence, self.start + count, tail)


class Stopped(Exception):
    """An evaluation was stopped half-way. The context holds none of its tokens."""


class Batch:
    """Tokens of different sequences that are evaluated together, ``BATCH`` of them at most."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._wanted: list[npt.NDArray[np.int8]] = []
        self.size = 0
        """Number of tokens."""

    def add(self, run: Run, logits: Wanted = "none") -> None:
        """Put a run behind the others."""
        wanted = np.full(len(run.tokens), logits == "all", np.int8)
        if logits == "last":
            wanted[-1] = 1
        self._runs.append(run)
        self._wanted.append(wanted)
        self.size += len(run.tokens)

    def arrays(self) -> tuple[Tokens, Tokens, Tokens, npt.NDArray[np.int8]]:
        """The tokens, their positions, their sequences, and whether their logits are kept."""
        runs = self._runs
        return (
            np.concatenate([run.tokens for run in runs]).astype(np.int32, copy=False),
            np.concatenate([np.arange(run.start, run.start + len(run.tokens), dtype=np.int32) for run in runs]),
            np.concatenate([np.full(len(run.tokens), run.sequence, np.int32) for run in runs]),
            np.concatenate(self._wanted),
        )


class Context:
    """KV cells and the means to evaluate tokens into them, move them, save them and load them.

    ``n_ctx`` counts cells, whatever their positions: positions may be larger. ``kv_type`` is the type of the keys,
    and of the values where that can be: with ``"q8_0"`` these stay f16 unless flash attention is ``"on"``. ``flash``:
    ``None`` picks what is fastest for cached prompts: off on a CPU, llama.cpp's own choice on a GPU.

    Not thread-safe. Raises ``ContextFull`` when there are no free cells, ``CpucacheError`` when llama.cpp fails.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_threads: int | None = None,
        kv_type: KVType = "f16",
        flash: str | None = None,
        sequences: int = SEQUENCES,
    ) -> None:
        if n_ctx < 1:
            raise InputError(f"n_ctx={n_ctx}: a context needs at least one cell")
        if kv_type == "q8_0" and model.head_size % 64:
            # llama.cpp turns quantized keys with a Hadamard matrix, and crashes when it has none of the size and is to
            # shift them (ggml-org/llama.cpp pull request 25636).
            raise InputError(f"{model.path.name}: heads of size {model.head_size} can't have q8_0 keys; use f16")
        self.model = model
        self.flash = flash or ("auto" if model.gpu_layers else "off")
        for name, value, known in (("kv_type", kv_type, _GGML_TYPES), ("flash", self.flash, _FLASH)):
            if value not in known:
                raise InputError(f"{name}={value!r}: must be one of {', '.join(known)}")
        self.kv_type = kv_type
        # Without flash attention values are stored transposed, which can't be quantized.
        self.value_type: KVType = "f16" if kv_type == "q8_0" and self.flash != "on" else kv_type
        self.n_threads = n_threads or default_threads()
        params = api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = min(BATCH, n_ctx)
        # One sequence more, to measure others by.
        params.n_seq_max = sequences + (model.window > 0)
        self._spare = sequences
        self._cell_sizes: tuple[int, int] | None = None
        # Logits of at most this many tokens at a time: llama.cpp would else set aside a vocabulary of floats for each
        # of 512 (300 MB with 150,000 words).
        params.n_outputs_max = max(SEQUENCES, params.n_seq_max)
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = True
        params.swa_full = True
        params.flash_attn_type = _FLASH[self.flash]
        params.type_k = _GGML_TYPES[kv_type]
        params.type_v = _GGML_TYPES[self.value_type]
        params.no_perf = True
        llama.last_errors(clear=True)
        self._pointer = api.llama_init_from_model(model.handle, params)
        if not self._pointer:
            raise CpucacheError(
                f"llama.cpp can't make a context of {n_ctx} tokens: {llama.last_errors() or 'out of memory?'}; "
                "try a smaller --ctx"
            )
        # What was asked for: llama.cpp rounds it up, and the spare cells are nobody's.
        self.n_ctx = n_ctx
        self.n_batch = min(BATCH, int(api.llama_n_batch(self._ctx)))
        """Tokens of a batch at most. llama.cpp aborts the process when it is given more."""
        shifts = bool(self._memory and api.llama_memory_can_shift(self._memory))
        self.memory = Memory.of(model, shifts=shifts)
        """Operations that its cells support."""
        # What stands for the recurrent state in a saved state that has none: no sequence has any yet.
        self._no_point = self.save_point(0)[_POINT_HEAD:] if self.memory.points else np.empty(0, np.uint8)
        self._stop: Callable[[], bool] | None = None
        self._asked = api.ggml_abort_callback(lambda _data: self._stop is not None and self._stop())
        self._never = api.ggml_abort_callback()

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Free the cells."""
        if self._pointer:
            api.llama_free(self._pointer)
            self._pointer = None

    @property
    def _ctx(self) -> Any:
        if not self._pointer:
            raise CpucacheError(f"{self.model.path}: the context has been closed")
        return self._pointer

    @property
    def _memory(self) -> Any:
        return api.llama_get_memory(self._ctx)

    @property
    def state_format(self) -> str:
        """Name of the form of saved states, which depends on settings besides the model: part of every slice key."""
        turned = "" if os.environ.get("LLAMA_ATTN_ROT_DISABLE", "0") == "0" else "/unturned"
        version = f"{api.LLAMA_STATE_SEQ_VERSION}/{llama.version()}"
        return f"llama-seq-{version}/k-{self.kv_type}/v-{self.value_type}/flash-{self.flash}{turned}"

    # -- evaluating --------------------------------------------------------------------------------------------------
    def evaluate(self, batch: Batch, stop: Callable[[], bool] | None = None) -> None:
        """Evaluate a batch. The logits that it keeps can be read until the next.

        A run must start right behind its sequence's last position, or anywhere in an empty sequence. ``stop`` is asked
        now and then, from this thread, whether to stop a batch of 32 tokens or more: then ``Stopped`` is raised. A
        batch that could not be taken back is evaluated to its end.
        """
        # A recurrent state would be left half-way through a batch that is stopped.
        if stop is None or batch.size < _LONG or not self.memory.cuts:
            self._decode(*batch.arrays())
            return
        self._stop = stop
        api.llama_set_abort_callback(self._ctx, self._asked, None)
        try:
            self._decode(*batch.arrays())
        finally:
            api.llama_set_abort_callback(self._ctx, self._never, None)
            self._stop = None

    def decode(
        self, runs: Sequence[Run], *, logits: Wanted = "none", progress: Callable[[int], None] | None = None
    ) -> Logits | None:
        """Evaluate runs of any length, one behind the other, in as many batches as that takes.

        ``logits="last"`` keeps those of the last token of all; ``"all"`` returns a row for every token. ``progress`` is
        told how many tokens each batch had.
        """
        rows: list[Logits] = []
        left = list(runs)
        while left:
            batch = Batch()
            room = min(SEQUENCES, self.n_batch) if logits == "all" else self.n_batch
            while left and batch.size < room:
                part, rest = left[0].split(room - batch.size)
                left[:1] = [rest] if len(rest.tokens) else []
                batch.add(part, "none" if logits == "last" and left else logits)
            self.evaluate(batch)
            if progress:
                progress(batch.size)
            if logits == "all":
                rows.extend(self.logits(index) for index in range(batch.size))
        return np.stack(rows) if logits == "all" else None

    def _decode(self, tokens: Tokens, positions: Tokens, sequences: Tokens, wanted: npt.NDArray[np.int8]) -> None:
        count = len(tokens)
        ones = np.ones(count, np.int32)
        # llama_batch.seq_id is an array of pointers, one to each token's list of sequences: here, lists of one.
        lists = (sequences.ctypes.data + 4 * np.arange(count, dtype=np.uintp)).astype(np.uintp)
        i32 = ctypes.POINTER(ctypes.c_int32)
        batch = api.llama_batch(
            n_tokens=count,
            token=tokens.ctypes.data_as(i32),
            embd=None,
            pos=positions.ctypes.data_as(i32),
            n_seq_id=ones.ctypes.data_as(i32),
            seq_id=lists.ctypes.data_as(ctypes.POINTER(i32)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        llama.last_errors(clear=True)
        status = api.llama_decode(self._ctx, batch)
        if status == _ABORTED:
            raise Stopped
        if status == _NO_CELLS:
            raise ContextFull(f"the context of {self.n_ctx} tokens is full; raise it with --ctx (n_ctx=…)")
        if status != 0:
            raise CpucacheError(f"llama.cpp failed to evaluate {count} tokens (status {status}): {llama.last_errors()}")

    def logits(self, index: int = -1) -> Logits:
        """The logits of a token of the last batch that kept them (-1: of the last that did), one float for a word."""
        pointer = api.llama_get_logits_ith(self._ctx, index)
        row: Logits = np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()
        return row

    def sample(self, sampler: Sampler, index: int = -1) -> int:
        """The next token after one of the last batch, given by its ``index`` as for ``logits``."""
        if sampler.constrained:
            return sampler.choose(self.logits(index))
        return int(api.llama_sampler_sample(sampler.handle, self._ctx, index))

    # -- cells -------------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget every cell of every sequence."""
        api.llama_memory_clear(self._memory, False)

    def remove(self, sequence: int, begin: int = -1, end: int = -1) -> bool:
        """Take the positions [begin, end) out of a sequence (-1: open end). False: this memory can't do a part."""
        return bool(api.llama_memory_seq_rm(self._memory, sequence, begin, end))

    def share(self, source: int, target: int, begin: int = -1, end: int = -1) -> None:
        """Make the cells of ``source`` at positions [begin, end) belong to ``target`` as well. Copies no data."""
        api.llama_memory_seq_cp(self._memory, source, target, begin, end)

    def shift(self, sequence: int, delta: int, begin: int = -1) -> None:
        """Move the cells of a sequence, from position ``begin`` on (-1: all), by ``delta`` positions.

        Only noted by llama.cpp: keys are rotated by the next ``decode``, over all cells of the context at once. Saving
        before that would save new positions with old keys.
        """
        api.llama_memory_seq_add(self._memory, sequence, begin, -1, delta)

    def last_position(self, sequence: int) -> int:
        """The highest position of a sequence, -1 when it is empty."""
        return int(api.llama_memory_seq_pos_max(self._memory, sequence))

    def whole(self, sequence: int, end: int, cells: int) -> bool:
        """Whether layers with a window have all of a sequence that its next token, at ``end``, may look back on.

        llama.cpp keeps no account of which cells it has overwritten. How large a state of them would be tells: that of
        ``cells``, the tokens that stand within the window.
        """
        if not self.memory.window:
            return True
        if self.last_position(sequence) != end - 1:
            return False
        if self._cell_sizes is None:
            last, sizes = self.last_position(sequence), []
            for begin in (last, last - 1):
                self.share(sequence, self._spare, begin)
                sizes.append(self._size(self._spare, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY))
            self.remove(self._spare)
            one, two = sizes
            if one == two:
                return cells == 1 == last + 1
            self._cell_sizes = one, two - one
        first, each = self._cell_sizes
        return self._size(sequence, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == first + (cells - 1) * each

    # -- state -------------------------------------------------------------------------------------------------------
    def save(self, sequence: int) -> Bytes:
        """The cells of a sequence (``llama_state_seq_get_data``), without its recurrent state, if it has one."""
        state = self._save(sequence, _WHOLE)
        if not self.memory.points:
            return state
        # The recurrent state comes last (llama_memory_hybrid::state_write).
        point = self.save_point(sequence)[_POINT_HEAD:]
        if not np.array_equal(state[len(state) - len(point) :], point):
            raise CpucacheError(f"{self.model.path.name}: llama.cpp lays out states of this model in an unknown way")
        cells: Bytes = state[: len(state) - len(point)].copy()
        return cells

    def load(self, sequence: int, state: Bytes) -> bool:
        """Replace a sequence by saved cells, read straight from their memory. False when llama.cpp refuses them.

        It has no recurrent state then. Raises ``ContextFull`` when the cells do not suffice.
        """
        return self._load(sequence, np.concatenate([state, self._no_point]) if len(self._no_point) else state, _WHOLE)

    def save_point(self, sequence: int) -> Bytes:
        """The recurrent state of a sequence: that of all its tokens together."""
        return self._save(sequence, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    def load_point(self, sequence: int, state: Bytes) -> bool:
        """Give a sequence a recurrent state; its cells stay. False when llama.cpp refuses it."""
        return self._load(sequence, state, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    def _save(self, sequence: int, flags: int) -> Bytes:
        size = self._size(sequence, flags)
        out = np.empty(size, np.uint8)
        written = int(api.llama_state_seq_get_data_ext(self._ctx, out.ctypes.data_as(_U8), size, sequence, flags))
        if written != size:
            raise CpucacheError(f"llama.cpp saved {written} of {size} bytes of state: {llama.last_errors()}")
        return out

    def _size(self, sequence: int, flags: int) -> int:
        return int(api.llama_state_seq_get_size_ext(self._ctx, sequence, flags))

    def _load(self, sequence: int, state: Bytes, flags: int) -> bool:
        llama.last_errors(clear=True)
        data = state.ctypes.data_as(_U8)
        taken = int(api.llama_state_seq_set_data_ext(self._ctx, data, len(state), sequence, flags))
        if taken == 0 and "cells in kv cache" in llama.last_errors():  # too few of them free, or altogether
            raise ContextFull(f"the context of {self.n_ctx} tokens is full; raise it with --ctx (n_ctx=…)")
        return 0 < taken == len(state)


_U8 = ctypes.POINTER(ctypes.c_uint8)

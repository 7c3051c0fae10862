"""One llama.cpp context: KV cells shared by several sequences, and the calls that evaluate, save and load them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cpucache.errors import ContextFull, CpucacheError, InputError, ModelError
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
"""Tokens of a run whose logits are kept."""

# Default number of sequences. Each costs a row of logits (``n_vocab`` floats); more short modules in one batch are no
# faster.
SEQUENCES = 32
_NO_CELLS, _ABORTED = 1, 2  # return values of llama_decode (llama.h)
BATCH = 512
"""Maximum size of a batch, in tokens: llama.cpp's own micro-batch, so larger batches are no faster."""
# Minimum size of a batch that can be stopped, in tokens. llama.cpp calls its abort callback, which is Python, at every
# node of the graph: negligible in a long prefill, several per cent of the time of a single token.
_LONG = 32
_WHOLE = 0
"""Flags for the whole state of a sequence (``llama_state_seq_get_data_ext``, llama.h)."""
_STATE_HEAD = 8  # bytes before all else in a state: its kind and its sequence
_PART = api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
"""Flags for the cells of window layers, if there are any, and the recurrent state, if there is one."""
_BEYOND = 2**31 - 1  # a position after those of all cells
_GGML_TYPES = {"f32": api.GGML_TYPE_F32, "f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}
_FLASH = {
    "auto": api.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": api.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


@dataclass(frozen=True)
class Run:
    """Tokens to evaluate at consecutive positions of a sequence, the first at ``start``.

    Raises ``ValueError`` without tokens: no batch would ever complete such a run.
    """

    sequence: int
    start: int
    tokens: Tokens

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise ValueError("a run has at least one token")

    def split(self, count: int) -> tuple[Run, list[Run]]:
        """Returns the first ``count`` tokens as a run, and the rest as a list of one run, or of none."""
        head, tail = self.tokens[:count], self.tokens[count:]
        rest = [Run(self.sequence, self.start + count, tail)] if len(tail) else []
        return Run(self.sequence, self.start, head), rest


class Stopped(Exception):
    """An evaluation was stopped. The llama.cpp context holds none of its tokens."""


class Batch:
    """Tokens of one or more sequences that are evaluated together, at most ``BATCH``."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._wanted: list[npt.NDArray[np.int8]] = []
        self.size = 0
        """Number of tokens."""

    def add(self, run: Run, logits: Wanted = "none") -> None:
        """Appends a run."""
        wanted = np.full(len(run.tokens), logits == "all", np.int8)
        if logits == "last":
            wanted[-1] = 1
        self._runs.append(run)
        self._wanted.append(wanted)
        self.size += len(run.tokens)

    def arrays(self) -> tuple[Tokens, Tokens, Tokens, npt.NDArray[np.int8]]:
        """Returns tokens, positions, sequences and flags for kept logits, each ``[size]``."""
        runs = self._runs
        return (
            np.concatenate([run.tokens for run in runs]).astype(np.int32, copy=False),
            np.concatenate([np.arange(run.start, run.start + len(run.tokens), dtype=np.int32) for run in runs]),
            np.concatenate([np.full(len(run.tokens), run.sequence, np.int32) for run in runs]),
            np.concatenate(self._wanted),
        )


class Context:
    """A llama.cpp context: KV cells, with operations to evaluate, move, save and load them. Not thread-safe.

    Args:
        model: The model. It must outlive the context.
        n_ctx: Number of cells. Positions may be larger.
        n_threads: Threads that evaluate; ``None``: see ``default_threads``.
        kv_type: Type of the keys, and of the values where possible: with ``"q8_0"``, values stay f16 unless ``flash``
            is ``"on"``.
        flash: Flash attention: ``"auto"``, ``"on"`` or ``"off"``. ``None`` picks the fastest for cached prompts: off on
            a CPU, llama.cpp's choice on a GPU.
        sequences: Number of sequences.

    Raises:
        InputError: An argument is out of range or does not fit the model.
        ModelError: llama.cpp can't save parts of a sequence of the model.
        CpucacheError: llama.cpp fails. All methods raise it too, and ``ContextFull`` if there are too few free cells.
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
            # llama.cpp rotates quantized keys with a Hadamard matrix. It crashes on a shift if it has none of this size
            # (ggml-org/llama.cpp pull request 25636).
            raise InputError(
                f"{model.path.name}: heads of size {model.head_size} can't have q8_0 keys; use --kv-type f16"
            )
        if model.architecture == "deepseek4":
            # llama.cpp ends the process if a part of a sequence is shared (llama_kv_cache_dsv4::seq_cp).
            raise ModelError(f"{model.path.name}: llama.cpp can't save parts of a text of a deepseek4 model")
        self.model = model
        self.flash = flash or ("auto" if model.gpu_layers else "off")
        for name, value, known in (("kv_type", kv_type, _GGML_TYPES), ("flash", self.flash, _FLASH)):
            if value not in known:
                raise InputError(f"{name}={value!r}: must be one of {', '.join(known)}")
        self.kv_type = kv_type
        # Without flash attention, values are stored transposed and cannot be quantized.
        self.value_type: KVType = "f16" if kv_type == "q8_0" and self.flash != "on" else kv_type
        self.n_threads = n_threads or default_threads()
        params = api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = min(BATCH, n_ctx)
        # One more sequence for ``whole``, which measures the size of cells with it.
        params.n_seq_max = sequences + (model.window > 0)
        self._spare = sequences
        self._cell_sizes: tuple[int, int] | None = None
        # Limits the logits of a batch: llama.cpp would otherwise allocate ``n_vocab`` floats for each of 512 tokens
        # (300 MB with a vocabulary of 150,000).
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
        # The number requested: llama.cpp rounds it up, and the additional cells are not used.
        self.n_ctx = n_ctx
        self.n_batch = min(BATCH, int(api.llama_n_batch(self._ctx)))
        """Maximum size of a batch, in tokens. llama.cpp aborts the process if a batch is larger."""
        shifts = bool(self._memory and api.llama_memory_can_shift(self._memory))
        self.memory = Memory.of(model, shifts=shifts)
        """Operations that the cells allow."""
        # Bytes of no cells of window layers, and of no recurrent state, to complete saved states with.
        self._no_windows = self._no_point = np.empty(0, np.uint8)
        if self.memory.points or self.memory.window:
            # No sequence holds anything yet.
            whole, part = self._save(0, _WHOLE), self._save(0, _PART)
            # The cells of window layers come first. None of them take as many bytes as none of the other layers
            # (llama_kv_cache::state_write).
            windows = len(whole) - len(part) if self.memory.window else 0
            _, self._no_windows, self._no_point = np.split(part, (_STATE_HEAD, _STATE_HEAD + windows))
        self._stop: Callable[[], bool] | None = None
        self._asked = api.ggml_abort_callback(lambda _data: self._stop is not None and self._stop())
        self._never = api.ggml_abort_callback()

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Frees the context and its cells."""
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
        """Format of saved states: what their bytes depend on besides model and tokens. Part of every slice key."""
        turned = "" if os.environ.get("LLAMA_ATTN_ROT_DISABLE", "0") == "0" else "/unturned"
        version = f"{api.LLAMA_STATE_SEQ_VERSION}/{llama.version()}"
        return f"llama-seq-{version}/k-{self.kv_type}/v-{self.value_type}/flash-{self.flash}{turned}"

    # -- evaluating --------------------------------------------------------------------------------------------------
    def evaluate(self, batch: Batch, stop: Callable[[], bool] | None = None) -> None:
        """Evaluates a batch. Its kept logits can be read until the next batch.

        A run must start directly after the last position of its sequence, or anywhere if the sequence is empty.
        ``stop`` is called repeatedly, in this thread, for batches of 32 tokens or more; if it returns true, ``Stopped``
        is raised. With a recurrent state, which cannot be truncated, it is not called.
        """
        # A stopped batch would leave a recurrent state that includes some of its tokens.
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
        """Evaluates runs of any length in order, in as many batches as needed.

        ``logits="last"`` keeps the logits of the very last token; ``"all"`` returns logits ``[n_tokens, n_vocab]``.
        ``progress`` is called with the number of tokens of each batch.
        """
        rows: list[Logits] = []
        left = list(runs)
        while left:
            batch = Batch()
            room = min(SEQUENCES, self.n_batch) if logits == "all" else self.n_batch
            while left and batch.size < room:
                part, left[:1] = left[0].split(room - batch.size)
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
        # llama_batch.seq_id is an array of pointers to each token's list of sequences: here, lists of one.
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
        """Logits ``[n_vocab]`` of token ``index`` of the last batch, if kept; -1: of its last token that kept them."""
        pointer = api.llama_get_logits_ith(self._ctx, index)
        row: Logits = np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()
        return row

    def sample(self, sampler: Sampler, index: int = -1) -> int:
        """Samples the token after token ``index`` of the last batch; ``index`` as in ``logits``."""
        if sampler.constrained:
            return sampler.choose(self.logits(index))
        return int(api.llama_sampler_sample(sampler.handle, self._ctx, index))

    # -- cells -------------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Removes all cells of all sequences."""
        api.llama_memory_clear(self._memory, False)

    def remove(self, sequence: int, begin: int = -1, end: int = -1) -> bool:
        """Removes positions [begin, end) of a sequence (-1: open end). False if this memory cannot remove a part."""
        return bool(api.llama_memory_seq_rm(self._memory, sequence, begin, end))

    def share(self, source: int, target: int, begin: int = -1, end: int = -1) -> None:
        """Adds the cells of ``source`` at positions [begin, end) to ``target`` as well. Copies no data."""
        api.llama_memory_seq_cp(self._memory, source, target, begin, end)

    def shift(self, sequence: int, delta: int, begin: int = -1) -> None:
        """Moves the cells of a sequence, from position ``begin`` on (-1: all), by ``delta`` positions.

        llama.cpp only records the move (``llama_memory_seq_add``). The next ``evaluate`` rotates the keys, over all
        cells of the context at once. A state saved before that has new positions with old keys.
        """
        api.llama_memory_seq_add(self._memory, sequence, begin, -1, delta)

    def last_position(self, sequence: int) -> int:
        """Highest position of a sequence; -1 if it is empty, lacks a recurrent state, or any cells of window layers."""
        return int(api.llama_memory_seq_pos_max(self._memory, sequence))

    def whole(self, sequence: int, end: int, cells: int) -> bool:
        """Whether sliding-window layers still hold all cells that the next token of a sequence, at ``end``, attends to.

        llama.cpp does not record which cells it has overwritten. The size of a saved window state shows it: it must be
        that of ``cells``, the number of tokens within the window.
        """
        if not self.memory.window:
            return True
        last = self.last_position(sequence)
        # Slices are loaded without a recurrent state, and so have no last position.
        if last != end - 1 and not (self.memory.points and last == -1):
            return False
        rest = self._part_size(sequence, _BEYOND) if self.memory.points else _STATE_HEAD + len(self._no_windows)
        if self._cell_sizes is None:
            one, two = (self._part_size(sequence, begin) - rest for begin in (end - 1, end - 2))
            if one == two:
                return cells == 1 == end
            self._cell_sizes = one, two - one
        first, each = self._cell_sizes
        return self._size(sequence, _PART) - rest == first + (cells - 1) * each

    def _part_size(self, sequence: int, begin: int) -> int:
        """Bytes of the cells that window layers hold from position ``begin`` on, and of the recurrent state."""
        with self._tail(sequence, begin) as tail:
            return self._size(tail, _PART)

    @contextmanager
    def _tail(self, sequence: int, begin: int) -> Iterator[int]:
        """Shares the cells of a sequence from position ``begin`` on, and its recurrent state, with a sequence."""
        self.share(sequence, self._spare, begin)
        try:
            yield self._spare
        finally:
            self.remove(self._spare)

    # -- state -------------------------------------------------------------------------------------------------------
    def save(self, sequence: int) -> Bytes:
        """Returns the saved cells of a sequence (``llama_state_seq_get_data_ext``), without a recurrent state."""
        state = self._save(sequence, _WHOLE)
        if not self.memory.points:
            return state
        # The recurrent state is last (llama_memory_hybrid::state_write, llama_memory_hybrid_iswa::state_write).
        point = self.save_point(sequence)[_STATE_HEAD + len(self._no_windows) :]
        if not np.array_equal(state[len(state) - len(point) :], point):
            raise CpucacheError(f"{self.model.path.name}: llama.cpp saves states of this model in an unknown layout")
        cells: Bytes = state[: len(state) - len(point)].copy()
        return cells

    def without_windows(self, state: Bytes, count: int) -> Bytes | None:
        """Saved cells of ``count`` tokens, without those of window layers.

        ``None`` as long as ``whole`` has not measured the size of these. A sequence loaded from them has no last
        position in window layers.
        """
        if self._cell_sizes is None:
            return None
        first, each = self._cell_sizes
        windows = len(self._no_windows) + first + (min(count, self.memory.window) - 1) * each
        return np.concatenate([state[: len(state) - windows], self._no_windows])

    def load(self, sequence: int, state: Bytes) -> bool:
        """Replaces a sequence by saved cells. Returns false if llama.cpp refuses them.

        The sequence then has no recurrent state. Raises ``ContextFull`` if there are too few free cells.
        """
        return self._load(sequence, np.concatenate([state, self._no_point]) if len(self._no_point) else state, _WHOLE)

    def save_point(self, sequence: int) -> Bytes:
        """Returns the recurrent state of a sequence: one state for all of its tokens."""
        if not self.memory.window:
            return self._save(sequence, _PART)
        with self._tail(sequence, _BEYOND) as point:
            return self._save(point, _PART)

    def load_point(self, sequence: int, state: Bytes) -> bool:
        """Replaces the recurrent state of a sequence; its cells stay. Returns false if llama.cpp refuses it."""
        # No cells in a state leave those of the sequence (llama_kv_cache::state_read).
        return self._load(sequence, state, _PART)

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
        if taken == 0 and "cells in kv cache" in llama.last_errors():  # too few free, or too few in total
            raise ContextFull(f"the context of {self.n_ctx} tokens is full; raise it with --ctx (n_ctx=…)")
        return 0 < taken == len(state)


_U8 = ctypes.POINTER(ctypes.c_uint8)

"""Stopping an evaluation half-way: Ctrl-C, and ``cancel`` from another thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cpucache.runtime.llama import api

# llama.cpp asks its abort callback at every node of the graph, and each question goes through Python. That is lost in a
# long prefill and would cost several per cent of a single token, which ends within a fraction of a second anyway.
_LONG = 32


class Interruptible:
    """Lets ``llama_decode`` be stopped.

    While C code runs, Python can't raise ``KeyboardInterrupt``: it would come out in the callback and be lost there.
    So during a long evaluation in the main thread Ctrl-C only sets a flag, which the callback hands to llama.cpp, and
    ``KeyboardInterrupt`` is raised when the call is over (even if it came too late to stop anything).
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self._stop = False
        self._running = False
        self._ask = api.ggml_abort_callback(lambda _data: self._stop)
        self._never = api.ggml_abort_callback()

    def cancel(self) -> None:
        """Stop the long evaluation under way, if there is one: its ``llama_decode`` returns 2 (aborted)."""
        if self._running:
            self._stop = True

    @contextmanager
    def during(self, n_tokens: int) -> Iterator[None]:
        """Around the ``llama_decode`` calls for ``n_tokens`` tokens. Raises ``KeyboardInterrupt`` when stopped."""
        if n_tokens < _LONG:
            yield
            return
        self._stop, self._running = False, True
        api.llama_set_abort_callback(self._ctx, self._ask, None)
        # Only the default handler is replaced: an application that handles Ctrl-C itself has its own plans.
        ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if ours:
            signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            api.llama_set_abort_callback(self._ctx, self._never, None)
            self._running = False
        if self._stop:
            raise KeyboardInterrupt

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True

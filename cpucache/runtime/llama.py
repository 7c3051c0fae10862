"""llama.cpp's shared library: started once, with its log kept for error messages instead of printed."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as api

__all__ = ["api", "last_errors", "start", "version"]

_ERROR = 4  # GGML_LOG_LEVEL_ERROR (ggml.h)
_CONTINUE = 5  # GGML_LOG_LEVEL_CONT: goes on with the line before
_errors: deque[str] = deque(maxlen=20)
_level = 0
_started = False


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _collect_log(level: int, text: bytes, _data: Any) -> None:
    global _level  # noqa: PLW0603 - llama.cpp's log is global too
    if level != _CONTINUE:
        _level = level
    if _level == _ERROR:
        _errors.append(text.decode("utf-8", "replace").strip())


def start() -> None:
    """Start the backends. Safe to call again."""
    global _started  # noqa: PLW0603
    if not _started:
        api.llama_log_set(_collect_log, ctypes.c_void_p(0))
        api.llama_backend_init()
        _started = True


def last_errors(*, clear: bool = False) -> str:
    """Returns the errors that llama.cpp has logged since the last clearing, as one line; empty if there are none."""
    text = "; ".join(line for line in _errors if line)
    if clear:
        _errors.clear()
    return text


def version() -> str:
    """The version of the binding, which fixes that of llama.cpp."""
    return str(llama_cpp.__version__)

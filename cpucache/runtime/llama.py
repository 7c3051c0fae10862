"""llama.cpp's shared library. It is started once; its error log is kept for error messages and not printed."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from typing import Any

# libgomp reads this when it is loaded. Threads that wait for one another spin 300,000 times by default: where other
# processes occupy all cores, each wait then takes whole turns of the scheduler. 2,000 spins cost nothing on an idle
# machine, see docs/models.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import llama_cpp
import llama_cpp.llama_cpp as api

__all__ = ["api", "last_errors", "start", "version"]

_ERROR = 4  # GGML_LOG_LEVEL_ERROR (ggml.h)
_CONTINUE = 5  # GGML_LOG_LEVEL_CONT: continues the previous line
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
    """Starts the backends. Further calls do nothing."""
    global _started  # noqa: PLW0603
    if not _started:
        api.llama_log_set(_collect_log, ctypes.c_void_p(0))
        api.llama_backend_init()
        _started = True


def last_errors(*, clear: bool = False) -> str:
    """Errors that llama.cpp logged since the last call with ``clear``, as one line: the last 20 at most."""
    text = "; ".join(line for line in _errors if line)
    if clear:
        _errors.clear()
    return text


def version() -> str:
    """Version of llama-cpp-python, which determines the version of llama.cpp."""
    return str(llama_cpp.__version__)

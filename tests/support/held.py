"""What a process holds: files that it has open."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def no_collector() -> Iterator[None]:
    """Cycles are not found."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def open_files(folder: Path) -> list[str]:
    """The files below a folder that this process has open."""
    names = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(each.readlink()))
    return [name for name in names if name.startswith(str(folder))]

"""Size limits of PML, and reading of files within them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Maximum sizes of a schema or prompt: above what any context holds, below what exhausts a machine.

    ``document``: bytes of the document itself. ``source``: bytes of one ``src`` file. ``sources``: bytes of all
    ``src`` files of a schema, each counted as often as it is named. ``tags``: modules, parameters, references and
    comments of a document. ``attributes``: attributes of a tag. ``depth``: nesting depth of tags; trees are walked by
    recursion, so the stack limits it too.
    """

    document: int = 16 * MEBIBYTE
    source: int = 16 * MEBIBYTE
    sources: int = 64 * MEBIBYTE
    tags: int = 100_000
    attributes: int = 1_000  # lxml looks every attribute up by name, in time quadratic in their number
    depth: int = 100


class TooLarge(OSError):
    """A file is larger than the limit."""


def read_regular(path: Path, most: int) -> bytes:
    """Returns the bytes of a regular file. Raises ``TooLarge`` above ``most`` bytes, ``OSError`` for a pipe or device.

    A file whose size is above the limit is not read, and opening a pipe does not block.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file but a pipe, socket or device")
        # A file may grow while it is read, and virtual files such as those in /proc report a size of 0.
        data = b"" if status.st_size > most else file.read(most + 1)
    if max(status.st_size, len(data)) > most:
        raise TooLarge(errno.EFBIG, f"has more than the maximum of {most:,} bytes")
    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

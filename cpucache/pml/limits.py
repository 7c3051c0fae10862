"""Limits on the size of PML, and reading of files within these limits."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of a schema or prompt: larger than any context holds, and small enough for any machine.

    ``document``: bytes of the document itself. ``source``: bytes of one ``src`` file. ``sources``: bytes of all
    ``src`` files of a schema, each counted as often as it is named. ``tags``: modules, parameters, references and
    comments of a document. ``attributes``: attributes of a tag. ``depth``: how deep tags may nest; trees are walked by
    recursion, so that the stack limits it, too.
    """

    document: int = 16 * MEBIBYTE
    source: int = 16 * MEBIBYTE
    sources: int = 64 * MEBIBYTE
    tags: int = 100_000
    attributes: int = 1_000  # lxml looks every attribute up by name, which takes time in the square of their number
    depth: int = 100


class TooLarge(OSError):
    """A file has more bytes than may be read."""


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises ``TooLarge`` beyond ``most`` of them, and ``OSError`` for a pipe or device.

    Nothing is read of a file that is too large, and a pipe is not waited for.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file but a pipe, socket or device")
        # A file may grow while it is read, and some that the system makes up say that they have no bytes.
        data = b"" if status.st_size > most else file.read(most + 1)
    if max(status.st_size, len(data)) > most:
        raise TooLarge(errno.EFBIG, f"has more than the {most:,} bytes that are read at most")
    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

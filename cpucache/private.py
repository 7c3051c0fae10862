"""Files and folders that only their owner can read, whatever the umask: they hold what people ask a model."""

from __future__ import annotations

import logging
import os
import stat
from functools import cache
from pathlib import Path

_log = logging.getLogger(__name__)
_OTHERS = 0o077


def private_folder(path: Path) -> None:
    """Creates a folder, and missing folders above it, that only the owner can enter (mode 700).

    An existing folder keeps its mode; if other users can list it, one warning says so. Raises ``OSError`` when the
    folder can't be created.
    """
    for folder in reversed([path, *path.parents]):
        if folder == path or not folder.exists():
            folder.mkdir(0o700, exist_ok=True)
    if os.name != "posix":
        return
    found = path.stat()
    if found.st_uid != os.geteuid():
        _warn(f"{path} belongs to another user, who can see which files are in it and delete them")
    elif found.st_mode & _OTHERS:
        _warn(f"other users can see which files are in {path}; `chmod 700 {path}` keeps them out")


def private_file(path: Path) -> None:
    """Restricts a file to its owner (mode 600); creates it, empty, if it is missing.

    Anything but a regular file is left unchanged. Raises ``OSError`` when the file can't be created or changed.
    """
    try:
        path.touch(0o600, exist_ok=False)
    except FileExistsError:
        # By name, without opening it: closing a file gives up every lock that SQLite holds on it in this process.
        found = path.stat().st_mode
        if stat.S_ISREG(found) and found & _OTHERS:
            path.chmod(0o600)


@cache
def _warn(message: str) -> None:
    _log.warning(message)

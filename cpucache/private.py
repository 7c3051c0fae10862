"""Files and folders for their owner alone, whatever the umask: what people ask a model is nobody else's business."""

from __future__ import annotations

import logging
import os
import stat
from functools import cache
from pathlib import Path

_log = logging.getLogger(__name__)
_OTHERS = 0o077


def private_folder(path: Path) -> None:
    """Make a folder for its owner alone (mode 700), and those that are missing above it.

    A folder that is there already is left as it is; a warning, once, says that others can look into it. Raises
    ``OSError`` when there can't be such a folder.
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
    """Let nobody but its owner read or write a file (mode 600), which is made, empty, if there is none.

    What is no regular file is left as it is. Raises ``OSError`` when the file can't be made or changed.
    """
    try:
        path.touch(0o600, exist_ok=False)
    except FileExistsError:
        # Changed by name, not opened: closing a file gives up every lock that SQLite holds on it in this process.
        found = path.stat().st_mode
        if stat.S_ISREG(found) and found & _OTHERS:
            path.chmod(0o600)


@cache
def _warn(message: str) -> None:
    _log.warning(message)

"""Claims: of several processes that lack the same slice, one makes it and the others wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from cpucache.private import private_folder


class Claims:
    """Locks on slices that are being made, one file each below ``folder``.

    The operating system frees a lock when its process ends, however it ends, so a crash leaves nothing that has to be
    cleaned up. Without a folder that can be written, every claim succeeds: a slice may then be made twice, no more.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, FileLock] = {}
        self._lock = threading.Lock()

    def take(self, key: str) -> bool:
        """Claim a slice. False: somebody else is making it."""
        if self._folder is None or key in self._held:
            return True
        # Taken by the thread that evaluates, given back by the one that writes.
        lock = FileLock(self._folder / f"{key}.lock", mode=0o600, thread_local=False)
        try:
            if not self._folder.exists():
                private_folder(self._folder)
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError:
            return True
        with self._lock:
            self._held[key] = lock
        return True

    def release(self, keys: Iterable[str]) -> None:
        """Give claims back."""
        for key in keys:
            with self._lock:
                lock = self._held.pop(key, None)
            if lock is not None:
                # Deleted while it is held: who waits for it finds that out and makes a new one. Windows refuses that.
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    lock.release()

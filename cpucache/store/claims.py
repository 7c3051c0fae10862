"""Claims: of several processes that lack the same slice, one evaluates it and the others wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from cpucache.private import private_folder


class Claims:
    """Locks on slices that are being evaluated, one file each in ``folder``.

    The operating system releases a lock when its process ends, so nothing has to be cleaned up after a crash. Without a
    writable folder every claim succeeds; the worst result is that two processes evaluate the same slice.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, FileLock] = {}
        self._lock = threading.Lock()

    def take(self, key: str) -> bool:
        """Claims a slice. Returns False when another process has claimed it."""
        if self._folder is None or key in self._held:
            return True
        # Not thread-local: the thread that evaluates acquires it, the thread that writes releases it.
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
        """Releases claims; ignores keys that are not claimed here."""
        for key in keys:
            with self._lock:
                lock = self._held.pop(key, None)
            if lock is not None:
                # Deleted while it is locked, so that no two processes lock different files of this name: filelock
                # checks that the file it has locked still exists. Windows refuses to delete it.
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    lock.release()

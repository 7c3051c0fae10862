"""Maintenance of a store: checking every slice, deleting leftovers, enforcing the budget."""

from __future__ import annotations

import contextlib
import shutil
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cpucache.store.slicefile import Damaged, Outdated
from cpucache.store.startup import rebuild
from cpucache.store.store import Store

_YOUNG = 600.0  # seconds: a younger file may belong to a running writer

Kind: TypeAlias = Literal["damaged", "missing", "unlisted", "outdated", "leftover"]


@dataclass(frozen=True)
class Finding:
    """An irregularity in a store.

    ``damaged``: a file that is not the slice that its name states. ``missing``: a slice in the index without a file.
    ``unlisted``: a slice file that is not in the index. ``outdated``: a slice of another version of the file format.
    ``leftover``: a writer's temporary file, or a file that was set aside.
    """

    kind: Kind
    name: str
    detail: str = ""

    @property
    def harmless(self) -> bool:
        """Whether it is the normal result of a crash or an update: no slice is lost or wrong."""
        return self.kind in {"unlisted", "outdated", "leftover"}


def verify(
    store: Store, *, repair: bool = False, progress: Callable[[int, int], object] | None = None
) -> list[Finding]:
    """Reads every slice on disk and compares it with its hash, its key and the index.

    Args:
        store: The store; one without a folder has no findings.
        repair: Sets damaged files aside, deletes outdated ones, adds unlisted ones to the index, and removes missing
            ones from it.
        progress: Called with the number of slices read and their total.

    Returns:
        All irregularities, with those that were repaired.
    """
    if store.files is None or store.index is None:
        return []
    store.flush()
    listed = {row.key for row in store.index.rows()}
    there = list(store.files)
    leftovers = [path.name for path in store.files.leftovers()]
    findings = []
    for done, key in enumerate(there):
        try:
            if store.files.check(key) and key not in listed:
                findings.append(Finding("unlisted", key))
        except Outdated as outdated:
            findings.append(Finding("outdated", key, str(outdated)))
            if repair:
                store.discard(key)
        except (Damaged, OSError) as damaged:
            findings.append(Finding("damaged", key, str(damaged)))
            if repair:
                store.discard(key, aside=True)
        if progress:
            progress(done + 1, len(there))
    missing = listed.difference(there)
    findings += [Finding("missing", key) for key in sorted(missing) if key not in store.files]
    findings += [Finding("leftover", name) for name in leftovers]
    if repair:
        store.index.remove(finding.name for finding in findings if finding.kind == "missing")
        rebuild(store.index, store.files)
    return findings


def collect(store: Store, budget: int | None = None) -> int:
    """Deletes leftovers, brings the index up to date, and evicts slices beyond the budget. Returns the bytes freed.

    ``budget``, in bytes, replaces the budgets of all processes before; ``None`` uses the store's.
    """
    if store.files is None or store.index is None:
        return 0
    store.flush()
    freed = 0
    for path in list(store.files.leftovers()):
        # Another process may rename a temporary file at this moment.
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if time.time() - found.st_mtime > _YOUNG or path.suffix == ".damaged":
                if stat.S_ISDIR(found.st_mode):
                    shutil.rmtree(path)
                else:
                    path.unlink()
                    freed += found.st_size
    store.index.remove(store.index.unfinished(_YOUNG))
    store.index.remove([row.key for row in store.index.rows() if row.key not in store.files])
    rebuild(store.index, store.files)
    size = store.disk_budget if budget is None else budget
    return freed + store.index.shrink(size, store.files.drop, given=budget is not None)


def remove(store: Store, keys: Iterable[str]) -> None:
    """Deletes slices."""
    for key in keys:
        store.discard(key)

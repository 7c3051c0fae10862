"""Looking after a store: checking every slice, clearing up, and keeping to the budget."""

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

_YOUNG = 600.0  # seconds: what is younger may still be in the making

Kind: TypeAlias = Literal["damaged", "missing", "unlisted", "outdated", "leftover"]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    ``damaged``: a file that is not the slice that it claims to be. ``missing``: a slice in the index without its file.
    ``unlisted``: a file that the index does not know. ``outdated``: a slice of another version. ``leftover``: what a
    killed writer left, or a file set aside.
    """

    kind: Kind
    name: str
    detail: str = ""

    @property
    def harmless(self) -> bool:
        """Whether a crash or an update leaves such a thing, and no slice is lost or wrong by it."""
        return self.kind in {"unlisted", "outdated", "leftover"}


def verify(
    store: Store, *, repair: bool = False, progress: Callable[[int, int], object] | None = None
) -> list[Finding]:
    """Read every slice on disk in full and compare it with its hash, its key and the index.

    ``repair`` sets damaged files aside, deletes outdated ones, lists what is not listed, and strikes out what is
    missing. ``progress(done, total)`` is told about slices. The content is compared with its hash and the key with all
    that it is made from.
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
    """Delete leftovers and what is over the budget, and bring the index up to date; gives the bytes freed.

    A ``budget`` that is given takes the place of what any process kept to before.
    """
    if store.files is None or store.index is None:
        return 0
    store.flush()
    freed = 0
    for path in list(store.files.leftovers()):
        # Another process may be about to give a file its name.
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
    """Delete slices."""
    for key in keys:
        store.discard(key)

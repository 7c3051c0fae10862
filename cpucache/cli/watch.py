"""``cpucache encode --watch``: encodes again what an edit made stale."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from cpucache.cli.console import err
from cpucache.errors import CpucacheError, PMLError
from cpucache.pml.tree import Prompt, Schema

Asked: TypeAlias = Mapping[Schema, list[Prompt]]
"""Schemas, with the likely prompts on each."""
_EVERY = 0.25
"""Seconds between two looks at the files. Looking at some dozen files takes a millisecond, and works everywhere."""
_RETRY = 1.0
"""Seconds until documents that can't be used are read again: a ``src`` file may have come that is not watched yet."""

_Seen: TypeAlias = dict[Path, tuple[int, int, int] | None]


def watch_for_edits(
    read: Callable[[], Asked], asked: Asked, named: Iterable[str], encode: Callable[[Schema, list[Prompt]], None]
) -> None:
    """Encode schemas whose files change, until Ctrl-C.

    Mistakes that an edit leaves are printed; the watch then waits for the next edit.

    Args:
        read: Reads all schemas and prompts again. May raise ``PMLError``.
        asked: What was read, and encoded.
        named: The files of schemas and prompts that were named.
        encode: Encodes the missing slices of a schema.
    """
    try:
        _watch(read, asked, {Path(name) for name in named}, encode)
    except KeyboardInterrupt:
        # Ctrl-C is the normal end of a watch, also while slices are encoded: the exit status is 0.
        err.print("the watch has ended; all encoded slices are saved", soft_wrap=True)


def _watch(
    read: Callable[[], Asked], asked: Asked, files: set[Path], encode: Callable[[Schema, list[Prompt]], None]
) -> None:
    told: list[str] = []
    seen = _seen(files | _files(asked))
    err.print(f"waiting for edits of {_count(len(seen))} (Ctrl-C ends)", soft_wrap=True)
    while True:
        now = _settled(seen, _RETRY if told else None)
        changed = {path for path, what in now.items() if what != seen.get(path)}
        try:
            new = read()
        except PMLError as error:
            seen = now
            mistakes = [str(mistake) for mistake in (error, *error.others)]
            if mistakes != told:
                told = mistakes
                for mistake in mistakes:
                    err.print(f"cpucache: {mistake}", markup=False, soft_wrap=True)
            continue
        edited = [schema for schema in new if told or changed & _files({schema: new[schema]})]
        told = []
        # Edits during encoding are found afterwards.
        seen = {path: now.get(path, what) for path, what in _seen(files | _files(new)).items()}
        _encode_all(edited, new, encode)


def _encode_all(edited: Iterable[Schema], asked: Asked, encode: Callable[[Schema, list[Prompt]], None]) -> None:
    for schema in edited:
        try:
            encode(schema, asked[schema])
        except CpucacheError as error:
            # For example, the disk is full: after another edit it may have room.
            err.print(f"cpucache: {error}", markup=False, soft_wrap=True)


def _settled(seen: _Seen, patience: float | None) -> _Seen:
    """Returns the state of files after a change, or after ``patience`` seconds. Waits for the end of a write."""
    begun = time.monotonic()
    before = seen
    while True:
        time.sleep(_EVERY)
        now = _seen(seen)
        if now == before and (now != seen or (patience is not None and time.monotonic() - begun > patience)):
            return now
        before = now


def _files(asked: Asked) -> set[Path]:
    """The files that schemas and prompts were read from."""
    files = {Path(schema.file) for schema in asked}
    files.update(source for schema in asked for source in schema.sources)
    files.update(Path(prompt.file) for prompts in asked.values() for prompt in prompts)
    return files


def _seen(paths: Iterable[Path]) -> _Seen:
    """Returns what identifies a version of each file: time of change, size and inode."""
    seen: _Seen = {}
    for path in paths:
        try:
            status = path.stat()
            seen[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            seen[path] = None
    return seen


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files} files"

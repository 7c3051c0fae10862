"""A folder of files as a schema, with one module per file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from cpucache.authoring.writing import Names, Source, impossible, slug
from cpucache.errors import InputError
from cpucache.pml.limits import Limits, TooLarge, read_regular
from cpucache.pml.tree import SchemaNode

_IGNORE = ".gitignore"
_GIT = ".git"


@dataclass
class Gathered:
    """Modules of files. ``tokens``: number of tokens of each module by name, if counted."""

    nodes: list[SchemaNode] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Files that were left out, each with the reason."""


def from_files(
    folder: Path,
    patterns: Sequence[str],
    *,
    base: Path,
    exclude: Path | None = None,
    budget: int | None = None,
    count: Callable[[str], int] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Gathered:
    """Returns files as modules with ``src``, in the order of their paths.

    Files that git ignores are skipped. Files that are empty, too large, not UTF-8 text or outside ``base`` are left
    out, with the reason.

    Args:
        folder: Folder in which the files are searched.
        patterns: Glob patterns relative to ``folder``, such as ``**/*.md``.
        base: Folder of the schema, to which ``src`` is relative.
        exclude: File to skip, such as the schema itself.
        budget: Most tokens of all modules together. A file that exceeds the rest is left out; later files may fit.
        count: Returns the number of tokens of a text; without it, ``budget`` has no effect.
        progress: Called with the number of files read so far and of all files.

    Returns:
        The modules, their tokens, and the files left out.

    Raises:
        InputError: No file matches, or a pattern is not valid.
    """
    gathered = Gathered()
    names = Names()
    limits = Limits()
    paths = list(_found(folder, patterns, exclude))
    if not paths:
        raise InputError(f"{folder}: no file matches {' or '.join(patterns)}, or git ignores all that match")
    total, size = 0, 0
    for at, path in enumerate(paths):
        progress(at, len(paths))
        shown = path.relative_to(folder).as_posix()
        text, wrong = _read(path, limits)
        size += len(text.encode())
        if not wrong and size > limits.sources:
            wrong = f"brings all files to more than {limits.sources:,} bytes"
        src = _src(path, base)
        if not wrong and src is None:
            wrong = "is outside the schema's folder"
        tokens = count(text) if count is not None and not wrong else None
        if tokens is not None and budget is not None and total + tokens > budget:
            wrong = f"has {tokens:,} tokens; {budget - total:,} of the budget are left"
        if wrong or src is None:
            gathered.left[shown] = wrong
            continue
        name = names.module(slug(shown, otherwise="file"))
        gathered.nodes.append(Source(name, (), True, at, src=src))
        if tokens is not None:
            total += tokens
            gathered.tokens[name] = tokens
    progress(len(paths), len(paths))
    return gathered


def _src(path: Path, base: Path) -> str | None:
    resolved = path.resolve()
    return resolved.relative_to(base.resolve()).as_posix() if resolved.is_relative_to(base.resolve()) else None


def _read(path: Path, limits: Limits) -> tuple[str, str]:
    """Text of a file, and the reason why it can't be used (empty: it can)."""
    try:
        text = read_regular(path, limits.source).decode()
    except UnicodeDecodeError:
        return "", "is not UTF-8 text"
    except TooLarge as error:
        return "", f"{error.strerror}"
    except OSError as error:
        return "", f"can't be read: {error.strerror}"
    if char := impossible(text.replace("\r", "")):
        return "", f"is not a text: it contains {char}"
    return text, "" if text.strip() else "is empty"


def _found(folder: Path, patterns: Iterable[str], exclude: Path | None) -> Iterator[Path]:
    """Yields the files that match a pattern and that git does not ignore, in the order of their paths."""
    try:
        matched = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{' '.join(patterns)}: not a valid pattern: {error}") from error
    ignored = _Ignored(folder)
    excluded = exclude.resolve() if exclude is not None else None
    for path in sorted(matched, key=lambda path: path.relative_to(folder).parts):
        if path.resolve() != excluded and not ignored.has(path):
            yield path


class _Ignored:
    """Files that git ignores, by the ``.gitignore`` files in a folder, below it, and above it in the repository."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        # Git reads the files from the root of the repository down; without a repository, the folder is the root.
        around = [folder, *folder.parents]
        root = next((each for each in around if (each / _GIT).exists()), folder)
        self._folder = folder
        self._root = root
        self._specs: dict[Path, GitIgnoreSpec | None] = {}
        self._folders: dict[Path, bool] = {}

    def has(self, path: Path) -> bool:
        """Whether git ignores a file or a folder around it."""
        here = path.parent.resolve() / path.name
        if not here.is_relative_to(self._root):  # reached through a symbolic link
            return False
        return self._in_ignored(here.parent) or self._matches(here, "")

    def _in_ignored(self, folder: Path) -> bool:
        if folder == self._root or not folder.is_relative_to(self._root):
            return False
        if folder not in self._folders:
            is_git = folder.name == _GIT
            self._folders[folder] = is_git or self._in_ignored(folder.parent) or self._matches(folder, "/")
        return self._folders[folder]

    def _matches(self, path: Path, end: str) -> bool:
        """Verdict of the nearest ``.gitignore`` that has a rule for ``path``. ``end``: ``"/"`` for a folder."""
        for folder in path.parents:
            spec = self._spec(folder)
            if spec is not None:
                told = spec.check_file(path.relative_to(folder).as_posix() + end).include
                if told is not None:
                    return told
            if folder == self._root:
                break
        return False

    def _spec(self, folder: Path) -> GitIgnoreSpec | None:
        if folder not in self._specs:
            try:
                lines = (folder / _IGNORE).read_text(encoding="utf-8", errors="replace").splitlines()
                self._specs[folder] = GitIgnoreSpec.from_lines(lines)
            except OSError:
                self._specs[folder] = None
        return self._specs[folder]

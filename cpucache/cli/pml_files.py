"""Schemas and prompts named on the command line: many at once, by patterns and folders."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cpucache.errors import InputError


@dataclass(frozen=True)
class Named:
    """A file to read. ``found``: by a pattern or in a folder, and not named itself."""

    name: str
    found: bool = False


def named_files(arguments: Iterable[str]) -> list[Named]:
    """The files that arguments name, each once, in order.

    Args:
        arguments: Names of files, patterns such as ``schemas/**/*.xml``, folders (for all ``.xml`` files in them, at
            any depth), and ``-`` for standard input.

    Raises ``InputError`` for a pattern or folder without any file.
    """
    files: dict[str, Named] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(str(each) for each in path.rglob("*.xml") if each.is_file())
        elif glob.has_magic(argument) and not os.path.lexists(path):
            # Unlike the function of ``Path``, this accepts absolute patterns.
            matches = glob.glob(argument, recursive=True)  # noqa: PTH207
            found = sorted(each for each in matches if Path(each).is_file())
        else:
            files.setdefault(argument, Named(argument))
            continue
        if not found:
            raise InputError(f"{argument}: " + ("no .xml file in this folder" if path.is_dir() else "matches no file"))
        for name in found:
            files.setdefault(name, Named(name, found=True))
    return list(files.values())


def write_file(path: Path, text: str) -> None:
    """Writes a file; replaces an existing one."""
    if path.exists():
        write_over(path, text)
    else:
        path.write_text(text, encoding="utf-8", newline="")


def write_over(path: Path, text: str) -> None:
    """Write a file that takes the place of one that there is, or leave that as it is."""
    path = path.resolve()
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            Path(file.name).chmod(path.stat().st_mode & 0o7777)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise

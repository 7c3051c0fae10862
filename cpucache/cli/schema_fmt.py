"""``cpucache schema fmt``: writes canonical PML, and repairs documents that other tools accept."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.text import Text

from cpucache.cli.console import err, out, printed
from cpucache.cli.pml_files import named_files, write_over
from cpucache.errors import InputError, PMLError
from cpucache.pml import Limits, canonical
from cpucache.pml.canonical import parse_pml
from cpucache.pml.mend import mend
from cpucache.pml.xml import read_file

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--fix", is_flag=True, help="Escape stray < and & in text, and change nothing else. Asks first.")
@click.option("--yes", is_flag=True, help="With --fix: write without asking.")
@click.option("--check", "check_only", is_flag=True, help="Write nothing; exit status 1 if a file would change.")
@click.option("--diff", "show_diff", is_flag=True, help="Like --check, and show what would change.")
def fmt(files: tuple[str, ...], fix: bool, yes: bool, check_only: bool, show_diff: bool) -> None:
    """Write each FILE, a schema or prompt, in canonical form; - reads standard input and writes standard output.

    FILE may be a pattern, such as 'schemas/**/*.xml', or a folder, for all .xml files in it. The canonical form parses
    into the same tree, so that every slice stays valid: tags are indented and attributes put in order; texts,
    comments and CDATA sections stay as they are written.

    --fix escapes each < and & in text that begins no tag and no reference, as in a line of code such as
    "0 <= position[0] < self.grid_size". It shows the difference, and asks before it writes.

    \b
    cpucache schema fmt schemas
    cpucache schema fmt --fix schema.xml
    """
    if yes and not fix:
        raise InputError("--yes needs --fix: without --fix, files are written without asking")
    formatting = _Formatting(fix=fix, yes=yes, show_diff=show_diff, writes=not (check_only or show_diff))
    for file in named_files(files):
        try:
            formatting.file(file.name)
        except PMLError as error:
            formatting.tell(error)
    if formatting.wrong:
        sys.exit(2)
    if formatting.left:
        sys.exit(1)


class _Formatting:
    def __init__(self, *, fix: bool, yes: bool, show_diff: bool, writes: bool) -> None:
        self._fix = fix
        self._yes = yes
        self._show_diff = show_diff
        self._writes = writes
        self.wrong = False
        """Whether a document breaks the rules of PML."""
        self.left = False
        """Whether a document was not written that would be another."""

    def tell(self, error: PMLError) -> None:
        """Prints every mistake of a document."""
        self.wrong = True
        for mistake in (error, *error.others):
            err.print(f"cpucache: {mistake}", markup=False, soft_wrap=True)

    def file(self, name: str) -> None:
        """Formats or repairs one file. Raises ``PMLError``."""
        if name == "-":
            data, shown, folder = sys.stdin.buffer.read(), "<stdin>", Path.cwd()
        else:
            data, shown, folder = read_file(Path(name), Limits()), name, Path(name).parent
        written = self._mended(data, shown, folder) if self._fix else canonical(data, file=shown, folder=folder)
        before = data.decode()
        same = written == before
        if self._show_diff or (self._fix and name != "-" and not same):
            _print(difflib.unified_diff(before.splitlines(), written.splitlines(), name, name, lineterm=""))
        if name == "-" and self._writes:
            click.echo(written, nl=False)
        elif same:
            self._say(f"{name}: nothing to {'fix' if self._fix else 'change'}")
        elif not self._writes:
            self.left = True
            self._say(f"{name}: would be {'fixed' if self._fix else 'formatted'}")
        elif self._fix and not self._agreed(name):
            self.left = True
            self._say(f"{name}: left unchanged")
        else:
            write_over(Path(name), written)
            self._say(f"{name}: {'fixed' if self._fix else 'formatted'}")

    def _mended(self, data: bytes, shown: str, folder: Path) -> str:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            # The error of the parser says where.
            parse_pml(data, file=shown, folder=folder)
            raise
        try:
            parse_pml(text, file=shown, folder=folder)
        except PMLError:
            written = mend(text)
            # Remaining mistakes have the right lines: mending adds and removes no line.
            parse_pml(written, file=shown, folder=folder)
            return written
        return text

    def _agreed(self, name: str) -> bool:
        if self._yes:
            return True
        try:
            return click.confirm(printed(f"write {name}?"), err=True)
        except click.Abort:
            if sys.stdin.isatty():
                raise
            # The input has ended, and there is no terminal to ask at.
            click.echo(err=True)
            err.print("cpucache: not written; --yes writes without asking", markup=False, soft_wrap=True)
            return False

    def _say(self, line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        out.print(Text(line, _STYLES.get(line[:1], "")), soft_wrap=True)

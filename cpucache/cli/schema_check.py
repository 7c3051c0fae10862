"""``cpucache schema check``: every mistake of schemas and prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpucache.cli.console import check_prompt, err, out, read_prompt, read_schema
from cpucache.cli.options import positions_option
from cpucache.cli.pml_files import Named, named_files
from cpucache.errors import InputError, PMLError
from cpucache.pml import Limits, parse_prompt, parse_schema
from cpucache.pml.canonical import root_of
from cpucache.pml.problems import MOST_PROBLEMS
from cpucache.pml.tree import Prompt, Schema
from cpucache.pml.xml import read_file

if TYPE_CHECKING:
    from cpucache.cli.schema_layout import Looked
    from cpucache.layout import Positions

_STDIN = "untitled:stdin"
"""URI of standard input."""


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="PROMPT",
    help="Also check this prompt against the schemas. Repeatable.",
)
@click.option("-m", "--model", "models", multiple=True, help="Also lay the schemas out for this model. Repeatable.")
@positions_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array: the diagnostics of each file, as in LSP.")
def check(
    files: tuple[str, ...], prompts: tuple[str, ...], models: tuple[str, ...], positions: Positions, as_json: bool
) -> None:
    """Check each schema FILE (- for standard input), and each PROMPT against the one that it is written for.

    FILE may be a pattern, such as 'schemas/**/*.xml', or a folder, for all .xml files in it. Prompts found in this way
    are checked against the schemas found.

    Every mistake is printed, with its line; text that is not well-formed XML hides mistakes after it. With -m the
    schemas are also laid out, which finds mistakes that only a tokenizer finds: scaffolds longer than their parameter,
    schemas longer than the model can hold.

    --json prints what a language server would publish: an array with, of each file, its "uri" and its "diagnostics",
    whose positions count lines and UTF-16 units from 0.

    \b
    cpucache schema check schemas/trip/schema.xml -p schemas/trip/kyoto-first-visit.xml
    cpucache schema check schemas --json
    """
    if (*files, *prompts).count("-") > 1:
        raise InputError("only one schema or prompt can be standard input (-)")
    checking = _Checking(named_files(files), [_looked(name, positions) for name in models], silent=as_json)
    checking.run(prompts)
    if as_json:
        click.echo(json.dumps(checking.diagnostics(), indent=2))
    sys.exit(2 if checking.wrong else 0)


def _looked(name: str, positions: Positions) -> Looked:
    from cpucache.cli.schema_layout import Looked

    return Looked(name, positions)


class _Checking:
    """Problems found in files. ``silent``: nothing is printed."""

    def __init__(self, files: list[Named], models: list[Looked], *, silent: bool) -> None:
        self._files = files
        self._models = models
        self._silent = silent
        self._mistakes: dict[str, list[InputError]] = {}
        self._schemas: list[Schema] = []
        self._unread = 0

    @property
    def wrong(self) -> bool:
        """Whether anything is wrong."""
        return any(self._mistakes.values())

    def run(self, prompts: Sequence[str]) -> None:
        """Check the files, and prompts besides."""
        found: list[Prompt] = []
        for file in self._files:
            self._mistakes[file.name] = []
            try:
                parsed = _read(file)
            except InputError as error:
                self._unread += 1
                self._tell(file.name, error)
                continue
            if isinstance(parsed, Prompt):
                found.append(parsed)
                continue
            try:
                self._schema(file.name, parsed)
            except InputError as error:
                self._tell(file.name, error)
        for prompt in found:
            self._prompt(prompt.file, prompt)
        for name in prompts:
            self._mistakes.setdefault(name, [])
            try:
                self._prompt(name, read_prompt(name), named=True)
            except InputError as error:
                self._tell(name, error)

    def _schema(self, name: str, schema: Schema) -> None:
        self._schemas.append(schema)
        if not self._models:
            self._say(f"{name}: schema '{schema.name}' is fine")
            return
        for looked in self._models:
            layout = looked.lay(schema)
            total = sum(len(segment.tokens) for segment in layout.segments)
            self._say(
                f"{name}: schema '{schema.name}' is fine under {looked.model.path.stem}: "
                f"{layout.length:,} {layout.positions} positions, {total:,} tokens"
            )

    def _prompt(self, name: str, prompt: Prompt, *, named: bool = False) -> None:
        """Check a prompt against its schema. ``named``: it must have one."""
        known = {schema.name for schema in self._schemas}
        try:
            if self._unread and prompt.schema not in known:
                raise InputError(f"{name}: not checked against its schema '{prompt.schema}', which can't be used")
            if not named and prompt.schema not in known:
                self._say(f"{name}: the prompt is fine, but not checked against '{prompt.schema}', which was not given")
                return
            # If several folders have schemas of the same name, a prompt is for the schema in its own folder.
            folder = Path(prompt.file).parent
            schemas = sorted(self._schemas, key=lambda schema: Path(schema.file).parent != folder)
            fitting = check_prompt(prompt, schemas)
            self._say(f"{name}: the prompt fits schema '{fitting.name}'")
        except InputError as error:
            self._tell(name, error)

    def _say(self, line: str) -> None:
        if not self._silent:
            out.print(line, markup=False, soft_wrap=True)

    def _tell(self, name: str, error: InputError) -> None:
        """Keep every mistake, and print each on a line."""
        mistakes = (error, *error.others) if isinstance(error, PMLError) else (error,)
        self._mistakes[name] += mistakes
        if self._silent:
            return
        for mistake in mistakes:
            err.print(f"cpucache: {mistake}", markup=False, soft_wrap=True)
        if len(mistakes) == MOST_PROBLEMS:
            err.print(
                "cpucache: too many mistakes: the rest of the input was not checked", markup=False, soft_wrap=True
            )

    def diagnostics(self) -> list[dict[str, Any]]:
        """Returns the diagnostics of each file, in the form that language servers publish."""
        return [
            {
                "uri": _STDIN if name == "-" else Path(name).absolute().as_uri(),
                "diagnostics": [_diagnostic(mistake, lines) for mistake in mistakes],
            }
            for name, mistakes in self._mistakes.items()
            for lines in [_lines(name) if mistakes else []]
        ]


def _read(file: Named) -> Schema | Prompt:
    """A schema, or a prompt among the files that were found."""
    if not file.found:
        return read_schema(file.name)
    path = Path(file.name)
    data = read_file(path, Limits())
    if root_of(data.decode(errors="replace")) == "prompt":
        return parse_prompt(data, file=file.name)
    return parse_schema(data, file=file.name, folder=path.parent)


def _lines(name: str) -> list[str]:
    try:
        data = b"" if name == "-" else read_file(Path(name), Limits())
    except PMLError:
        return []
    # The parser counts lines in the same way.
    return data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").split("\n")


def _diagnostic(mistake: InputError, lines: list[str]) -> dict[str, Any]:
    line = column = None
    if isinstance(mistake, PMLError):
        line, column = mistake.line, mistake.column
    at = max(0, (line or 1) - 1)
    text = lines[at] if line and at < len(lines) else ""
    begin = min(column - 1, len(text)) if column else len(text) - len(text.lstrip())
    end = max(begin, len(text.rstrip()))
    return {
        "range": {
            "start": {"line": at, "character": _units(text[:begin])},
            "end": {"line": at, "character": _units(text[:end])},
        },
        "severity": 1,
        "source": "cpucache",
        "message": mistake.reason if isinstance(mistake, PMLError) else str(mistake),
    }


def _units(text: str) -> int:
    """Returns the number of UTF-16 code units of a text."""
    return len(text.encode("utf-16-le", errors="replace")) // 2

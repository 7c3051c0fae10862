"""``cpucache schema``: check schemas, and show how they are laid out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import click
from rich.table import Table
from rich.text import Text

from cpucache.cli.console import check_prompt, err, out, read_prompt, read_schema
from cpucache.cli.options import model_option, positions_option
from cpucache.errors import InputError, PMLError
from cpucache.layout import ChatTemplate, Extent, Positions, SchemaLayout
from cpucache.models import resolve_model
from cpucache.pml.problems import MOST_PROBLEMS
from cpucache.pml.tree import Schema
from cpucache.runtime import Model

_BAR = 40
_LEAST_BAR = 8
_GAP = 2
_STYLES = {"schema": "bold", "module": "cyan", "union": "magenta", "parameter": "yellow"}


@click.group()
def schema() -> None:
    """Check schemas, and show how they are laid out under a model."""


@schema.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="PROMPT",
    help="Check this prompt against them, too. Repeatable.",
)
@click.option("-m", "--model", "models", multiple=True, help="Lay them out under this model, too. Repeatable.")
@positions_option
def check(files: tuple[str, ...], prompts: tuple[str, ...], models: tuple[str, ...], positions: Positions) -> None:
    """Check each schema FILE (- for standard input), and each PROMPT against the one that it is written for.

    Every mistake is told, with its line; only what is not well-formed XML hides what comes after. With -m the schemas
    are also laid out, which finds what only a tokenizer can tell: scaffolds longer than their parameter, schemas longer
    than the model can hold.

    \b
    cpucache schema check schemas/trip/schema.xml -p schemas/trip/kyoto-first-visit.xml
    """
    if (*files, *prompts).count("-") > 1:
        raise InputError("only one schema or prompt can be standard input (-)")
    wrong = 0
    schemas = []
    loaded = [Model(resolve_model(name), vocab_only=True) for name in models]
    for file in files:
        try:
            parsed = read_schema(file)
            schemas.append(parsed)
            if not loaded:
                out.print(f"{file}: schema '{parsed.name}' is fine", markup=False, soft_wrap=True)
            for model in loaded:
                layout = _layout(parsed, model, positions)
                total = sum(len(segment.tokens) for segment in layout.segments)
                out.print(
                    f"{file}: schema '{parsed.name}' is fine under {model.path.stem}: "
                    f"{layout.length:,} {layout.positions} positions, {total:,} tokens",
                    markup=False,
                    soft_wrap=True,
                )
        except InputError as error:
            _tell(error)
            wrong += 1
    unread = len(files) - len(schemas)
    for name in prompts:
        try:
            prompt = read_prompt(name)
            if unread and prompt.schema not in {schema.name for schema in schemas}:
                raise InputError(f"{name}: not checked against its schema '{prompt.schema}', which can't be used")
            fitting = check_prompt(prompt, schemas)
            out.print(f"{name}: the prompt fits schema '{fitting.name}'", markup=False, soft_wrap=True)
        except InputError as error:
            _tell(error)
            wrong += 1
    sys.exit(2 if wrong else 0)


def _tell(error: InputError) -> None:
    """Print every mistake, each on a line."""
    mistakes = (error, *error.others) if isinstance(error, PMLError) else (error,)
    for mistake in mistakes:
        err.print(f"cpucache: {mistake}", markup=False, soft_wrap=True)
    if len(mistakes) == MOST_PROBLEMS:
        err.print("cpucache: after so many mistakes the rest is not looked at", markup=False, soft_wrap=True)


@schema.command(short_help="Draw how a schema is laid out.")
@click.argument("file")
@model_option
@positions_option
def show(file: str, model: str, positions: Positions) -> None:
    """Draw how a schema FILE is laid out: its modules, their tokens, and the positions that they take.

    Members of a union start at the same position. A module's own tokens are what is encoded and saved for it; what is
    nested in it counts for itself. Bytes are for keys and values of 16 bits, for one slice of everything.
    """
    parsed = read_schema(file)
    loaded = Model(resolve_model(model), vocab_only=True)
    layout = _layout(parsed, loaded, positions)
    rows = [_row(prefix, extent) for prefix, extent in _extents(layout.extent, "", "")]
    columns = [
        ["tokens", *(f"{row.tokens:,}" if row.tokens else "" for row in rows)],
        ["positions", *(f"{row.start:,}-{row.end:,}" for row in rows)],
    ]
    scale = f"0 to {layout.length:,}"
    # The names get what they need; of what stands behind them a narrow terminal shows as much as it has room for.
    room = out.width - max(row.label.cell_len for row in rows)
    table = Table.grid(padding=(0, _GAP))
    table.add_column(overflow="fold")
    cells: list[list[Text]] = [[Text(), *(row.label for row in rows)]]
    for heading, *values in columns:
        room -= _GAP + max(map(len, [heading, *values]))
        if room >= 0:
            table.add_column(justify="right", no_wrap=True)
            cells.append([Text(heading, "dim"), *map(Text, values)])
    width = min(_BAR, room - _GAP)
    if width >= max(_LEAST_BAR, len(scale)):
        table.add_column(no_wrap=True)
        cells.append([Text(scale, "dim"), *(Text(_bar(row, layout.length, width), row.style) for row in rows)])
    for line in zip(*cells, strict=True):
        table.add_row(*line)
    out.print(table)
    anchor = "" if parsed.anchor == "ancestors" else f", anchor {parsed.anchor}"
    _say(f"{_cost(layout, loaded)}, {layout.positions} positions{anchor}")
    for scaffold in parsed.scaffolds:
        _say(f"scaffold: {' + '.join(module.name for module in scaffold.modules)}")


def _layout(parsed: Schema, model: Model, positions: Positions) -> SchemaLayout:
    template = ChatTemplate(model.chat_template, bos=model.special_text("bos"), eos=model.special_text("eos"))
    return SchemaLayout(parsed, model, template, positions)


def _say(line: str) -> None:
    # A terminal would break the line inside a word; what reads a pipe wants it whole.
    out.print(line, style="dim", markup=False, soft_wrap=not out.is_terminal)


def _cost(layout: SchemaLayout, model: Model) -> str:
    segments = layout.segments
    tokens = sum(len(segment.tokens) for segment in segments)
    each = _bytes_of_a_token(model)
    size = f", {tokens * each / 2**20:,.1f} MiB" if each else ""
    return f"{tokens:,} tokens in {len(segments)} {'segment' if len(segments) == 1 else 'segments'}{size}"


def _bytes_of_a_token(model: Model) -> int | None:
    """Of its keys and values as f16, where the file tells it of all layers alike: nothing but its metadata is read."""

    def number(name: str) -> int:
        text = model.meta(f"{model.architecture}.{name}") or ""
        return int(text) if text.isdecimal() else 0

    heads = number("attention.head_count")
    size = number("embedding_length") // heads if heads else 0
    key = number("attention.key_length") or size
    value = number("attention.value_length") or size
    return number("block_count") * (number("attention.head_count_kv") or heads) * (key + value) * 2 or None


@dataclass
class _Row:
    label: Text
    style: str
    tokens: int
    start: int
    end: int
    """The position behind the last."""


def _row(prefix: str, extent: Extent) -> _Row:
    label = Text(prefix, style="dim") + _label(extent)
    return _Row(label, _STYLES[extent.kind], extent.own, extent.start, extent.end)


def _label(extent: Extent) -> Text:
    if extent.kind == "union":
        name = f"one of {len(extent.children)}" + (f" (scaffold {extent.name})" if extent.name else "")
    else:
        name = f"{{{extent.name}}}" if extent.kind == "parameter" else extent.name
    return Text(name, style=_STYLES[extent.kind]) + Text("" if extent.cache else " not cached", style="dim")


def _extents(extent: Extent, prefix: str, below: str) -> Iterator[tuple[str, Extent]]:
    yield prefix, extent
    for index, child in enumerate(extent.children):
        last = index == len(extent.children) - 1
        yield from _extents(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


def _bar(row: _Row, length: int, width: int) -> str:
    """Positions as a stroke on a line that stands for the whole schema."""
    begin = min(width - 1, row.start * width // max(1, length))
    end = max(begin + 1, min(width, -(-row.end * width // max(1, length))))
    return "·" * begin + "█" * (end - begin) + "·" * (width - end)

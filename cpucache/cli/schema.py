"""``cpucache schema``: check schemas, and show how they are laid out."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click
from rich.table import Table
from rich.text import Text

from cpucache.cli.console import err, out, read_schema
from cpucache.cli.options import model_option, positions_option
from cpucache.errors import InputError
from cpucache.layout import ChatTemplate, Extent, Positions, SchemaLayout
from cpucache.models import resolve_model
from cpucache.pml.tree import Schema
from cpucache.runtime import Model

_BAR = 40
_GAP = 2
_STYLES = {"schema": "bold", "module": "cyan", "union": "magenta", "parameter": "yellow"}


@click.group()
def schema() -> None:
    """Check schemas, and show how they are laid out under a model."""


@schema.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-m", "--model", "models", multiple=True, help="Lay them out under this model, too. Repeatable.")
@positions_option
def check(files: tuple[str, ...], models: tuple[str, ...], positions: Positions) -> None:
    """Check each schema FILE (- for standard input).

    Every error names its line. With -m the schemas are also laid out, which finds what only a tokenizer can tell:
    scaffolds longer than their parameter, schemas longer than the model can hold.
    """
    wrong = 0
    loaded = [Model(resolve_model(name), vocab_only=True) for name in models]
    for file in files:
        try:
            parsed = read_schema(file)
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
            err.print(f"cpucache: {error}", markup=False, soft_wrap=True)
            wrong += 1
    sys.exit(2 if wrong else 0)


@schema.command(short_help="Draw how a schema is laid out.")
@click.argument("file")
@model_option
@positions_option
def show(file: str, model: str, positions: Positions) -> None:
    """Draw how a schema FILE is laid out: its modules, their tokens, and the positions that they take.

    Members of a union start at the same position. A module's own tokens are what is encoded and saved for it; what is
    nested in it counts for itself.
    """
    parsed = read_schema(file)
    layout = _layout(parsed, Model(resolve_model(model), vocab_only=True), positions)
    rows = [(Text(prefix, style="dim") + _label(extent), extent) for prefix, extent in _rows(layout.extent, "", "")]
    spans = [f"{extent.start:,}-{extent.end:,}" for _, extent in rows]
    taken = max(label.cell_len for label, _ in rows) + max(map(len, ["positions", *spans])) + len("tokens") + 4 * _GAP
    width = max(8, min(_BAR, out.width - taken))
    table = Table.grid(padding=(0, _GAP))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row("", *(Text(name, style="dim") for name in ("tokens", "positions", f"0 to {layout.length:,}")))
    for (label, extent), span in zip(rows, spans, strict=True):
        table.add_row(
            label,
            f"{extent.own:,}" if extent.own else "",
            span,
            Text(_bar(extent, layout.length, width), _STYLES[extent.kind]),
        )
    out.print(table)
    total = sum(len(segment.tokens) for segment in layout.segments)
    out.print(f"{total:,} tokens in {len(layout.segments)} segments, {layout.positions} positions", style="dim")


def _layout(parsed: Schema, model: Model, positions: Positions) -> SchemaLayout:
    template = ChatTemplate(model.chat_template, bos=model.special_text("bos"), eos=model.special_text("eos"))
    return SchemaLayout(parsed, model, template, positions)


def _label(extent: Extent) -> Text:
    if extent.kind == "union":
        name = f"one of {len(extent.children)}" + (f" (scaffold {extent.name})" if extent.name else "")
    else:
        name = f"{{{extent.name}}}" if extent.kind == "parameter" else extent.name
    return Text(name, style=_STYLES[extent.kind]) + Text("" if extent.cache else " not cached", style="dim")


def _rows(extent: Extent, prefix: str, below: str) -> Iterator[tuple[str, Extent]]:
    yield prefix, extent
    for index, child in enumerate(extent.children):
        last = index == len(extent.children) - 1
        yield from _rows(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


def _bar(extent: Extent, length: int, width: int) -> str:
    """The extent's positions as a stroke on a line that stands for the whole schema."""
    begin = min(width - 1, extent.start * width // max(1, length))
    end = max(begin + 1, min(width, -(-extent.end * width // max(1, length))))
    return "·" * begin + "█" * (end - begin) + "·" * (width - end)

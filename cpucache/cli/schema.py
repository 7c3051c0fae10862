"""``cpucache schema``: check schemas, and show how they are laid out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click
from rich.table import Table
from rich.text import Text

from cpucache.cli.console import err, out, read_schema
from cpucache.cli.options import model_option, positions_option
from cpucache.errors import InputError
from cpucache.layout import ChatTemplate, Extent, Positions, ScaffoldLayout, SchemaLayout, Segment
from cpucache.layout.lead import LEAD
from cpucache.models import resolve_model
from cpucache.pml.tree import Schema
from cpucache.runtime import Model

_BAR = 40
_GAP = 2
_STYLES = {"schema": "bold", "module": "cyan", "union": "magenta", "parameter": "yellow", "scaffold": "green"}
_NAMES = 30  # characters of a scaffold's names in the drawing


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
    nested in it counts for itself. Scaffolds come last, with the tokens that they are encoded and saved for in
    addition. Bytes are for keys and values of 16 bits.
    """
    parsed = read_schema(file)
    loaded = Model(resolve_model(model), vocab_only=True)
    layout = _layout(parsed, loaded, positions)
    rows = [_row(prefix, extent) for prefix, extent in _extents(layout.extent, "", "")]
    rows += [_scaffold_row(scaffold) for scaffold in layout.scaffolds]
    spans = [f"{row.strokes[0][0]:,}-{row.strokes[-1][1]:,}" for row in rows]
    taken = max(row.label.cell_len for row in rows) + max(map(len, ["positions", *spans])) + len("tokens") + 4 * _GAP
    width = max(8, min(_BAR, out.width - taken))
    table = Table.grid(padding=(0, _GAP))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row("", *(Text(name, style="dim") for name in ("tokens", "positions", f"0 to {layout.length:,}")))
    for row, span in zip(rows, spans, strict=True):
        bar = Text(_bar(row.strokes, layout.length, width), row.style)
        table.add_row(row.label, f"{row.tokens:,}" if row.tokens else "", span, bar)
    out.print(table)
    anchor = "" if parsed.anchor == "ancestors" else f", anchor {parsed.anchor}"
    _say(f"{_cost(layout.apart, loaded)}, {layout.positions} positions{anchor}")
    for scaffold in layout.scaffolds:
        _say(f"scaffold {_names(scaffold)}: {_cost(scaffold.segments, loaded)}")
    if led := layout.leads.segments(LEAD):
        _say(f"again, behind what stands before: {_cost(led, loaded)}")


def _layout(parsed: Schema, model: Model, positions: Positions) -> SchemaLayout:
    template = ChatTemplate(model.chat_template, bos=model.special_text("bos"), eos=model.special_text("eos"))
    return SchemaLayout(parsed, model, template, positions)


def _say(line: str) -> None:
    out.print(line, style="dim", markup=False, soft_wrap=True)


def _cost(segments: Iterable[Segment], model: Model) -> str:
    segments = list(segments)
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
    strokes: list[tuple[int, int]]
    """Positions [start, end), in order."""


def _row(prefix: str, extent: Extent) -> _Row:
    label = Text(prefix, style="dim") + _label(extent)
    return _Row(label, _STYLES[extent.kind], extent.own, [(extent.start, extent.end)])


def _scaffold_row(scaffold: ScaffoldLayout) -> _Row:
    label = Text(f"scaffold {_names(scaffold)}", _STYLES["scaffold"])
    label.truncate(_NAMES, overflow="ellipsis")
    strokes = sorted({(segment.home, segment.end) for segment in scaffold.segment_at.values()}) or [(0, 0)]
    return _Row(label, _STYLES["scaffold"], sum(len(segment.tokens) for segment in scaffold.segments), strokes)


def _names(scaffold: ScaffoldLayout) -> str:
    return " + ".join(module.name for module in scaffold.modules)


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


def _bar(strokes: Iterable[tuple[int, int]], length: int, width: int) -> str:
    """Positions as strokes on a line that stands for the whole schema."""
    line = ["·"] * width
    for start, stop in strokes:
        begin = min(width - 1, start * width // max(1, length))
        end = max(begin + 1, min(width, -(-stop * width // max(1, length))))
        line[begin:end] = "█" * (end - begin)
    return "".join(line)

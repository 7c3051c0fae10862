"""``cpucache schema show``: how a schema is laid out under a model, and what the store has of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cpucache.bench.plot import new_figure
from cpucache.bench.schema_plot import Bar, plot_schema
from cpucache.cli.console import out, read_schema
from cpucache.cli.options import model_option, positions_option
from cpucache.cli.schema_layout import Looked
from cpucache.layout import Extent, Positions, SchemaLayout, Segment
from cpucache.pml.structure import GRAMMARS
from cpucache.reuse.inventory import CachedSlice, inventory

_BAR = 40
_LEAST_BAR = 8
_GAP = 2
_STYLES = {"schema": "bold", "module": "cyan", "union": "magenta", "parameter": "yellow"}
_SPARSE = 0.5
"""The share of its union that a member leaves empty for it to be spoken of."""
_NAMED = 3
"""Members that are spoken of."""


@dataclass(frozen=True)
class _Row:
    """A line of the drawing."""

    prefix: str
    extent: Extent
    path: str
    """Dotted path of the module; empty for text of the schema."""
    unused: int
    """Positions of its union that a member leaves empty."""
    segments: tuple[tuple[Segment, list[CachedSlice]], ...]
    """Its own text, with the slices that are in the store."""

    @property
    def saved(self) -> bool:
        """Whether it has text of its own of which slices are saved."""
        return bool(self.segments) and self.extent.cache

    @property
    def cached(self) -> int:
        """Tokens of which there is a slice."""
        return sum(len(segment.tokens) for segment, slices in self.segments if slices)

    @property
    def contexts(self) -> dict[tuple[str, ...], int]:
        """Returns the contexts of its slices, each with the number of tokens."""
        found: dict[tuple[str, ...], int] = {}
        for segment, slices in self.segments:
            for attended in {slice_.attended for slice_ in slices}:
                # A text that is cut into several slices attends to its own beginning.
                others = tuple(name for name in attended if name != (self.path or "(schema)"))
                found[others] = found.get(others, 0) + len(segment.tokens)
        return found


@click.command()
@click.argument("file")
@model_option
@positions_option
@click.option("--contexts", is_flag=True, help="List the modules that the slices of each module were evaluated after.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it into this file, .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(file: str, model: str, positions: Positions, contexts: bool, plot: Path | None, as_json: bool) -> None:
    """Draw how a schema FILE is laid out: its modules, their tokens, and the positions that they take.

    Members of a union start at the same position; positions that a shorter member leaves empty are listed as unused.
    The tokens of a module are those of its own text, without nested modules. Bytes are those of one slice of all text,
    with keys and values of 16 bits.

    "cached" is the share of a module's own text that has slices in the store, with the number of contexts in which
    these were evaluated, if more than one (--contexts lists them).
    """
    parsed = read_schema(file)
    if plot:
        # An error that would come at the end comes now.
        new_figure(plot)
    looked = Looked(model, positions)
    layout = looked.lay(parsed)
    slices = inventory(layout, looked.stored[0])
    rows = list(_rows(layout, slices))
    if plot:
        title = f"{parsed.name} under {looked.model.path.stem}: {_cost(layout, looked)}"
        plot_schema([_plotted(row) for row in rows], title, plot)
    if as_json:
        click.echo(json.dumps(_as_dict(layout, looked, rows), indent=2))
        return
    out.print(_table(rows, layout, looked))
    for line in _remarks(rows):
        out.print(Text(line), soft_wrap=not out.is_terminal)
    if contexts:
        for line in _listed(rows):
            out.print(Text(line), soft_wrap=not out.is_terminal)
    anchor = "" if parsed.anchor == "ancestors" else f", anchor {parsed.anchor}"
    _say(f"{_cost(layout, looked)}, {layout.positions} positions{anchor}")
    for scaffold in parsed.scaffolds:
        _say(f"scaffold: {' + '.join(module.name for module in scaffold.modules)}")


def _say(line: str) -> None:
    # A terminal would break the line inside a word; a program that reads a pipe needs whole lines.
    out.print(line, style="dim", markup=False, soft_wrap=not out.is_terminal)


def _cost(layout: SchemaLayout, looked: Looked) -> str:
    segments = layout.segments
    tokens = sum(len(segment.tokens) for segment in segments)
    each = looked.bytes_of_a_token
    size = f", {tokens * each / 2**20:,.1f} MiB" if each else ""
    return f"{tokens:,} tokens in {len(segments)} {'segment' if len(segments) == 1 else 'segments'}{size}"


def _rows(layout: SchemaLayout, slices: dict[Segment, list[CachedSlice]]) -> Iterator[_Row]:
    own: dict[str, list[tuple[Segment, list[CachedSlice]]]] = {}
    for segment in layout.segments:
        own.setdefault(segment.module, []).append((segment, slices[segment]))

    def walk(extent: Extent, prefix: str, below: str, path: str, end: int) -> Iterator[_Row]:
        if extent.kind == "module":
            path = f"{path}.{extent.name}" if path else extent.name
        segments = own.get(path, []) if extent.kind in ("module", "schema") else []
        yield _Row(prefix, extent, path, end - extent.end, tuple(segments))
        for index, child in enumerate(extent.children):
            last = index == len(extent.children) - 1
            # Only reserved positions can be unused.
            union_end = extent.end if extent.kind == "union" and not layout.packed else child.end
            yield from walk(
                child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), path, union_end
            )

    yield from walk(layout.extent, "", "", "", layout.extent.end)


def _label(extent: Extent) -> Text:
    if extent.kind == "union":
        name = f"one of {len(extent.children)}" + (f" (scaffold {extent.name})" if extent.name else "")
    else:
        name = f"{{{extent.name}}}" if extent.kind == "parameter" else extent.name
    return Text(name, style=_STYLES[extent.kind]) + Text("" if extent.cache else " not cached", style="dim")


def _cached(row: _Row) -> str:
    """Returns the cached share of a module's own text, and the number of contexts."""
    if not row.saved:
        return ""
    total = sum(len(segment.tokens) for segment, _ in row.segments)
    share = "yes" if row.cached == total else f"{100 * row.cached // total}%" if row.cached else "no"
    return f"{share}, {len(row.contexts)} contexts" if len(row.contexts) > 1 else share


def _table(rows: list[_Row], layout: SchemaLayout, looked: Looked) -> Table:
    each = looked.bytes_of_a_token
    columns = [
        ["tokens", *(f"{row.extent.own:,}" if row.extent.own else "" for row in rows)],
        ["positions", *(f"{row.extent.start:,}-{row.extent.end:,}" for row in rows)],
        ["cached", *map(_cached, rows)],
        ["unused", *(f"{row.unused:,}" if row.unused else "" for row in rows)],
        ["bytes", *(decimal(row.extent.own * each) if row.saved and each else "" for row in rows)],
    ]
    scale = f"0 to {layout.length:,}"
    # Names are never cut; a narrow terminal shows as many other columns as fit.
    labels = [Text(row.prefix, style="dim") + _label(row.extent) for row in rows]
    room = out.width - max(label.cell_len for label in labels)
    table = Table.grid(padding=(0, _GAP))
    table.add_column(overflow="fold")
    cells: list[list[Text]] = [[Text(), *labels]]
    for heading, *values in columns:
        if not any(values):
            continue
        needed = _GAP + max(map(len, [heading, *values]))
        # If one column does not fit, the later columns are left out too; the drawing matters more than the last column.
        least = 0 if heading in ("tokens", "positions") else _GAP + max(_LEAST_BAR, len(scale))
        if room - needed < least:
            break
        room -= needed
        table.add_column(justify="right", no_wrap=True)
        cells.append([Text(heading, "dim"), *map(Text, values)])
    width = min(_BAR, room - _GAP)
    if width >= max(_LEAST_BAR, len(scale)):
        table.add_column(no_wrap=True)
        bars = (Text(_bar(row.extent, layout.length, width), _STYLES[row.extent.kind]) for row in rows)
        cells.append([Text(scale, "dim"), *bars])
    for line in zip(*cells, strict=True):
        table.add_row(*line)
    return table


def _bar(extent: Extent, length: int, width: int) -> str:
    """Positions as a part of a line for the whole schema."""
    begin = min(width - 1, extent.start * width // max(1, length))
    end = max(begin + 1, min(width, -(-extent.end * width // max(1, length))))
    return "·" * begin + "█" * (end - begin) + "·" * (width - end)


def _remarks(rows: list[_Row]) -> Iterator[str]:
    """The members of unions that leave most of it empty."""
    sparse = [row for row in rows if row.unused > _SPARSE * (row.extent.end - row.extent.start + row.unused)]
    sparse.sort(key=lambda row: -row.unused)
    for row in sparse[:_NAMED]:
        size = row.extent.end - row.extent.start
        yield f"{row.path} leaves {row.unused:,} of the {size + row.unused:,} positions of its union unused"
    if len(sparse) > _NAMED:
        yield f"and so do {len(sparse) - _NAMED} more members"


def _listed(rows: list[_Row]) -> Iterator[str]:
    for row in rows:
        for context, tokens in row.contexts.items():
            yield f"{row.path or '(schema)'}: {tokens:,} tokens after {', '.join(context) or 'nothing'}"


def _plotted(row: _Row) -> Bar:
    own = sum(len(segment.tokens) for segment, _ in row.segments)
    return Bar(
        label="   " * (len(row.prefix) // 3) + str(_label(row.extent)),
        kind=row.extent.kind,
        start=row.extent.start,
        end=row.extent.end,
        unused=row.unused,
        cached=row.cached / own if own else None,
        note=f"{row.extent.own:,}" if row.extent.own else "",
    )


def _as_dict(layout: SchemaLayout, looked: Looked, rows: list[_Row]) -> dict[str, Any]:
    each = looked.bytes_of_a_token
    return {
        "schema": layout.schema.name,
        "model": looked.model.path.stem,
        "positions": layout.positions,
        "length": layout.length,
        "tokens": sum(len(segment.tokens) for segment in layout.segments),
        "segments": len(layout.segments),
        "parts": [
            {
                "kind": row.extent.kind,
                "name": row.extent.name,
                "path": row.path,
                "start": row.extent.start,
                "end": row.extent.end,
                "tokens": row.extent.own,
                "bytes": row.extent.own * each if each and row.saved else None,
                "unused": row.unused,
                "cached_tokens": row.cached,
                "contexts": [
                    {"attends_to": list(attended), "tokens": count} for attended, count in row.contexts.items()
                ],
            }
            for row in rows
        ],
    }


@click.command()
def grammar() -> None:
    """Print the folder of the RELAX NG grammars, for editors: schema.rng and prompt.rng (.rnc in compact syntax).

    VS Code takes them with the extension "XML" of Red Hat ("xml.fileAssociations"), Emacs with nxml-mode: its variable
    rng-schema-locating-files takes the file schemas.xml beside them. docs/pml.md shows both.
    """
    click.echo(str(GRAMMARS))

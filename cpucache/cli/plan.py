"""``cpucache plan``: which slice each part of a prompt takes, and what the prompt will cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click
from rich.table import Column, Table
from rich.text import Text

from cpucache.cli.console import listing, out, seconds
from cpucache.cli.options import engine_options, fidelity_options, split_fidelity
from cpucache.cli.text import read_asked
from cpucache.engine import Engine
from cpucache.reuse import Plan, Span
from cpucache.reuse.inventory import module_names
from cpucache.store import Store

_RELATION = 10
"""Columns that a relation takes, and the word "recomputed"."""
_WORDS = 8
"""Tokens that text without markup is known by."""
_WIDE = 120
"""Columns of a terminal that has room for the names of the modules that a slice was evaluated after."""
_STYLES = {"exact": "green", "clean": "cyan", "related": "yellow", "foreign": "magenta"}


@click.command(short_help="Show which slice each part of a prompt takes, and why.")
@click.argument("prompt")
@click.option("-s", "--schema", "schema_file", metavar="FILE", help="The schema of a PML prompt; - for standard input.")
@engine_options
@fidelity_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(prompt: str, schema_file: str | None, model: str, as_json: bool, **options: Any) -> None:
    """Show which slice each part of PROMPT takes, a file (- for standard input), and what the prompt will cost.

    Nothing is evaluated and nothing is saved. A slice is exact if it attended to all text that precedes it in the
    prompt and to nothing else, clean if to a part of that text, related if to other text of the same schema, foreign
    if to text of other prompts (--reuse anywhere). Text without a slice is evaluated once, and saved.

    \b
    cpucache plan schemas/trip/kyoto-first-visit.xml -s schemas/trip/schema.xml
    cpucache plan notes.txt --reuse anywhere
    """
    wanted = split_fidelity(options)
    asked, schema = read_asked(prompt, schema_file, wanted)
    with Engine(model, **options) as engine:
        texts = {} if schema is None else module_names(engine.add_schema(schema))
        found = engine.plan(**asked, **wanted)
        rows = [_row(span, engine.store, texts) for span in found.spans]
        if schema is None:
            rows = [row | {"text": _begun(engine, span)} for row, span in zip(rows, found.spans, strict=True)]
        rate = engine.store.speed(engine.fingerprint)
    cost = _cost(found, rate)
    if as_json:
        click.echo(json.dumps({**cost, "spans": rows}, indent=2))
        return
    out.print(_table(rows))
    out.print(Text(_summary(cost)), soft_wrap=True)


def _row(span: Span, store: Store, texts: dict[bytes, str]) -> dict[str, Any]:
    slice_ = span.slice
    row: dict[str, Any] = {
        "module": slice_.module if slice_ else span.module,
        "position": span.start,
        "tokens": len(span.tokens),
        "from": "evaluated",
        "recomputed": span.recomputed,
        "why": span.why,
    }
    if slice_ is not None:
        place = "RAM" if slice_.key in store.ram else "disk"
        row |= {
            "from": "to be encoded" if span.missing else place,
            "relation": span.relation,
            "slice": slice_.key,
            "context": _names(texts.get(text, "(other text)") for text in slice_.attends_to),
            "context_tokens": slice_.attended_tokens,
            "moved": span.delta,
        }
    return row


def _begun(engine: Engine, span: Span) -> str:
    """Returns the beginning of a span's text, on one line."""
    return " ".join(engine.model.text(span.tokens[:_WORDS], special=True).split())


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _cost(found: Plan, rate: float | None) -> dict[str, Any]:
    evaluated = found.n_tokens - found.n_cached + sum(len(span.tokens) for span in found.spans if span.missing)
    return {
        "tokens": found.n_tokens,
        "exact": found.count("exact"),
        "clean": found.count("clean"),
        "related": found.count("related"),
        "foreign": found.count("foreign"),
        "recomputed": found.n_recomputed,
        "evaluated": evaluated,
        "evaluate_ms": round(1000 * evaluated / rate, 1) if rate else None,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = [
        Column("text" if rows and "text" in rows[0] else "module", overflow="fold"),
        *(Column(name, justify="right", no_wrap=True) for name in ("position", "tokens")),
        Column("slice", min_width=_RELATION),
        Column("evaluated after", overflow="fold"),
        Column("why"),
    ]
    cells: list[list[str | Text]] = []
    for row in rows:
        relation = row.get("relation", "")
        what = f"{relation}, {row['from']}" if relation else row["why"] or row["from"]
        after = f"{row['context_tokens']:,} tokens" if relation else ""
        if out.width >= _WIDE and after and row["context"]:
            after += f": {', '.join(row['context'])}"
        cells.append(
            [
                Text(row.get("text") or row["module"] or ("(schema)" if relation else "")),
                f"{row['position']:,}",
                f"{row['tokens']:,}",
                Text(what, style=_STYLES.get(relation, "dim")),
                Text(after),
                Text(row["why"] if relation else ""),
            ]
        )
    return listing(columns, cells, expendable=("why", "position", "evaluated after", "tokens"), close=True)


def _summary(cost: dict[str, Any]) -> str:
    kinds = ", ".join(f"{cost[kind]:,} {kind}" for kind in ("exact", "clean", "related", "foreign") if cost[kind])
    time = f", about {seconds(cost['evaluate_ms'])} at the speed of earlier encoding" if cost["evaluate_ms"] else ""
    return f"{cost['tokens']:,} tokens: {kinds or 'none'} from slices; {cost['evaluated']:,} to evaluate{time}"

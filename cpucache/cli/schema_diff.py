"""``cpucache schema diff``: what an edit leaves of the slices of a schema."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby

import click
from rich.table import Column
from rich.text import Text

from cpucache.cli.console import listing, out, read_schema, seconds
from cpucache.cli.options import model_option, positions_option
from cpucache.cli.schema_layout import Looked
from cpucache.engine.opening import DEFAULT_CTX
from cpucache.errors import InputError
from cpucache.layout import Positions
from cpucache.reuse.inventory import Edit, compare

_SAID = {
    "kept": ("unchanged", "green"),
    "usable": ("evaluated again, old one usable", "cyan"),
    "stale": ("evaluated again", "yellow"),
    "new": ("evaluated", "yellow"),
}


@click.command()
@click.argument("old")
@click.argument("new")
@model_option
@positions_option
@click.option(
    "--ctx", "n_ctx", type=click.IntRange(2), help="As for `cpucache encode`.  [default: as trained, at most 8192]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diff(old: str, new: str, model: str, positions: Positions, n_ctx: int | None, as_json: bool) -> None:
    """Show which slices of the schema OLD stay valid for the schema NEW, and what it costs to encode the rest.

    Slices are found by their content: unchanged text before the first change keeps its slices. Unchanged text after a
    change keeps them for prompts that may use related slices, unless they attended to text that was removed; `cpucache
    encode` evaluates this text again.

    Nothing is evaluated, and the store is not read. OLD or NEW may be - for standard input.

    \b
    git show HEAD:schemas/trip/schema.xml | cpucache schema diff - schemas/trip/schema.xml
    """
    if old == new == "-":
        raise InputError("only one of OLD and NEW can be standard input (-)")
    parsed = [read_schema(name) for name in (old, new)]
    looked = Looked(model, positions)
    before, after = (looked.lay(schema) for schema in parsed)
    # The same as in the engine: one cell stays free for the token that applies a shift.
    room = (n_ctx or min(looked.model.n_ctx_train, DEFAULT_CTX)) - 1
    edit = compare(before, after, room)
    rate = looked.stored[1]
    if as_json:
        click.echo(json.dumps(_as_dict(edit, rate), indent=2))
        return
    if edit.slices("kept") < len(edit.changes):
        columns = [Column("module", overflow="fold"), Column("tokens", justify="right"), Column("slice"), Column("why")]
        rows: list[list[str | Text]] = []
        for (module, verdict, why), group in groupby(edit.changes, lambda each: (each.module, each.verdict, each.why)):
            said, style = _SAID[verdict]
            tokens = sum(change.tokens for change in group)
            rows.append([Text(module or "(schema)"), f"{tokens:,}", Text(said, style), Text(why, "dim")])
        out.print(listing(columns, rows, expendable=("why", "tokens"), close=True))
    out.print(Text(_summary(edit, rate)), soft_wrap=True)


def _summary(edit: Edit, rate: float | None) -> str:
    kept, total = edit.slices("kept"), len(edit.changes)
    if kept == total:
        return f"all {total:,} slices stay valid: nothing is to be evaluated{_dropped(edit)}"
    time = f", about {seconds(1000 * edit.evaluated / rate)} at the speed of earlier encoding" if rate else ""
    tokens = edit.tokens("kept", "usable", "stale", "new")
    usable = edit.tokens("usable")
    until = f"; until then prompts can use the old slices of {usable:,} of these tokens" if usable else ""
    return (
        f"{kept:,} of {total:,} slices stay valid ({edit.tokens('kept'):,} of {tokens:,} tokens); "
        f"{edit.evaluated:,} tokens are to be evaluated{time}{until}{_dropped(edit)}"
    )


def _dropped(edit: Edit) -> str:
    return f"; {edit.dropped:,} old slices ({edit.dropped_tokens:,} tokens) are no longer used" * (edit.dropped > 0)


def _as_dict(edit: Edit, rate: float | None) -> dict[str, object]:
    return {
        "slices": len(edit.changes),
        "kept": edit.slices("kept"),
        "kept_tokens": edit.tokens("kept"),
        "evaluate": edit.evaluated,
        "evaluate_ms": round(1000 * edit.evaluated / rate, 1) if rate else None,
        "dropped": edit.dropped,
        "dropped_tokens": edit.dropped_tokens,
        "changes": [asdict(change) for change in edit.changes],
    }

"""``cpucache cache``: look at the store and look after it."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from cpucache.cli.console import err, out
from cpucache.errors import CpucacheError, InputError
from cpucache.models import resolve_model
from cpucache.store import Fingerprints, Row, Store, default_home
from cpucache.store.pack import export_pack, import_pack
from cpucache.store.upkeep import collect, remove, verify

Command = TypeVar("Command", bound=Callable[..., Any])
_SORTS: dict[str, Callable[[Row], Any]] = {
    "used": lambda row: -row.used,
    "created": lambda row: -row.created,
    "bytes": lambda row: -row.bytes,
    "tokens": lambda row: -row.info.tokens,
    "hits": lambda row: -row.hits,
    "module": lambda row: (row.info.model, row.info.schema, row.info.module, row.info.start),
}


@click.group()
def cache() -> None:
    """Look at the saved slices and look after them.

    They lie in $CPUCACHE_HOME, else in the platform's cache folder, and stay within a budget of bytes: what is cheapest
    to make again for the room that it takes goes first, never what is pinned. The folder may be deleted at any time.
    """


def _selection(command: Command) -> Command:
    options = (
        click.option("--schema", help="Only slices of this schema."),
        click.option("-m", "--model", help="Only slices of this model, by its name as `cache ls` shows it."),
        click.option("--older", metavar="AGE", help="Only slices not used for so long: 12h, 30d."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _select(store: Store, schema: str | None, model: str | None, older: str | None) -> list[Row]:
    limit = time.time() - _age(older) if older else None
    return [
        row
        for row in _index(store).rows()
        if schema in (None, row.info.schema) and model in (None, row.info.model) and (limit is None or row.used < limit)
    ]


def _age(text: str) -> float:
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if not found:
        raise InputError(f"'{text}' is no age; write for example 12h or 30d")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _store() -> Store:
    return Store(default_home(), ram_budget=0)


def _index(store: Store) -> Any:
    if store.index is None:
        raise CpucacheError(f"the store in {store.home} can't be opened")
    return store.index


@cache.command("ls")
@_selection
@click.option("--sort", type=click.Choice(list(_SORTS)), default="used", show_default=True, help="The order.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_slices(schema: str | None, model: str | None, older: str | None, sort: str, as_json: bool) -> None:
    """List slices: where they belong, their size, how often and when they were used."""
    with _store() as store:
        rows = sorted(_select(store, schema, model, older), key=_SORTS[sort])
    if as_json:
        click.echo(json.dumps([_as_dict(row) for row in rows], indent=2))
        return
    table = Table(box=SIMPLE_HEAD)
    for name in ("schema", "module", "model"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "size", "hits", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.info.schema + (" (pinned)" if row.pinned else ""),
            row.info.module or "(schema)",
            row.info.model,
            f"{row.info.tokens:,}",
            decimal(row.bytes),
            f"{row.hits:,}",
            _ago(row.used),
        )
    out.print(table)
    out.print(f"{len(rows):,} slices, {decimal(sum(row.bytes for row in rows))}", style="dim")


def _as_dict(row: Row) -> dict[str, Any]:
    return {
        "key": row.key,
        "schema": row.info.schema,
        "module": row.info.module,
        "model": row.info.model,
        "tokens": row.info.tokens,
        "start": row.info.start,
        "bytes": row.bytes,
        "hits": row.hits,
        "used": row.used,
        "created": row.created,
        "pinned": row.pinned,
        "seconds": row.info.seconds,
        "state_format": row.info.state_format,
    }


def _ago(when: float) -> str:
    age = max(0.0, time.time() - when)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= size:
            return f"{age / size:.0f} {unit} ago"
    return "just now"


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def stats(as_json: bool) -> None:
    """Show how much there is, how often it is hit, and the evaluation that it has saved."""
    with _store() as store:
        totals, rows, budget = _index(store).totals(), _index(store).rows(), store.disk_budget
    asked = totals["hits"] + totals["misses"]
    models: dict[str, int] = {}
    for row in rows:
        models[row.info.model] = models.get(row.info.model, 0) + row.bytes
    result = {
        "slices": len(rows),
        "bytes": int(totals["bytes"]),
        "budget": budget,
        "hits": int(totals["hits"]),
        "misses": int(totals["misses"]),
        "hit_rate": round(totals["hits"] / asked, 4) if asked else None,
        "seconds_saved": round(totals["seconds_saved"], 3),
        "evicted": int(totals["evicted"]),
        "models": models,
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    rate = f"{totals['hits'] / asked:.1%} of {int(asked):,} look-ups" if asked else "nothing looked up yet"
    for name, value in (
        ("slices", f"{len(rows):,}"),
        ("on disk", f"{decimal(int(totals['bytes']))} of {decimal(budget)}"),
        *((f"  {name}", decimal(size)) for name, size in sorted(models.items())),
        ("hits", rate),
        ("evicted", f"{int(totals['evicted']):,}"),
        ("evaluation saved", f"{totals['seconds_saved']:,.0f} s"),
    ):
        table.add_row(f"[dim]{name}[/dim]", value)
    out.print(table)


@cache.command("verify")
@click.option("--repair", is_flag=True, help="Set damaged slices aside and bring the index up to date.")
def verify_slices(repair: bool) -> None:
    """Read every slice in full and compare it with its hash, its key and the index.

    Exit status 1 when a slice is damaged or missing and was not repaired.
    """
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn())
    with _store() as store, Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("", total=None)
        findings = verify(
            store, repair=repair, progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
        count = len(_index(store).rows())
    for finding in findings:
        out.print(f"{finding.kind}: {finding.detail or finding.name}", markup=False, soft_wrap=True)
    bad = sum(not finding.harmless for finding in findings)
    done = " (repaired)" if repair and findings else ""
    out.print(f"{count:,} slices, {bad} of them bad{done}", soft_wrap=True)
    sys.exit(1 if bad and not repair else 0)


@cache.command()
def gc() -> None:
    """Clear up: what killed processes left, files set aside, and whatever is over the budget."""
    with _store() as store:
        _index(store)
        freed = collect(store)
    out.print(f"{decimal(freed)} freed")


@cache.command("rm")
@_selection
@click.option("--all", "everything", is_flag=True, help="Every slice.")
def remove_slices(schema: str | None, model: str | None, older: str | None, everything: bool) -> None:
    """Delete slices by schema, model or age, pinned ones too."""
    if not (everything or schema or model or older):
        raise click.UsageError("say which: --schema, -m, --older, or --all")
    with _store() as store:
        rows = _select(store, schema, model, older)
        remove(store, [row.key for row in rows])
    out.print(f"{len(rows):,} slices deleted, {decimal(sum(row.bytes for row in rows))} freed")


@cache.command()
@click.argument("schema")
@click.option("-m", "--model", help="Only slices of this model.")
@click.option("--off", is_flag=True, help="Unpin.")
def pin(schema: str, model: str | None, off: bool) -> None:
    """Keep the slices of SCHEMA (its name), whatever else needs room."""
    with _store() as store:
        rows = _select(store, schema, model, None)
        if not rows:
            raise InputError(f"there are no slices of a schema '{schema}'; see `cpucache cache ls`")
        _index(store).pin([row.key for row in rows], pinned=not off)
    out.print(f"{len(rows):,} slices {'unpinned' if off else 'pinned'}")


@cache.command("export")
@click.argument("schema")
@click.option("-m", "--model", help="Only slices of this model: needed when there are several.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The pack.")
def export_slices(schema: str, model: str | None, output: Path) -> None:
    """Write the slices of SCHEMA (its name) for a model to one file.

    Make them on a fast machine, ship them with an offline application, and `cpucache cache import` adds them there.
    """
    with _store() as store:
        pack = export_pack(store, [row.key for row in _select(store, schema, model, None)], output)
    out.print(f"{output}: {len(pack.keys):,} slices for {pack.model}, {decimal(output.stat().st_size)}", soft_wrap=True)


@cache.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-m", "--model", help="Refuse the pack unless it was made for this model (a name or a path).")
def import_slices(file: Path, model: str | None) -> None:
    """Add the slices of a pack to the store, after checking every one of them; a bad pack is refused whole."""
    if not file.is_file():
        raise InputError(f"{file}: there is no such file")
    home = default_home()
    fingerprint = Fingerprints(home / "index.sqlite").of(resolve_model(model)) if model else None
    with _store() as store:
        pack, new = import_pack(store, file, fingerprint=fingerprint)
    out.print(f"{len(pack.keys):,} slices for {pack.model}, {new:,} of them new", soft_wrap=True)

"""``cpucache cache``: inspects and manages the store."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from cpucache.cli.console import as_option, err, listing, named, out
from cpucache.errors import CpucacheError, InputError
from cpucache.models import resolve_model
from cpucache.store import Fingerprints, Row, Store, default_home
from cpucache.store.pack import export_pack, import_pack
from cpucache.store.upkeep import collect, remove, verify

Command = TypeVar("Command", bound=Callable[..., Any])
_MODEL = "its name as `cache ls` shows it, a name of the catalogue, or the path of a GGUF"
_KEY = click.Path(dir_okay=False, path_type=Path)
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
    """Inspect and manage the saved slices.

    The store is in $CPUCACHE_HOME, else in the platform's cache folder, and stays within a budget of bytes. Slices that
    save the least evaluation for their size are evicted first; pinned slices stay. The folder may be deleted at any
    time.
    """


def _selection(command: Command) -> Command:
    options = (
        click.option("--schema", help="Only slices of this schema."),
        click.option("-m", "--model", help=f"Only slices of this model: {_MODEL}."),
        click.option("--older", metavar="AGE", help="Only slices not used for this long, such as 12h or 30d."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _select(store: Store, schema: str | None, model: str | None, older: str | None) -> list[Row]:
    # A clock that was set back leaves slices that were used in the future.
    limit = time.time() - _age(older) if older else math.inf
    rows = _index(store).rows()
    if model and all(row.info.model != model for row in rows):
        rows = [row for row in rows if row.info.fingerprint == _fingerprint(model)]
    elif model:
        rows = [row for row in rows if row.info.model == model]
    return [row for row in rows if schema in (None, row.info.schema) and row.used < limit]


def _fingerprint(model: str) -> str | None:
    """Returns the name of a model's file, which may have been deleted since its slices were evaluated."""
    with contextlib.suppress(CpucacheError):
        return Fingerprints(default_home() / "index.sqlite").of(resolve_model(model))
    return None


def _nothing(store: Store, schema: str | None, model: str | None) -> str:
    """Says that there are no slices of a schema or model, and what comes near."""
    rows = _index(store).rows()
    schemas, models = {row.info.schema for row in rows}, {row.info.model for row in rows}
    said = []
    for kind, name, there in (("schema", schema, schemas), ("model", model, models)):
        if name:
            near = difflib.get_close_matches(name, sorted(there), 1)
            hint = f" (did you mean '{near[0]}'?)" if near and name not in there else ""
            said.append(f"{kind} '{name}'{hint}")
    return f"there are no slices of {' and '.join(said)}; see `cpucache cache ls`"


def _age(text: str) -> float:
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if not found:
        raise InputError(f"'{text}' is not an age; write for example 12h or 30d")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _store() -> Store:
    return Store(default_home(), ram_budget=0)


def _index(store: Store, *, change: bool = False) -> Any:
    if store.index is None:
        raise CpucacheError(f"the store in {store.home} can't be opened; check the folder and its permissions")
    if change and not store.writable:
        raise CpucacheError(
            f"the store in {store.home} can't be written; `cache ls`, `stats` and `verify` only read it"
        )
    return store.index


@cache.command("ls")
@_selection
@click.option("--sort", type=click.Choice(list(_SORTS)), default="used", show_default=True, help="The order.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_slices(schema: str | None, model: str | None, older: str | None, sort: str, as_json: bool) -> None:
    """List slices with schema, model and size, and how often and when they were used."""
    with _store() as store:
        rows = sorted(_select(store, schema, model, older), key=_SORTS[sort])
    if as_json:
        click.echo(json.dumps([_as_dict(row) for row in rows], indent=2))
        return
    columns = [Column(name, overflow="fold") for name in ("schema", "module", "model")]
    columns += [Column(name, justify="right", no_wrap=True) for name in ("tokens", "size", "hits", "used")]
    cells = [
        (
            named(row.info.schema + (" (pinned)" if row.pinned else "")),
            named(row.info.module or "(schema)"),
            named(row.info.model),
            f"{row.info.tokens:,}",
            decimal(row.bytes),
            f"{row.hits:,}",
            _ago(row.used),
        )
        for row in rows
    ]
    out.print(listing(columns, cells, expendable=("hits", "tokens", "used", "size")))
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
    """Show the size of the store, its hit rate, and the evaluation that it has saved."""
    with _store() as store:
        rows, account = _index(store).rows(), store.account()
    models: dict[str, int] = {}
    for row in rows:
        models[row.info.model] = models.get(row.info.model, 0) + row.bytes
    result = {
        "slices": account.slices,
        "bytes": account.bytes,
        "budget": account.budget,
        "hits": account.hits,
        "misses": account.misses,
        "hit_rate": None if account.hit_rate is None else round(account.hit_rate, 4),
        "seconds_saved": round(account.seconds_saved, 3),
        "evicted": account.evicted,
        "models": models,
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    asked = account.hits + account.misses
    rate = f"{account.hit_rate:.1%} of {asked:,} look-ups" if account.hit_rate is not None else "no look-ups yet"
    for name, value in (
        ("slices", f"{account.slices:,}"),
        ("on disk", f"{decimal(account.bytes)} of {decimal(account.budget)}"),
        *((f"  {named(name)}", decimal(size)) for name, size in sorted(models.items())),
        ("hits", rate),
        ("evicted", f"{account.evicted:,}"),
        ("evaluation saved", f"{account.seconds_saved:,.0f} s"),
    ):
        table.add_row(Text(name, "dim"), value)
    out.print(table)


@cache.command("verify")
@click.option("--repair", is_flag=True, help="Set damaged slices aside and bring the index up to date.")
def verify_slices(repair: bool) -> None:
    """Read every slice in full and compare it with its hash, its key and the index.

    Exit status 1 when a slice is damaged or missing and was not repaired.
    """
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn())
    with _store() as store, Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        _index(store, change=repair)
        task = bars.add_task("", total=None)
        findings = verify(
            store, repair=repair, progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
        count = len(_index(store).rows())
    for finding in findings:
        out.print(f"{finding.kind}: {finding.detail or finding.name}", markup=False, soft_wrap=True)
    bad = sum(not finding.harmless for finding in findings)
    done = " (repaired)" if repair and findings else ""
    out.print(f"{count:,} slices, {bad} damaged or missing{done}", soft_wrap=True)
    sys.exit(1 if bad and not repair else 0)


@cache.command()
@click.option(
    "--disk",
    "budget",
    metavar="SIZE",
    help="Shrink the store to this size, even if other processes have a larger --disk.",
)
def gc(budget: str | None) -> None:
    """Delete leftovers of killed processes, files set aside, and slices beyond the budget."""
    from cpucache.engine.size import parse_size  # the engine is loaded where it is needed

    size = None if budget is None else parse_size(budget)
    with _store() as store:
        _index(store, change=True)
        freed = collect(store, size)
    out.print(f"{decimal(freed)} freed")


@cache.command("rm")
@_selection
@click.option("--all", "everything", is_flag=True, help="Every slice.")
def remove_slices(schema: str | None, model: str | None, older: str | None, everything: bool) -> None:
    """Delete slices by schema, model or age, including pinned slices."""
    if not (everything or schema or model or older):
        raise click.UsageError("select slices with --schema, -m, --older, or --all")
    with _store() as store:
        _index(store, change=True)
        rows = _select(store, schema, model, older)
        if not rows and not _select(store, schema, model, None) and (schema or model):
            raise CpucacheError(_nothing(store, schema, model))
        remove(store, [row.key for row in rows])
    out.print(f"{len(rows):,} slices deleted, {decimal(sum(row.bytes for row in rows))} freed")


@cache.command()
@click.argument("schema")
@click.option("-m", "--model", help=f"Only slices of this model: {_MODEL}.")
@click.option("--off", is_flag=True, help="Unpin.")
def pin(schema: str, model: str | None, off: bool) -> None:
    """Never evict the slices of SCHEMA (its name)."""
    with _store() as store:
        _index(store, change=True)
        rows = _select(store, schema, model, None)
        if not rows:
            raise InputError(_nothing(store, schema, model))
        _index(store).pin([row.key for row in rows], pinned=not off)
    out.print(f"{len(rows):,} slices {'unpinned' if off else 'pinned'}")


@cache.command("export")
@click.argument("schema")
@click.option("-m", "--model", help=f"Required if there are slices of several models: {_MODEL}.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The pack.")
@click.option(
    "--sign", "key", metavar="KEY", type=_KEY, help="Sign the pack with this private Ed25519 key (PEM or OpenSSH)."
)
def export_slices(schema: str, model: str | None, output: Path, key: Path | None) -> None:
    """Write the slices of SCHEMA (its name) for a model to one file.

    Encode a schema on a fast machine and ship its slices with an offline application; `cpucache cache import` adds them
    there. Damage is detected without a signature; forgery is detected only with one (--sign).
    """
    with _store() as store:
        rows = _select(store, schema, model, None)
        if not rows:
            raise InputError(f"{_nothing(store, schema, model)}, or encode the schema first")
        pack = export_pack(store, [row.key for row in rows], output, key=key)
        absent = store.kept(_index(store).absent(schema).get(pack.model, ()))
    signed = ", signed" if pack.signed else ""
    about = f"{len(pack.keys):,} slices for {pack.model}, {decimal(output.stat().st_size)}{signed}"
    out.print(f"{output}: {about}", soft_wrap=True, markup=False)
    if absent.missing:
        text = f"{absent.missing:,} slices of {schema} are not in it: they were evicted, or did not fit. Unless they "
        text += f"are of an earlier version of {schema}, encode it again with --disk {as_option(absent.budget)}, then "
        err.print(f"cpucache: warning: {text}export the schema again", soft_wrap=True, markup=False)


@cache.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-m", "--model", help="Refuse the pack unless it was made for this model (a name or a path).")
@click.option("--key", metavar="KEY", type=_KEY, help="Refuse the pack unless this public Ed25519 key has signed it.")
def import_slices(file: Path, model: str | None, key: Path | None) -> None:
    """Check every slice of a pack, then add all of them to the store. A pack with a damaged slice is refused.

    The checks detect damage, not malice: the slices of a pack can make the model behave as if it had read any text.
    Import packs only from sources that you trust, and verify the source with --key.
    """
    if not file.is_file():
        raise InputError(f"{file}: there is no such file")
    home = default_home()
    fingerprint = Fingerprints(home / "index.sqlite").of(resolve_model(model)) if model else None
    with _store() as store:
        _index(store, change=True)
        pack, new = import_pack(store, file, fingerprint=fingerprint, key=key)
        kept = store.kept(pack.keys)
    out.print(f"{len(pack.keys):,} slices for {pack.model}, {new:,} of them new", soft_wrap=True, markup=False)
    if kept.missing:
        raise CpucacheError(
            f"{kept.missing:,} of them did not fit: unpin or delete other slices, and import the pack again"
        )

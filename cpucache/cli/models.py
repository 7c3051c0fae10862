"""``cpucache models``: fetches, lists, finds and removes weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from cpucache.cli.console import err, listing, out
from cpucache.models.catalogue import default_model, known_models
from cpucache.models.pull import OnProgress, Progress, pull, remove
from cpucache.models.weights import models_dir, resolve_model, unlisted_files

Row: TypeAlias = dict[str, Any]


@click.group()
def models() -> None:
    """Fetch, list, find and remove model weights.

    A model is given by its name in the catalogue (see `cpucache models list`), by the path of any GGUF file, or as
    hf:org/repo/file.gguf for a file of the Hugging Face hub. Weights are kept in $CPUCACHE_MODELS; unless it is set, in
    gguf_models/ of a source checkout, or in the platform's user data folder. Only `pull` uses the network.
    """


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array instead of a table.")
def list_models(as_json: bool) -> None:
    """List the models of the catalogue, and other GGUF files in the folder of the weights.

    Commands without -m use the default.
    """
    rows = _rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    columns = [
        Column("model (* the default)", min_width=max(len(row["name"]) for row in rows) + 2),
        Column("size", justify="right", no_wrap=True),
        Column("context", justify="right", no_wrap=True),
        Column("licence", no_wrap=True),
        Column("pulled", no_wrap=True),
    ]
    cells = []
    for row in rows:
        about = Text(f"{row['name']}{' *' if row['default'] else ''}")
        about.append(f"\n{row['description'] or 'not in the catalogue'}", style="dim")
        context = "" if row["context"] is None else f"{row['context']:,}"
        cells.append((about, decimal(row["size"]), context, row["licence"] or "", "yes" if row["pulled"] else "no"))
    look: dict[str, Any] = {"caption": f"folder of the weights: {models_dir()}", "caption_justify": "left"}
    out.print(listing(columns, cells, expendable=("licence", "context", "size", "pulled"), **look))


def _rows() -> list[Row]:
    rows: list[Row] = []
    for model in known_models().values():
        path = models_dir() / model.filename
        pulled = path.is_file() and path.stat().st_size == model.size
        rows.append(
            {
                "name": model.name,
                "default": model.name == default_model(),
                "description": model.description,
                "licence": model.licence,
                "architecture": model.architecture,
                "parameters": model.parameters,
                "context": model.context,
                "size": model.size,
                "sha256": model.sha256,
                "pulled": pulled,
                "path": str(path) if pulled else None,
            }
        )
    unlisted = ("description", "licence", "architecture", "parameters", "context", "sha256")
    for path in unlisted_files():
        known = {
            "name": path.name,
            "default": False,
            "size": path.stat().st_size,
            "pulled": True,
            "path": str(path),
        }
        rows.append({**dict.fromkeys(unlisted), **known})
    return rows


@models.command("pull")
@click.argument("name")
@click.option("--force", is_flag=True, help="Fetch the weights again, even if they are present.")
def pull_model(name: str, force: bool) -> None:
    """Fetch the weights called NAME and verify them.

    NAME is a model of the catalogue, or hf:org/repo/file.gguf for any GGUF of the Hugging Face hub (which needs
    `pip install 'cpucache[hub]'`). The disk that is needed is printed first. An interrupted pull goes on where it
    stopped when it is run again; the file appears in its place only when it is complete and its SHA-256 agrees.
    """
    click.echo(fetch(name, force=force))


def fetch(name: str, *, force: bool = False) -> Path:
    """Fetches weights with bars on standard error, and returns their file. Ctrl-C keeps the part that was fetched."""
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with _bars(console) as show:
        try:
            return pull(name, show, say=say, force=force)
        except KeyboardInterrupt:
            say("interrupted: the data fetched so far is kept; the same command fetches the rest")
            raise


def offer_to_fetch(name: str) -> None:
    """Asks at a terminal whether to fetch a missing model of the catalogue; does nothing elsewhere."""
    known = known_models().get(name)
    if known is None or (models_dir() / known.filename).exists() or not (sys.stdin.isatty() and err.is_terminal):
        return
    if click.confirm(f"{name} has not been fetched yet ({decimal(known.size)}); fetch it now?", default=True, err=True):
        fetch(name)


@contextmanager
def _bars(console: Console) -> Iterator[OnProgress]:
    """Shows the progress of a pull as bars on ``console``, one for each of its two stages."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(TextColumn("{task.description}"), *columns, console=console) as bars:
        tasks = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage.ljust(6), total=progress.total)
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total)

        yield show


@models.command("path")
@click.argument("name")
def model_path(name: str) -> None:
    """Print the file of the model NAME, after checking that it is a sound GGUF."""
    click.echo(resolve_model(name))


@models.command("rm")
@click.argument("name")
def remove_model(name: str) -> None:
    """Delete the weights called NAME, and files that an interrupted pull left."""
    click.echo(f"removed {name}: {decimal(remove(name))} freed")

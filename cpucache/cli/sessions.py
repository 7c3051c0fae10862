"""``cpucache sessions``: lists, checks, deletes and exports conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click
from rich.table import Column
from rich.text import Text

from cpucache.cli.console import listing, out, printed, safe
from cpucache.errors import CpucacheError, InputError
from cpucache.private import private_file
from cpucache.sessions import Damaged, Summary, Transcripts
from cpucache.sessions.export import as_json, as_markdown, iso


@click.group()
def sessions() -> None:
    """List, check, delete and export conversations (see `cpucache chat`).

    They are kept in $CPUCACHE_SESSIONS, else in the platform's user data folder. Their KV state is in the store, with
    all other slices, and can be evaluated again.
    """


@contextmanager
def _transcripts() -> Iterator[Transcripts]:
    transcripts = Transcripts()
    try:
        yield transcripts
    finally:
        transcripts.close()


@sessions.command("ls")
@click.option("--json", "in_json", is_flag=True, help="Print one JSON array instead of a table.")
def list_sessions(in_json: bool) -> None:
    """List conversations, the last used first. A warning names those that can't be read."""
    with _transcripts() as transcripts:
        summaries = transcripts.summaries()
    if in_json:
        click.echo(json.dumps([_as_dict(summary) for summary in summaries], indent=2))
        return
    if not summaries:
        out.print("no conversations yet: `cpucache chat` begins one")
        return
    columns = [Column("conversation", no_wrap=True, ratio=1), Column("model", no_wrap=True)]
    columns += [Column(name, no_wrap=True, justify="right") for name in ("messages", "tokens", "last used")]
    rows = [
        (
            Text(summary.name).append(f"\n{summary.start}", style="dim"),
            Text(summary.model),
            f"{summary.messages:,}",
            f"{summary.tokens:,}",
            datetime.fromtimestamp(summary.used).strftime("%Y-%m-%d %H:%M"),
        )
        for summary in summaries
    ]
    out.print(listing(columns, rows, expendable=("tokens", "messages", "model", "last used"), expand=True))


def _as_dict(summary: Summary) -> dict[str, object]:
    return {**asdict(summary), "created": iso(summary.created), "used": iso(summary.used)}


@sessions.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Don't ask.")
def remove_sessions(names: tuple[str, ...], yes: bool) -> None:
    """Delete conversations. Messages that other conversations share are kept."""
    with _transcripts() as transcripts:
        for name, about in [(name, _about(transcripts, name)) for name in dict.fromkeys(names)]:
            if yes or click.confirm(f"delete conversation '{safe(name)}' ({about})?", err=True):
                transcripts.remove(name)


def _about(transcripts: Transcripts, name: str) -> str:
    try:
        return f"{transcripts.summary(name).messages:,} messages"
    except Damaged:
        return "damaged"


@sessions.command("verify")
def verify_sessions() -> None:
    """Read every conversation; names those that are damaged. Exit status 1 if there are any."""
    with _transcripts() as transcripts:
        damaged = list(transcripts.verify())
    for each in damaged:
        click.echo(printed(f"{each.name}: {each.flaw}"))
    if damaged:
        raise CpucacheError(f"damaged conversations: {len(damaged):,}; `cpucache sessions rm NAME` deletes one")


@sessions.command("export")
@click.argument("name")
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "json"]),
    default="md",
    show_default=True,
    help="Markdown for reading, or JSON with counts and times.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
def export_session(name: str, form: str, output: Path | None) -> None:
    """Export a conversation. Only its owner can read the file."""
    with _transcripts() as transcripts:
        entries, summary = transcripts.read(name), transcripts.summary(name)
    text = (
        as_markdown(entries, summary)
        if form == "md"
        else json.dumps(as_json(entries, summary), indent=2, ensure_ascii=False) + "\n"
    )
    if output is None:
        click.echo(printed(text), nl=False)
        return
    try:
        private_file(output)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}") from error

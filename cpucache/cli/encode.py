"""``cpucache encode``: encodes schemas and likely prompts ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
from rich.filesize import decimal

from cpucache.cli.console import as_option, check_prompt, err, out, read_prompt, read_schema, token_bar
from cpucache.cli.options import engine_options
from cpucache.cli.watch import watch_for_edits
from cpucache.engine import Engine
from cpucache.errors import CpucacheError, InputError
from cpucache.pml.tree import Prompt, Schema
from cpucache.reuse import Encoded
from cpucache.store import Kept


@click.command()
@click.argument("schemas", nargs=-1, required=True, metavar="SCHEMA...")
@click.option(
    "-p",
    "--prompts",
    multiple=True,
    metavar="PROMPT",
    help="Also encode the slices that make this prompt exact. Repeatable.",
)
@click.option("--quick", is_flag=True, help="Only the first pass: leave out scaffold sets.")
@click.option("--refine", is_flag=True, help="Then encode exact slices of recent prompts, the most used first.")
@click.option(
    "--watch", is_flag=True, help="Then wait for edits of the files, and encode again what they change, until Ctrl-C."
)
@engine_options
def encode(
    schemas: tuple[str, ...],
    prompts: tuple[str, ...],
    quick: bool,
    refine: bool,
    watch: bool,
    model: str,
    **options: Any,
) -> None:
    """Evaluate each SCHEMA once and save its state, so that no prompt on it has to wait for a module.

    The first pass evaluates the schema in reading order. From then on every selection and order of its modules is
    answered at once; prompts that begin like the schema are exact. The second pass makes likely prompts exact: scaffold
    sets, and the prompts given with --prompts.

    Slices that the store holds are not evaluated again. Slices are found by their content: when a module changes, that
    module and the text after it are evaluated again.

    \b
    cpucache encode schemas/trip/schema.xml
    cpucache encode schemas/trip/schema.xml -p schemas/trip/kyoto-first-visit.xml
    cpucache encode schemas/trip/schema.xml --refine
    cpucache encode schemas/trip/schema.xml --watch
    """
    if watch and "-" in (*schemas, *prompts):
        raise InputError("standard input (-) can't be watched for edits: name a file")
    asked = _read(schemas, prompts)
    with Engine(model, **options) as engine:
        for schema, likely in asked.items():
            _encode(engine, schema, likely, quick=quick, refine=refine)
        if watch:
            again = partial(_encode, engine, quick=quick, refine=refine)
            watch_for_edits(partial(_read, schemas, prompts), asked, (*schemas, *prompts), again)


def _read(schemas: tuple[str, ...], prompts: tuple[str, ...]) -> dict[Schema, list[Prompt]]:
    """The schemas, with the prompts that are written for them. Raises ``PMLError``."""
    parsed = [read_schema(name) for name in schemas]
    asked: dict[Schema, list[Prompt]] = {schema: [] for schema in parsed}
    for name in prompts:
        prompt = read_prompt(name)
        asked[check_prompt(prompt, parsed)].append(prompt)
    return asked


def _encode(engine: Engine, schema: Schema, likely: list[Prompt], *, quick: bool, refine: bool) -> None:
    """Encodes the missing slices of a schema and of likely prompts on it."""
    engine.add_schema(schema)
    _pass(engine, schema.name, f"encoding {schema.name}", partial(engine.encode, schema.name))
    if likely or (schema.scaffolds and not quick):
        _pass(
            engine,
            f"{schema.name}, likely prompts",
            f"likely prompts on {schema.name}",
            partial(engine.encode_likely, schema.name, likely),
        )
    if refine:
        _pass(engine, f"{schema.name}, refined", f"refining {schema.name}", partial(engine.refine, schema.name))


def _pass(engine: Engine, name: str, label: str, work: Callable[..., Encoded]) -> None:
    """Encodes slices with a progress bar, and prints how many were encoded and kept."""
    try:
        with token_bar(label) as progress:
            done = work(progress=progress)
        kept = engine.store.kept(slice_.key for slice_ in done.wanted)
    except KeyboardInterrupt:
        err.print("the slices encoded so far are saved; the same command encodes the rest", soft_wrap=True)
        raise
    _report(engine, name, done, kept)


def _report(engine: Engine, name: str, done: Encoded, kept: Kept) -> None:
    if not engine.store.writable:
        raise CpucacheError(
            f"{name}: its slices can't be saved to {engine.store.home}; check the folder and the free space"
        )
    if done.slices:
        speed = done.tokens / done.seconds
        out.print(
            f"{name}: {done.slices} slices, {done.tokens:,} tokens in {done.seconds:.1f} s "
            f"({speed:.0f} tok/s), {decimal(done.bytes)}",
            soft_wrap=True,
        )
    elif not kept.missing:
        out.print(f"{name}: all its slices are in the store already", soft_wrap=True)
    if kept.missing:
        raise CpucacheError(
            f"{name}: {kept.missing} of {kept.missing + kept.slices} slices did not fit on the disk; "
            f"to keep all of them, use --disk {as_option(kept.budget)}"
        )

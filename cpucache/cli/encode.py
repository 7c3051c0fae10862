"""``cpucache encode``: make slices ahead of time."""

from __future__ import annotations

from typing import Any

import click
from rich.filesize import decimal

from cpucache.cli.console import err, out, read_schema, token_bar
from cpucache.cli.options import engine_options
from cpucache.engine import Engine
from cpucache.errors import CpucacheError
from cpucache.layout.lead import LEAD


@click.command()
@click.argument("schemas", nargs=-1, required=True, metavar="SCHEMA...")
@click.option(
    "--lead",
    type=click.IntRange(0),
    metavar="K",
    help="Encode modules behind K to 3K tokens of what the schema has before them, too, as prompts want them that "
    f"leave out none of that; 0: only by themselves, in half the time or less, and half the room.  [default: {LEAD:,}]",
)
@engine_options
def encode(schemas: tuple[str, ...], model: str, lead: int | None, **options: Any) -> None:
    """Evaluate every module of each SCHEMA and save its state, so that no prompt has to wait for it.

    A prompt that leaves modules out may still make those that stand behind them once more, the first time.

    What is in the store already is not evaluated again. Slices are found by what they contain: change a module, and
    only that module, what sees it and what stands closely behind it is encoded anew.
    """
    parsed = [read_schema(name) for name in schemas]
    with Engine(model, **options) as engine:
        for schema in parsed:
            engine.add_schema(schema)
            try:
                with token_bar(f"encoding {schema.name}") as progress:
                    done = engine.encode(schema.name, progress, lead_tokens=lead)
                engine.store.flush()
            except KeyboardInterrupt:
                err.print("what has been encoded is kept, and the same command goes on from there", soft_wrap=True)
                raise
            if not engine.store.writable:
                raise CpucacheError(f"{schema.name}: its slices can't be saved to {engine.store.home}")
            if done.slices:
                speed = done.tokens / done.seconds
                out.print(
                    f"{schema.name}: {done.slices} slices, {done.tokens:,} tokens in {done.seconds:.1f} s "
                    f"({speed:.0f} tok/s), {decimal(done.bytes)}",
                    soft_wrap=True,
                )
            else:
                out.print(f"{schema.name}: all its slices are in the store already", soft_wrap=True)

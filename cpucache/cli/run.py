"""``cpucache run``: answer a prompt."""

from __future__ import annotations

import json
import secrets
from typing import Any

import click
from rich.markup import escape

from cpucache.cli.compare import compare, comparison_table
from cpucache.cli.console import err, out, read_prompt, read_schema, seconds, token_bar
from cpucache.cli.options import engine_options, sampling_options
from cpucache.engine import Engine, Metrics


@click.command()
@click.argument("prompt")
@click.option(
    "-s", "--schema", "schema_file", metavar="FILE", required=True, help="The schema's file; - for standard input."
)
@engine_options
@sampling_options
@click.option("--no-cache", is_flag=True, help="Evaluate every token of the prompt, reusing nothing.")
@click.option("--compare", "comparing", is_flag=True, help="Answer twice, without the cache and with it, and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the answer, counts and times.")
def run(
    prompt: str,
    schema_file: str,
    model: str,
    max_tokens: int,
    no_cache: bool,
    comparing: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, a PML file (- for standard input), written against a schema.

    Modules whose state is not in the store yet are evaluated and saved on the way, so the second run is the fast one;
    `cpucache encode` does that ahead of time. The answer is streamed to standard output, a line of figures to standard
    error.

    \b
    cpucache run schemas/trip/kyoto-first-visit.xml -s schemas/trip/schema.xml
    cpucache run - -s schemas/trip/schema.xml --compare < prompt.xml
    """
    if no_cache and comparing:
        raise click.UsageError("--no-cache and --compare exclude each other")
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop")
    settings = {name: options.pop(name) for name in names} | {"max_tokens": max_tokens}
    parsed = read_prompt(prompt, schema=schema_file)
    schema = read_schema(schema_file)
    with Engine(model, **options) as engine:
        engine.add_schema(schema)
        if comparing:
            settings["seed"] = secrets.randbits(32) if settings["seed"] is None else settings["seed"]
            result = compare(engine, parsed, settings, quiet=as_json)
            if as_json:
                click.echo(json.dumps(result.as_dict()))
            else:
                out.print(comparison_table(result))
            return
        with token_bar("evaluating", shown=not as_json) as progress:
            stream = engine.stream(parsed, use_cache=not no_cache, progress=progress, **settings)
            first = next(stream, "")
        if as_json:
            click.echo(json.dumps(stream.reply().as_dict()))
            return
        try:
            click.echo(first, nl=False)
            for piece in stream:
                click.echo(piece, nl=False)
        finally:
            click.echo()
        figures = _figures(stream.metrics, saved=engine.store.writable)
        err.print(f"[dim]{escape(figures)}[/dim]", soft_wrap=True)


def _figures(metrics: Metrics, *, saved: bool) -> str:
    parts = [
        f"first token after {seconds(metrics.ttft_ms)}",
        f"{metrics.cached_tokens:,} of {metrics.prompt_tokens:,} prompt tokens from cache",
    ]
    if metrics.encoded_tokens:
        made = f"{metrics.encoded_tokens:,} tokens encoded in {seconds(metrics.encode_ms)}"
        parts.append(f"{made}, saved for next time" if saved else made)
    if metrics.completion_tokens > 1:
        parts.append(f"{1000 / metrics.tpot_ms:.1f} tok/s")
    return " · ".join(parts)

"""``cpucache run``: answer a prompt."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import click
from rich.markup import escape

from cpucache.cli.console import err, kinds, out, printed, profile_table, seconds, token_bar
from cpucache.cli.options import (
    engine_options,
    fidelity_options,
    sampling_options,
    split_fidelity,
)
from cpucache.cli.text import read_asked
from cpucache.engine import Engine, Metrics, Sampling, Stream
from cpucache.stages import Profile, profiled

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop")


@click.command()
@click.argument("prompt")
@click.option("-s", "--schema", "schema_file", metavar="FILE", help="The schema of a PML prompt; - for standard input.")
@engine_options
@sampling_options
@fidelity_options
@click.option("--raw", is_flag=True, help="Continue the text, instead of answering it as a message.")
@click.option("--no-cache", is_flag=True, help="Evaluate every token of the prompt, reusing nothing.")
@click.option("--compare", "comparing", is_flag=True, help="Answer twice, without the cache and with it, and compare.")
@click.option("--profile", "profiling", is_flag=True, help="Print the time of each stage.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the answer, counts and times.")
def run(
    prompt: str,
    schema_file: str | None,
    model: str,
    max_tokens: int,
    raw: bool,
    no_cache: bool,
    comparing: bool,
    profiling: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, a file (- for standard input): PML written against a schema (-s), or anything else.

    Without a schema it is a message to the model, as plain text, or, in a file that ends in .json, a list of messages
    with role and content. Such a prompt is cached in segments: of the next prompt, only the text after the common
    beginning is evaluated; with --reuse anywhere, only the text that differs.

    Modules of a schema whose state is not in the store yet are evaluated and saved on the way, so the second run is the
    fast one; `cpucache encode` does that ahead of time. The answer is streamed to standard output, a line of figures to
    standard error.

    \b
    cpucache run schemas/trip/kyoto-first-visit.xml -s schemas/trip/schema.xml
    cpucache run - -s schemas/trip/schema.xml --compare < prompt.xml
    cpucache run question.txt
    """
    if no_cache and comparing:
        raise click.UsageError("--no-cache and --compare exclude each other")
    if profiling and comparing:
        raise click.UsageError("--profile and --compare exclude each other: profile one answer at a time")
    settings: dict[str, Any] = {"sampling": split_sampling(options), "max_tokens": max_tokens}
    exactness = split_fidelity(options)
    profile = Profile()
    with profiled(profile):
        asked, schema = read_asked(prompt, schema_file, exactness, raw=raw)
    settings |= exactness
    with Engine(model, **options) as engine, ExitStack() as interruptible:
        if schema is not None:
            engine.add_schema(schema)
        if comparing:
            from cpucache.cli.compare import compare, comparison_table

            result = compare(engine, asked, settings | {"sampling": _seeded(settings["sampling"])}, silent=as_json)
            if as_json:
                click.echo(json.dumps(result.as_dict()))
            else:
                out.print(comparison_table(result))
            return
        with token_bar("evaluating", shown=not as_json) as progress:
            profile.note_call()
            with profiled(profile) if profiling else nullcontext():
                stream = engine.stream(**asked, use_cache=not no_cache, progress=progress, **settings)
            interruptible.enter_context(_telling_what_is_kept(engine, stream))
            first = next(stream, "")
        if as_json:
            reply = stream.reply()
            split = {"profile": _split(profile, reply.metrics)} if profiling else {}
            click.echo(json.dumps(reply.as_dict() | split))
            return
        try:
            click.echo(printed(first), nl=False)
            for piece in stream:
                click.echo(printed(piece), nl=False)
        finally:
            click.echo()
        encoded = [slice_.key for slice_ in stream.plan.wanted if slice_.context is not None]
        figures = _figures(stream.metrics, saved=not engine.store.kept(encoded).missing)
        err.print(f"[dim]{escape(figures)}[/dim]", soft_wrap=True)
        if profiling:
            err.print(profile_table(_split(profile, stream.metrics)))


def _split(profile: Profile, metrics: Metrics) -> dict[str, dict[str, float]]:
    """Returns milliseconds by stage, to the first token and to the end."""
    return {"first_token": profile.split(metrics.ttft_ms), "whole": profile.split(metrics.total_ms, first=False)}


@contextmanager
def _telling_what_is_kept(engine: Engine, stream: Stream) -> Iterator[None]:
    """Prints, when an answer is interrupted, how many tokens of its prompt are saved on disk."""
    try:
        yield
    except KeyboardInterrupt:
        plan = stream.planned()
        kept = sum(len(span.tokens) for span in plan.spans if span.slice and engine.store.kept([span.slice.key]).slices)
        if kept:
            err.print(
                f"{kept:,} of {plan.n_tokens:,} prompt tokens are saved; the same command evaluates the rest",
                soft_wrap=True,
            )
        raise


def split_sampling(options: dict[str, Any]) -> Sampling:
    """Removes the options of ``sampling_options``, except ``max_tokens``, from ``options``; returns the sampling."""
    return Sampling(**{name: options.pop(name) for name in _SAMPLING})


def _seeded(sampling: Sampling) -> Sampling:
    """Returns the sampling with a seed, so that two answers are sampled alike."""
    return replace(sampling, seed=secrets.randbits(32)) if sampling.seed is None else sampling


def _figures(metrics: Metrics, *, saved: bool) -> str:
    parts = [
        f"first token after {seconds(metrics.ttft_ms)}",
        f"{metrics.cached_tokens:,} of {metrics.prompt_tokens:,} prompt tokens from cache{kinds(metrics)}",
    ]
    if metrics.encoded_tokens:
        # Slices right before the question are evaluated in one batch with it, which takes no additional time.
        spent = f" in {seconds(metrics.encode_ms)}" if metrics.encode_ms else ""
        told = f"{metrics.encoded_tokens:,} tokens encoded{spent}"
        parts.append(f"{told}, saved for next time" if saved else told)
    if metrics.completion_tokens > 1:
        parts.append(f"{1000 / metrics.tpot_ms:.1f} tok/s")
    if metrics.finish == "length":
        parts.append(f"cut off after {metrics.completion_tokens:,} tokens")
    return " · ".join(parts)

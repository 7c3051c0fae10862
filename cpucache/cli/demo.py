"""``cpucache demo``: the main job on the default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cpucache.cli.compare import compare, comparison_table
from cpucache.cli.console import out
from cpucache.cli.models import offer_to_fetch
from cpucache.cli.options import engine_options
from cpucache.engine import Engine, Sampling
from cpucache.pml import load_prompt, load_schema
from cpucache.pml.tree import Reference, Turn
from cpucache.resources import resource


@click.command()
@engine_options
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=80, show_default=True, help="Longest answer.")
def demo(model: str, max_tokens: int, **options: Any) -> None:
    """See the main job: a long prompt answered without the cache, then from cached slices.

    The prompt hands seven Python files to the model and asks a question about them. Without the cache all of it is
    evaluated before the first word of the answer; from cached slices, only the question. On a terminal it offers to
    fetch the model if that is not there.
    """
    offer_to_fetch(model)
    folder = resource("schemas") / "codebase"
    prompt = load_prompt(folder / "main-entry.xml")
    with Engine(model, **options) as engine:
        engine.add_schema(load_schema(folder / "schema.xml"))
        modules = sum(isinstance(child, Reference) for child in prompt.children)
        question = " ".join(child.text.strip() for child in prompt.children if isinstance(child, Turn))
        out.print(
            f"[bold]{engine.model.path.stem}[/bold], {engine.context.n_threads} threads\n"
            f"{_shown(folder / 'main-entry.xml')}: {modules} modules, {engine.plan(prompt).n_tokens:,} tokens\n"
            f"question: {question}",
            soft_wrap=True,
        )
        settings = {"max_tokens": max_tokens, "sampling": Sampling(repeat_penalty=1.1)}
        result = compare(engine, {"prompt": prompt}, settings)
    out.print(comparison_table(result))
    out.print(
        f"What the prompt is made of: [bold]cpucache schema show {_shown(folder / 'schema.xml')}[/bold]\n"
        "A prompt of your own:       [bold]cpucache run PROMPT -s SCHEMA[/bold] (see docs/tutorial.md)",
        soft_wrap=True,
    )


def _shown(path: Path) -> str:
    """A path as short as it can be given from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

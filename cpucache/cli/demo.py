"""``cpucache demo``: the main job on the default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cpucache.cli.compare import compare, comparison_table
from cpucache.cli.console import out
from cpucache.cli.options import engine_options
from cpucache.engine import Engine
from cpucache.pml import load_prompt, load_schema
from cpucache.resources import resource


@click.command()
@engine_options
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=80, show_default=True, help="Longest answer.")
def demo(model: str, max_tokens: int, **options: Any) -> None:
    """See the main job: a long prompt answered without the cache, then from cached slices.

    The prompt hands seven Python files to the model and asks a question about them. Without the cache all of it is
    evaluated before the first word of the answer; from cached slices, only the question.
    """
    folder = resource("schemas") / "codebase"
    prompt = load_prompt(folder / "main-entry.xml")
    with Engine(model, **options) as engine:
        layout = engine.add_schema(load_schema(folder / "schema.xml"))
        modules = sum(child.kind == "module" for child in layout.extent.children)
        out.print(
            f"[bold]{engine.model.name}[/bold] on the CPU, {engine.context.n_threads} threads · prompt: "
            f"{_shown(folder / 'main-entry.xml')}, {engine.plan(prompt).n_tokens:,} tokens, up to {modules} modules",
            soft_wrap=True,
        )
        result = compare(engine, prompt, {"max_tokens": max_tokens, "repeat_penalty": 1.1})
    out.print(comparison_table(result))
    out.print(
        "Look at the schema with [bold]cpucache schema show[/bold], and write a prompt of your own: see the README."
    )


def _shown(path: Path) -> str:
    """A path as short as it can be named from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return path.name

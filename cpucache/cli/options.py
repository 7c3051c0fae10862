"""Options that several commands have, and the engine that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cpucache.models import default_model

Command = TypeVar("Command", bound=Callable[..., Any])


def _gpu_layers(_ctx: click.Context, _param: click.Parameter, value: str) -> int | str:
    if value != "auto" and not value.isdigit():
        raise click.BadParameter(f"'{value}' is neither 'auto' nor a number of layers")
    return value if value == "auto" else int(value)


def model_option(command: Command) -> Command:
    """``-m``."""
    return click.option(
        "-m",
        "--model",
        default=default_model,
        show_default="the first of the catalogue",
        help="A model of the catalogue (see `cpucache models list`), or the path of a GGUF.",
    )(command)


def engine_options(command: Command) -> Command:
    """``-m`` and everything about how a model is run."""
    options = (
        click.option(
            "--ctx", "n_ctx", type=click.IntRange(1), help="Cells of the context: prompt and answer must fit."
        ),
        click.option("--threads", type=click.IntRange(1), help="Threads to compute with.  [default: physical cores]"),
        click.option(
            "--gpu-layers",
            metavar="auto|N",
            default="auto",
            show_default=True,
            callback=_gpu_layers,
            help="Layers to offload to a GPU.",
        ),
        click.option(
            "--kv-type", type=click.Choice(["f16", "q8_0"]), default="f16", show_default=True, help="Type of the keys."
        ),
        click.option(
            "--flash",
            type=click.Choice(["on", "off", "auto"]),
            help="Flash attention.  [default: off on a CPU, where it slows cached prompts down; auto on a GPU]",
        ),
        click.option(
            "--positions",
            type=click.Choice(["auto", "reserved", "packed"]),
            default="auto",
            show_default=True,
            help="Give modules fixed positions, or let what is included stand back to back.",
        ),
        click.option(
            "--ram", "ram_budget", help="Memory for slices, as 512MiB or 2GiB.  [default: a quarter of what is free]"
        ),
    )
    for option in reversed(options):
        command = option(command)
    return model_option(command)


def sampling_options(command: Command) -> Command:
    """How the answer is chosen."""
    options = (
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Longest answer, in tokens.",
        ),
        click.option(
            "--temp",
            "temperature",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="0: the likeliest token.",
        ),
        click.option("--top-k", type=click.IntRange(0), default=40, show_default=True, help="0: off."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True),
        click.option("--min-p", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True),
        click.option(
            "--repeat-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="1: off."
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="For the same answer again.  [default: random]"),
        click.option("--stop", multiple=True, help="End the answer at this text. May be given several times."),
    )
    for option in reversed(options):
        command = option(command)
    return command

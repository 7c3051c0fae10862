"""Options that several commands have, and the engine that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cpucache.layout.cuts import LEAST, MOST
from cpucache.models import default_model
from cpucache.reuse import DEFAULT, LEVELS, REUSES, Fidelity
from cpucache.runtime.packing import AT_REST

Command = TypeVar("Command", bound=Callable[..., Any])


def _gpu_layers(_ctx: click.Context, _param: click.Parameter, value: str) -> int | str:
    if value != "auto" and not value.isdigit():
        raise click.BadParameter(f"'{value}' is neither 'auto' nor a number of layers")
    return value if value == "auto" else int(value)


class Range(click.ParamType[tuple[int, int]]):
    """Two numbers, as 64-512."""

    name = "MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The numbers. Fails with what is expected."""
        least, dash, most = str(value).partition("-")
        if not (dash and least.isdigit() and most.isdigit()):
            self.fail(f"'{value}' is no range such as {LEAST}-{MOST}", param, ctx)
        return int(least), int(most)


def model_option(command: Command) -> Command:
    """``-m``."""
    return click.option(
        "-m",
        "--model",
        metavar="MODEL",
        default=default_model,
        help="A name of the catalogue (`cpucache models list` shows them, * the default), or the path of a GGUF.",
    )(command)


def engine_options(command: Command) -> Command:
    """``-m`` and everything about how a model is run."""
    options = (
        click.option(
            "--ctx",
            "n_ctx",
            type=click.IntRange(1),
            help="Tokens that the context holds: prompt and answer.  [default: as trained, at most 8192]",
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
            "--kv-type",
            type=click.Choice(["f16", "q8_0"]),
            default="f16",
            show_default=True,
            help="Type of the saved keys: with q8_0, slices are a quarter smaller.",
        ),
        click.option(
            "--flash",
            type=click.Choice(["on", "off", "auto"]),
            help="Flash attention.  [default: off on a CPU, where it slows cached prompts down; auto on a GPU]",
        ),
        click.option(
            "--at-rest",
            type=click.Choice(AT_REST),
            default="f16",
            show_default=True,
            help="How slices are kept on disk: as they are, or in half (q8_0) or a quarter (q4_0) of the room. What is "
            "read from disk is then near to what was saved, not equal.",
        ),
        click.option(
            "--ram",
            "ram_budget",
            metavar="SIZE",
            help="Memory for slices, as 512MiB or 2GiB.  [default: a quarter of what is free]",
        ),
        click.option(
            "--disk",
            "disk_budget",
            metavar="SIZE",
            help="Disk for slices. What is worth least leaves, but nothing that others keep.  [default: a quarter of "
            "what is free]",
        ),
        click.option(
            "--segment-tokens",
            type=Range(),
            default=f"{LEAST}-{MOST}",
            show_default=True,
            help="Least and most tokens of the segments that plain text and messages are cut into, by what they say.",
        ),
        click.option("--paranoid", is_flag=True, help="Check slices each time they are read, not only the first."),
    )
    for option in reversed(options):
        command = option(command)
    return model_option(positions_option(command))


def positions_option(command: Command) -> Command:
    """``--positions``."""
    return click.option(
        "--positions",
        type=click.Choice(["auto", "reserved", "packed"]),
        default="auto",
        show_default=True,
        help="Where modules stand: each at a fixed place of its own (reserved), or back to back with what is included "
        "(packed). auto: reserved while the whole schema fits what the model was trained on.",
    )(command)


FIDELITY = ("fidelity", "reuse")
"""The keywords of ``Engine.plan`` that say how near to full prefill a prompt is wanted."""


def reuse_option(command: Command) -> Command:
    """``--reuse``."""
    return click.option(
        "--reuse",
        type=click.Choice(REUSES),
        help="Which slices a prompt may take. exact: those that were evaluated behind just what stands before them; "
        "schema: behind text of the prompt's schema, too; anywhere: behind any text, so that of plain text and "
        "messages only what changed is evaluated.  "
        "[default: schema, which is exact for prompts that have none]",
    )(command)


def fidelity_options(command: Command) -> Command:
    """How near to full prefill a prompt is wanted, see ``split_fidelity``."""
    options = (
        click.option(
            "--fidelity",
            type=click.Choice(list(LEVELS)),
            help="What is done about slices that were evaluated behind other text than stands before them here. fast: "
            "nothing, but that the schema's closing text (16 tokens at most) is evaluated with the question; "
            "balanced: a tenth of the spliced tokens is evaluated afresh besides, where the question points; high: "
            "only exact slices are taken, what has none is evaluated, and exact the next time.  "
            f"[default: {DEFAULT}]",
        ),
        click.option(
            "--recompute",
            type=click.FloatRange(0, 1),
            metavar="R",
            help="Instead of a level: evaluate this share of the spliced tokens afresh, of the modules that have most "
            "words in common with the question.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return reuse_option(command)


def split_fidelity(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of ``fidelity_options`` out of all options, as ``Engine.plan`` takes them."""
    fidelity, recompute = options.pop("fidelity"), options.pop("recompute")
    asked = None if fidelity is None and recompute is None else Fidelity.of(fidelity, recompute)
    return {"fidelity": asked, "reuse": options.pop("reuse")}


def check_text_fidelity(exactness: dict[str, Any]) -> None:
    """Raise ``UsageError`` for what a prompt without a schema has no use for."""
    if exactness["fidelity"] is not None and exactness["reuse"] != "anywhere":
        raise click.UsageError(
            "--fidelity and --recompute are for --schema, or for --reuse anywhere: all else is exact"
        )


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
            help="How freely tokens are chosen. 0: always the likeliest.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(0),
            default=40,
            show_default=True,
            help="Choose among this many likeliest tokens. 0: among all.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.95,
            show_default=True,
            help="Choose among the likeliest tokens whose probabilities add up to this. 1: among all.",
        ),
        click.option(
            "--min-p",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.05,
            show_default=True,
            help="Leave out tokens less probable than this part of the likeliest. 0: none.",
        ),
        click.option(
            "--repeat-penalty",
            type=click.FloatRange(0, min_open=True),
            default=1.0,
            show_default=True,
            help="Above 1: avoid tokens that have occurred.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="For the same answer again.  [default: random]"),
        click.option("--stop", multiple=True, help="End the answer at this text. May be given several times."),
    )
    for option in reversed(options):
        command = option(command)
    return command

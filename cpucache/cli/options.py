"""Options that several commands share: model, engine, positions, fidelity and sampling."""

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
    """Parameter type for a range of two numbers, such as ``64-512``."""

    name = "MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Returns the least and the most. Raises ``BadParameter`` for text that is no range."""
        least, dash, most = str(value).partition("-")
        if not (dash and least.isdigit() and most.isdigit()):
            self.fail(f"'{value}' is not a range such as {LEAST}-{MOST}", param, ctx)
        return int(least), int(most)


def model_option(command: Command) -> Command:
    """Adds ``-m`` to a command."""
    return click.option(
        "-m",
        "--model",
        metavar="MODEL",
        default=default_model,
        help="Name of a model in the catalogue (`cpucache models list`; * marks the default), or path of a GGUF file.",
    )(command)


def engine_options(command: Command) -> Command:
    """Adds ``-m`` and the options that ``Engine`` takes to a command."""
    options = (
        click.option(
            "--ctx",
            "n_ctx",
            type=click.IntRange(1),
            help="Size of the llama.cpp context in tokens, for prompt and answer.  [default: as trained, at most 8192]",
        ),
        click.option("--threads", type=click.IntRange(1), help="Threads that compute.  [default: physical cores]"),
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
            help="Type of the saved keys. With q8_0, slices are a quarter smaller.",
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
            help="Format of slices on disk: unchanged (f16), or half (q8_0) or a quarter (q4_0) of the size. With q8_0 "
            "and q4_0, state read from disk approximates the saved state.",
        ),
        click.option(
            "--ram",
            "ram_budget",
            metavar="SIZE",
            help="Memory for slices, such as 512MiB or 2GiB.  [default: a quarter of the free memory]",
        ),
        click.option(
            "--disk",
            "disk_budget",
            metavar="SIZE",
            help="Disk space for slices. Slices of least worth are evicted, except those that other processes keep.  "
            "[default: a quarter of the free space]",
        ),
        click.option(
            "--segment-tokens",
            type=Range(),
            default=f"{LEAST}-{MOST}",
            show_default=True,
            help="Least and most tokens of a segment. Plain text and messages are cut into segments by content.",
        ),
        click.option(
            "--paranoid", is_flag=True, help="Verify the hash of a slice at every read, not only at the first."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return model_option(positions_option(command))


def positions_option(command: Command) -> Command:
    """Adds ``--positions`` to a command."""
    return click.option(
        "--positions",
        type=click.Choice(["auto", "reserved", "packed"]),
        default="auto",
        show_default=True,
        help="Positions of modules. reserved: each module has its own fixed positions. packed: included modules follow "
        "one another without gaps. auto: reserved if the whole schema fits the context that the model was trained on.",
    )(command)


FIDELITY = ("fidelity", "reuse")
"""Keywords of ``Engine.plan`` that choose which slices a prompt may use, and how many tokens are recomputed."""


def reuse_option(command: Command) -> Command:
    """Adds ``--reuse`` to a command."""
    return click.option(
        "--reuse",
        type=click.Choice(REUSES),
        help="Slices that a prompt may use. exact: slices evaluated after exactly the text that precedes them in the "
        "prompt. schema: also slices evaluated after other text of the same schema. anywhere: slices evaluated after "
        "any text; of plain text and messages, only changed segments are evaluated.  "
        "[default: schema; a prompt without a schema uses exact slices]",
    )(command)


def fidelity_options(command: Command) -> Command:
    """Adds ``--fidelity``, ``--recompute`` and ``--reuse`` to a command; ``split_fidelity`` reads them."""
    options = (
        click.option(
            "--fidelity",
            type=click.Choice(list(LEVELS)),
            help="Treatment of slices that were evaluated after other text than precedes them in the prompt. fast: "
            "they are used as saved; only the schema's closing text (16 tokens at most) is evaluated with the "
            "question. balanced: in addition, a tenth of the spliced tokens is recomputed, in the modules that share "
            "most words with the question. high: only exact slices are used; all other text is evaluated, and exact "
            f"the next time.  [default: {DEFAULT}]",
        ),
        click.option(
            "--recompute",
            type=click.FloatRange(0, 1),
            metavar="R",
            help="Share of the spliced tokens to recompute, in the modules that share most words with the question. "
            "Replaces --fidelity.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return reuse_option(command)


def split_fidelity(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the options of ``fidelity_options`` from ``options``; returns them as keywords of ``Engine.plan``."""
    fidelity, recompute = options.pop("fidelity"), options.pop("recompute")
    asked = None if fidelity is None and recompute is None else Fidelity.of(fidelity, recompute)
    return {"fidelity": asked, "reuse": options.pop("reuse")}


def check_text_fidelity(exactness: dict[str, Any]) -> None:
    """Raises ``UsageError`` if a fidelity is given for a prompt without a schema that uses only exact slices."""
    if exactness["fidelity"] is not None and exactness["reuse"] != "anywhere":
        raise click.UsageError(
            "--fidelity and --recompute need --schema or --reuse anywhere: other prompts are always exact"
        )


def sampling_options(command: Command) -> Command:
    """Adds ``--max-tokens`` and the sampling options to a command."""
    options = (
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Maximum length of the answer, in tokens.",
        ),
        click.option(
            "--temp",
            "temperature",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="Sampling temperature. 0: always the most probable token.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(0),
            default=40,
            show_default=True,
            help="Choose among the K most probable tokens. 0: among all.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.95,
            show_default=True,
            help="Choose among the most probable tokens whose probabilities add up to P. 1: among all.",
        ),
        click.option(
            "--min-p",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.05,
            show_default=True,
            help="Exclude tokens less probable than P times the most probable one. 0: none.",
        ),
        click.option(
            "--repeat-penalty",
            type=click.FloatRange(0, min_open=True),
            default=1.0,
            show_default=True,
            help="Above 1: make tokens that have occurred less probable.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Seed of the sampling.  [default: random]"),
        click.option("--stop", multiple=True, help="End the answer before this text. Repeatable."),
    )
    for option in reversed(options):
        command = option(command)
    return command

"""One prompt answered without the cache and with it, for ``run --compare`` and ``demo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cpucache.cli.console import kinds, seconds, times, token_bar
from cpucache.cli.options import FIDELITY
from cpucache.engine import Engine, Reply
from cpucache.pml.tree import Prompt
from cpucache.reuse import Encoded


@dataclass(frozen=True)
class Comparison:
    """Both answers, and the missing slices that were encoded between them."""

    uncached: Reply
    cached: Reply
    encoded: Encoded

    @property
    def speedup(self) -> float:
        """Ratio of the times to first token, uncached to cached."""
        return self.uncached.metrics.ttft_ms / self.cached.metrics.ttft_ms

    def as_dict(self) -> dict[str, Any]:
        """Returns the object that ``run --compare --json`` prints."""
        return {
            "cached": self.cached.as_dict(),
            "uncached": self.uncached.as_dict(),
            "speedup": round(self.speedup, 3),
            "same": self.cached.text == self.uncached.text,
        }


def compare(engine: Engine, asked: dict[str, Any], settings: dict[str, Any], *, silent: bool = False) -> Comparison:
    """Answers without the cache, encodes the missing slices, and answers from slices.

    Args:
        engine: Answers.
        asked: The prompt, in the form that ``read_asked`` returns.
        settings: Further keyword arguments of ``Engine.generate``.
        silent: Show no progress.
    """
    engine.warm_up()
    with token_bar("without the cache", shown=not silent) as progress:
        uncached = engine.generate(**asked, use_cache=False, progress=progress, **settings)
    with token_bar("encoding, once", shown=not silent) as progress:
        if isinstance(asked.get("prompt"), Prompt):
            exactness = {name: settings[name] for name in FIDELITY if name in settings}
            encoded = engine.encode_for(asked["prompt"], progress, **exactness)
        else:
            encoded = Encoded()
            if settings.get("reuse") != "anywhere":
                # A first request saves the exact slices of the text. With "anywhere", the first request is compared.
                engine.generate(**asked, progress=progress, **settings | {"max_tokens": 1})
            # The answer must come from slices, not from state that is still in the context.
            engine.warm_up()
    cached = engine.generate(**asked, **settings)
    return Comparison(uncached, cached, encoded)


def comparison_table(result: Comparison) -> Table:
    """Both answers side by side, with their times and token counts."""
    table = Table(box=SIMPLE_HEAD, show_lines=False, expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("without the cache", ratio=1)
    table.add_column("from cached slices", ratio=1)
    one, other = result.uncached, result.cached
    table.add_row("answer", Text(one.text.strip()), Text(other.text.strip()))
    table.add_row()
    table.add_row(
        "time to first token",
        Text(seconds(one.metrics.ttft_ms), style="bold"),
        Text(f"{seconds(other.metrics.ttft_ms)} ({times(result.speedup)} faster)", style="bold green"),
    )
    table.add_row("prompt", f"{one.metrics.prompt_tokens:,} tokens", f"{other.metrics.prompt_tokens:,} tokens")
    table.add_row("  evaluated", f"{one.metrics.fresh_tokens:,}", f"{other.metrics.fresh_tokens:,}")
    table.add_row("  from cache", f"{one.metrics.cached_tokens:,}", f"{other.metrics.cached_tokens:,}")
    near = kinds(other.metrics).strip(" ()")
    if near:
        table.add_row("  of these", "", near)
    same = "the same" if one.text == other.text else "different; see `cpucache fidelity`"
    table.add_row("answer is", "", same)
    if min(one.metrics.completion_tokens, other.metrics.completion_tokens) > 1:
        table.add_row("speed", *(f"{1000 / reply.metrics.tpot_ms:.1f} tok/s" for reply in (one, other)))
    if result.encoded.slices:
        table.caption = (
            f"{result.encoded.tokens:,} tokens were encoded in {result.encoded.seconds:.1f} s, once: "
            "later prompts that name the same modules reuse them"
        )
        table.caption_justify = "left"
    return table

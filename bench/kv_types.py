"""Bytes a token, speed and distance from f16 for each type of keys and values.

python bench/kv_types.py MODEL [--tokens 1000]
"""

from __future__ import annotations

import tempfile
from statistics import median

import click
import numpy as np

from cpucache import Engine
from cpucache.bench.text import filler_prompt, filler_schema
from cpucache.runtime import KVType

_SETTINGS: tuple[tuple[KVType, str], ...] = (("f16", "off"), ("q8_0", "off"), ("f16", "on"), ("q8_0", "on"))


@click.command()
@click.argument("model")
@click.option("--tokens", default=1000, show_default=True, help="Tokens cached, in 4 modules.")
@click.option("--repeat", default=7, show_default=True, help="Answers from RAM, of which the median counts.")
def main(model: str, tokens: int, repeat: int) -> None:
    """Compare types of keys and values on MODEL (a name of the catalogue or a path)."""
    reference: np.ndarray | None = None
    for kv_type, flash in _SETTINGS:
        with (
            tempfile.TemporaryDirectory() as store,
            Engine(model, store=store, kv_type=kv_type, flash=flash, n_ctx=tokens + 256) as engine,
        ):
            engine.add_schema(filler_schema(engine, tokens, 4))
            prompt = filler_prompt(engine, 4, 12)
            encoded = engine.encode("bench")
            engine.generate(prompt, max_tokens=1)
            logits = engine.context.logits().astype(np.float64)
            logprobs = logits - np.logaddexp.reduce(logits)
            reference = logprobs if reference is None else reference
            times = []
            for _ in range(repeat):
                engine.forget()
                times.append(engine.generate(prompt, max_tokens=1).metrics.ttft_ms)
            answer = engine.generate(prompt, max_tokens=24).metrics
            divergence = float((np.exp(reference) * (reference - logprobs)).sum())
            click.echo(
                f"keys {kv_type}, values {engine.context.value_type}, flash attention {flash}: "
                f"{encoded.bytes / encoded.tokens:,.0f} bytes a token, first token {median(times):.0f} ms, "
                f"{answer.tpot_ms:.1f} ms a token, KL {divergence:.4f} nats"
            )


if __name__ == "__main__":
    main()

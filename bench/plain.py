"""Measures prompts without markup, parts of which were evaluated before, in other orders or with something changed.

    python bench/plain.py qwen2.5-coder-1.5b-instruct [--repeat 7] [--json FILE]

``orders``: five documents of 500 tokens in one message, each time in a new order, with a new question. ``paragraph``: a
document of 4,000 tokens with a new paragraph in the middle each time. ``clock``: the same document after a time of day
that changes. Each prompt is asked with ``reuse="anywhere"`` and an empty llama.cpp context. Full prefill is measured
once for each kind. The floor is measured in turn: the time to evaluate as many tokens as the prompt needed, after all
its other tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cpucache import Engine
from cpucache.bench.text import filler
from cpucache.bench.ttft import floor
from cpucache.engine import Metrics
from cpucache.reuse import Plan, Span

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """Measurements of one prompt. Times to first token are in milliseconds.

    ``again``: the same prompt, asked a second time.
    """

    tokens: int
    evaluated: int
    ttft_ms: float
    floor_ms: float
    again_ms: float
    again_floor_ms: float


def orders(engine: Engine) -> Callable[[int], Messages]:
    """Returns messages by number: five documents, in a new order for each number except 0."""
    documents = [filler(engine, 500, 100 + index).strip() for index in range(5)]

    def messages(number: int) -> Messages:
        order = random.Random(number).sample(documents, len(documents)) if number else documents
        return [{"role": "user", "content": "\n\n".join([*order, _question(engine, number)])}]

    return messages


def changed(engine: Engine, *, clock: bool) -> Callable[[int], Messages]:
    """Returns messages by number: a document with another paragraph, or another time of day, for each number."""
    paragraphs = [_paragraph(engine, index) for index in range(40)]

    def messages(number: int) -> Messages:
        middle = paragraphs[20] if clock or not number else _paragraph(engine, 500 + number)
        text = "\n\n".join([*paragraphs[:20], middle, *paragraphs[21:]])
        time = f"1{number % 10}:4{number % 7}" if clock else "10:32"
        return [
            {"role": "system", "content": f"It is now {time}.\n\n{text}"},
            {"role": "user", "content": _question(engine, number)},
        ]

    return messages


def _paragraph(engine: Engine, seed: int) -> str:
    return f"{filler(engine, 98, seed).strip()}."


def _question(engine: Engine, number: int) -> str:
    return f"{filler(engine, 12, 900 + number).strip()}?"


def ask(engine: Engine, messages: Messages) -> tuple[Metrics, Plan]:
    """Answers from an empty llama.cpp context. Returns the metrics, and the plan of the same prompt afterwards."""
    engine.forget()
    metrics = engine.generate(messages, max_tokens=1, reuse="anywhere").metrics
    return metrics, engine.plan(messages, reuse="anywhere")


def measure(engine: Engine, messages: Callable[[int], Messages], repeat: int) -> tuple[float, list[Row]]:
    """Returns milliseconds of full prefill, and a row for each prompt."""
    full = engine.generate(messages(0), max_tokens=1).metrics.ttft_ms
    rows = []
    for number in range(1, repeat + 1):
        first, plan = ask(engine, messages(number))
        # The floor evaluates as many tokens as the prompt did, at the end of the plan.
        last = Span(plan.end - first.fresh_tokens, plan.tokens[-first.fresh_tokens :])
        lowest = floor(engine, Plan((last,)))
        again, plan = ask(engine, messages(number))
        again_lowest = floor(engine, plan)
        rows.append(
            Row(plan.n_tokens, first.fresh_tokens, first.ttft_ms, lowest, again.ttft_ms, again_lowest),
        )
    return full, rows


def main() -> None:
    """Measures, and prints medians, minima and maxima."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=7, help="prompts of each kind (default: 7)")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    given = parser.parse_args()
    result = {}
    for name in ("orders", "paragraph", "clock"):
        with tempfile.TemporaryDirectory() as folder, Engine(given.model, store=folder, n_ctx=8192) as engine:
            engine.warm_up()
            messages = orders(engine) if name == "orders" else changed(engine, clock=name == "clock")
            full, rows = measure(engine, messages, given.repeat)
        result[name] = {"full_ms": full, "rows": [asdict(row) for row in rows]}
        ratios = [row.ttft_ms / row.floor_ms for row in rows]
        first = statistics.median(row.ttft_ms for row in rows)
        again = statistics.median(row.again_ms / row.again_floor_ms for row in rows)
        print(f"{name}: {rows[0].evaluated} of {rows[0].tokens:,} tokens evaluated")
        print(f"  first token after {first:.0f} ms, full prefill {full / 1000:.1f} s: {full / first:.0f} times")
        middle = statistics.median(ratios)
        print(f"  of the floor {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), asked again {again:.2f}")
    if given.json:
        given.json.write_text(json.dumps({"model": given.model, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

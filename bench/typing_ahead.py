"""Measures time to first token of a question that was evaluated while it was typed.

    python bench/typing_ahead.py qwen2.5-coder-1.5b-instruct [--fast] [--json FILE]

A question of 40 words is typed character by character after 4,000 cached tokens in eight modules. Each round has
another question. Two more times are measured in turn. One is for the same prompt asked at once, with its modules in RAM
and an empty llama.cpp context. The other is the floor: the time to evaluate the question and sample a token when the
state of the modules is in the llama.cpp context already.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from cpucache import Engine
from cpucache.bench.text import WORDS, filler
from cpucache.bench.ttft import floor
from cpucache.engine import Preparation, TypingAhead
from cpucache.pml import parse_schema
from cpucache.pml.tree import Prompt, Reference, Turn

MODULES = 8


@dataclass
class Row:
    """Measurements of one question. Times are in milliseconds."""

    characters: int
    question_tokens: int
    left_tokens: int
    """Tokens evaluated between Enter and the first token of the answer."""
    typed_ms: float
    """Time to first token of the question that was evaluated while it was typed."""
    at_once_ms: float
    floor_ms: float
    same: bool
    """Whether the answers to the typed question and to the question asked at once are equal."""


def ask(question: str) -> Prompt:
    """Returns a prompt with a question after all modules."""
    modules = tuple(Reference(f"m{index}", {}, (), 1) for index in range(MODULES))
    return Prompt("bench", {}, (*modules, Turn("user", question, 1)), "<bench>", 1)


def write(text: str, typed: Callable[[str], None], pause: Callable[[], None]) -> None:
    """Types a text: calls ``typed`` with the text so far, then ``pause``, for each character."""
    for end in range(1, len(text) + 1):
        typed(text[:end])
        pause()


def question(words: int, seed: int) -> str:
    """Returns a question of random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "?"


def measure(engine: Engine, text: str, seconds: float | None, tokens: int) -> Row:
    """Measures one question.

    Args:
        engine: Engine with the encoded schema.
        text: The question.
        seconds: Seconds between two characters; ``None``: each follows when the text before it is evaluated.
        tokens: Most tokens of the answers.

    Returns:
        The measurements.
    """
    prompt = ask(text)
    engine.forget()
    at_once = engine.generate(prompt, max_tokens=tokens)
    # Leaves the modules in the llama.cpp context, as after an earlier question.
    engine.generate(ask("Hello"), max_tokens=1)
    last: list[Preparation] = []

    def prepare(so_far: str) -> Preparation:
        last[:] = [engine.prepare(ask(so_far), unfinished=True)]
        return last[0]

    def pause() -> None:
        if seconds is None:
            last[0].result()
        else:
            time.sleep(seconds)

    ahead = TypingAhead(prepare)
    write(text, ahead.typed, pause)
    ahead.stop()
    typed = engine.generate(prompt, max_tokens=tokens)
    plan = engine.plan(prompt)
    engine.generate(prompt, max_tokens=1)
    lowest = floor(engine, plan)
    return Row(
        len(text),
        len(plan.spans[-1].tokens),
        typed.metrics.fresh_tokens,
        typed.metrics.ttft_ms,
        at_once.metrics.ttft_ms,
        lowest,
        typed.text == at_once.text,
    )


def main() -> None:
    """Measures, and prints medians, minima and maxima."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4000, help="cached tokens (default: 4000)")
    parser.add_argument("--words", type=int, default=40, help="words of a question (default: 40)")
    parser.add_argument("--speed", type=float, default=200, help="characters a minute (default: 200)")
    parser.add_argument("--fast", action="store_true", help="type each character when those before it are evaluated")
    parser.add_argument("--repeat", type=int, default=5, help="questions (default: 5)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of the answers that are compared (default: 16)")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, Engine(given.model, store=folder, n_ctx=8192) as engine:
        sizes = [given.tokens // MODULES] * MODULES
        modules = (f'<module name="m{at}">{filler(engine, size, at)}</module>' for at, size in enumerate(sizes))
        engine.add_schema(parse_schema(f'<schema name="bench"><system>{"".join(modules)}</system></schema>'))
        engine.warm_up()
        engine.encode("bench")
        for number in range(given.repeat):
            text = question(given.words, number)
            rows.append(measure(engine, text, None if given.fast else 60 / given.speed, given.answer))
            print(f"{number + 1}: {asdict(rows[-1])}", flush=True)
    ratios = [row.typed_ms / row.floor_ms for row in rows]
    print(
        f"{median(row.left_tokens for row in rows):.0f} of {median(row.question_tokens for row in rows):.0f} tokens "
        f"are left on Enter; first token after {median(row.typed_ms for row in rows):.0f} ms, at once "
        f"{median(row.at_once_ms for row in rows):.0f} ms, floor {median(row.floor_ms for row in rows):.0f} ms"
    )
    print(f"of the floor {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"{sum(row.same for row in rows)} of {len(rows)} answers are those at once")
    if given.json:
        result = {
            "model": given.model,
            "cached_tokens": given.tokens,
            "characters_a_minute": None if given.fast else given.speed,
            "typed_to_floor": round(median(ratios), 4),
            "rows": [asdict(row) for row in rows],
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Counts answers that betray text which a prompt leaves out, or text from before a change.

    python bench/leakage.py qwen2.5-coder-1.5b-instruct [--changes] [--json FILE]

The prompts in bench/leakage/prompts.json ask for values that their schema contains only in modules that they leave out,
or in members of unions that they do not take. An answer betrays such a value if it contains the value and the answer of
full prefill does not. All slices are those that ``encode`` saves. Each prompt is answered at each fidelity level.

With ``--changes``, questions are asked about the text of bench/leakage/changes.json after something in it has changed:
a clock, a name, a price, an instruction. All slices after the change attended to the old text. Each question is
answered with several shares of these slices recomputed; the store holds only slices of the text before the change.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpucache import Engine, Fidelity
from cpucache.pml import load_schema

FOLDER = Path(__file__).parent / "leakage"
LEVELS: tuple[Any, ...] = ("fast", "balanced")
SHARES = (0.0, 0.1)
MAX_TOKENS = 32


def betrayed(text: str, values: list[str]) -> list[str]:
    """Returns the left-out values that an answer contains."""
    return [value for value in values if value.casefold() in text.casefold()]


Answered = tuple[str, list[str], str, dict[str, str]]
"""Name of a question, values that its answer must not contain, answer of full prefill, and the other answers."""


def left_out(model: str) -> Iterator[Answered]:
    """Yields answers to prompts that leave something out, by fidelity level."""
    prompts = json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, Engine(model, store=folder, n_ctx=2048) as engine:
        for name in dict.fromkeys(prompt["schema"] for prompt in prompts):
            engine.add_schema(load_schema(FOLDER / f"{name}.xml"))
            engine.encode(name)
        for prompt in prompts:
            full = engine.generate(prompt["prompt"], max_tokens=MAX_TOKENS, use_cache=False).text
            texts = {
                level: engine.generate(prompt["prompt"], max_tokens=MAX_TOKENS, fidelity=level).text for level in LEVELS
            }
            yield prompt["name"], prompt["betrays"], full, texts


def changed(model: str) -> Iterator[Answered]:
    """Yields answers to questions about a text in which something has changed, by the share recomputed."""
    given = json.loads((FOLDER / "changes.json").read_text(encoding="utf-8"))
    for change in given["changes"]:
        texts: dict[str, str] = {}
        for share in (*SHARES, None):
            with tempfile.TemporaryDirectory() as folder, Engine(model, store=folder, n_ctx=2048) as engine:
                old, new = (
                    [
                        {"role": "system", "content": given["text"].format(**given["usual"] | {change["slot"]: value})},
                        {"role": "user", "content": question},
                    ]
                    for value, question in ((change["old"], "Hello!"), (change["new"], change["question"]))
                )
                if share is None:
                    full = engine.generate(new, max_tokens=MAX_TOKENS, use_cache=False).text
                    break
                engine.generate(old, max_tokens=1)
                settings: dict[str, Any] = {
                    "reuse": "anywhere",
                    "fidelity": Fidelity(recompute=share),
                    "max_tokens": MAX_TOKENS,
                }
                texts[f"recompute {share}"] = engine.generate(new, **settings).text
        yield change["name"], [change["betrays"]], full, texts


def measure(model: str, answers: Iterator[Answered]) -> dict[str, Any]:
    """Returns the answers that betray a value, by level or share."""
    found: dict[str, list[dict[str, Any]]] = {}
    same: dict[str, int] = {}
    count = 0
    for name, values, full, texts in answers:
        count += 1
        for how, text in texts.items():
            same[how] = same.get(how, 0) + (text == full)
            told = [value for value in betrayed(text, values) if not betrayed(full, [value])]
            found.setdefault(how, [])
            if told:
                found[how].append({"prompt": name, "values": told, "text": text, "full": full})
    return {"model": model, "prompts": count, "same": same, "betrayed": found}


def main() -> None:
    """Counts, and prints the answers found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--changes", action="store_true", help="ask about text that has changed")
    parser.add_argument("--json", type=Path, help="write all answers found to this file")
    given = parser.parse_args()
    result = measure(given.model, changed(given.model) if given.changes else left_out(given.model))
    for how, cases in result["betrayed"].items():
        print(
            f"{how}: {len(cases)} of {result['prompts']} answers betray what is not there; "
            f"{result['same'][how]} are those of full prefill"
        )
        for case in cases:
            print(f"  {case['prompt']}: {', '.join(case['values'])} in {case['text']!r} (full: {case['full']!r})")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

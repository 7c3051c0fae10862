"""Counts what shows through of modules that a prompt leaves out.

    python bench/leakage.py qwen2.5-coder-1.5b-instruct [--json FILE]

The prompts in bench/leakage/prompts.json ask for what their schema says elsewhere, in modules that they leave out or in
members of unions that they do not take. An answer that holds such a value, where the answer of full prefill does not,
betrays it. All slices are those that ``encode`` makes; each prompt is answered at every level.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from cpucache import Engine
from cpucache.pml import load_schema

FOLDER = Path(__file__).parent / "leakage"
LEVELS: tuple[Any, ...] = ("fast", "balanced")
MAX_TOKENS = 32


def betrayed(text: str, values: list[str]) -> list[str]:
    """The left-out values that an answer holds."""
    return [value for value in values if value.casefold() in text.casefold()]


def measure(model: str) -> dict[str, Any]:
    """Answers that betray something, by level."""
    prompts = json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8"))
    found: dict[str, list[dict[str, Any]]] = {level: [] for level in LEVELS}
    same = dict.fromkeys(LEVELS, 0)
    with tempfile.TemporaryDirectory() as folder, Engine(model, store=folder, n_ctx=2048) as engine:
        for name in dict.fromkeys(prompt["schema"] for prompt in prompts):
            engine.add_schema(load_schema(FOLDER / f"{name}.xml"))
            engine.encode(name)
        for prompt in prompts:
            full = engine.generate(prompt["prompt"], max_tokens=MAX_TOKENS, use_cache=False).text
            for level in LEVELS:
                text = engine.generate(prompt["prompt"], max_tokens=MAX_TOKENS, fidelity=level).text
                same[level] += text == full
                values = [value for value in betrayed(text, prompt["betrays"]) if not betrayed(full, [value])]
                if values:
                    found[level].append({"prompt": prompt["name"], "values": values, "text": text, "full": full})
    return {"model": model, "prompts": len(prompts), "same": same, "betrayed": found}


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--json", type=Path, help="write everything here")
    given = parser.parse_args()
    result = measure(given.model)
    for level, cases in result["betrayed"].items():
        print(
            f"{level}: {len(cases)} of {result['prompts']} answers betray a left-out value; "
            f"{result['same'][level]} are those of full prefill"
        )
        for case in cases:
            print(f"  {case['prompt']}: {', '.join(case['values'])} in {case['text']!r} (full: {case['full']!r})")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Prompts for measurements: of a given number of tokens, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Iterable

from cpucache.engine import Engine
from cpucache.pml import parse_schema
from cpucache.pml.tree import Schema

WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea body information back parent
face others level office door health person art war history party result change morning reason research girl guy
moment air teacher force education
""".split()  # noqa: SIM905 - a list of words reads better as text


def filler(engine: Engine, tokens: int, seed: int) -> str:
    """Returns plain words of ``tokens`` tokens under the engine's model, or slightly fewer if no words fit exactly."""
    choice = random.Random(seed)
    words: list[str] = []
    while True:
        missing = tokens - len(engine.model.tokenize(_joined(words)))
        if missing <= 0:
            break
        words += [choice.choice(WORDS) for _ in range(max(1, missing // 2))]
    while len(engine.model.tokenize(_joined(words))) > tokens:
        words.pop()
    return _joined(words)


def _joined(words: list[str]) -> str:
    return "".join(f" {word}" for word in words)


def filler_schema(engine: Engine, tokens: int, modules: int) -> Schema:
    """Returns a schema of ``modules`` modules with ``tokens`` tokens in total."""
    sizes = [tokens // modules + (index < tokens % modules) for index in range(modules)]
    parts = (f'<module name="m{index}">{filler(engine, size, index)}</module>' for index, size in enumerate(sizes))
    return parse_schema(f'<schema name="bench">{"".join(parts)}</schema>', file="<bench>")


def filler_prompt(engine: Engine, order: Iterable[int], question: int, seed: int = 1000) -> str:
    """Returns a prompt on a schema of ``filler_schema``.

    Args:
        engine: Engine whose tokenizer sets the length of the question.
        order: Numbers of the modules, from 0, in the order of the prompt.
        question: Tokens of new text after the modules.
        seed: Seed of the new text.

    Returns:
        The prompt as PML.
    """
    references = "".join(f"<m{index}/>" for index in order)
    return f'<prompt schema="bench">{references}{filler(engine, question, seed)}</prompt>'

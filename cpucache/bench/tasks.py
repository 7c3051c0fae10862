"""What is asked of an example, in which words, and in which ways it is answered: examples as schemas and prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any
from xml.sax.saxutils import escape

from cpucache.bench.datasets import Example
from cpucache.bench.scores import accuracy, exact_match, f1, rouge_l
from cpucache.errors import InputError
from cpucache.layout.lead import LEAD

SCHEMA = "bench"
"""What the schema of every example is called: the next one takes its place."""

Measure = Callable[[str, Example], float]
# What XML 1.0 can't hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


# ---- tasks ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """What is asked. The first of ``measures`` is the one that counts.

    ``instruction`` stands before the passages, ``request`` behind them, ``{question}`` being the example's own;
    ``unasked`` takes its place when an example has no question.
    """

    name: str
    instruction: str
    request: str
    unasked: str
    max_tokens: int
    measures: Mapping[str, Measure] = field(repr=False)
    stop: tuple[str, ...] = ()

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """The measures of an answer, each from 0 to 1."""
        return {name: measure(answer.strip(), example) for name, measure in self.measures.items()}

    def check(self, example: Example) -> None:
        """Raise ``InputError`` when the task can't be set on an example."""
        if self.name == "choice" and not example.choices:
            raise InputError(f"line {example.line} of the data has no choices ('all_classes' or 'choices')")

    def schema(self, example: Example, variant: Variant) -> str:
        """The example's passages as modules p1, p2, ... of a schema in PML."""
        instruction = self.instruction
        if example.choices:
            instruction += " The choices are: " + "; ".join(example.choices) + "."
        names = module_names(example)
        modules = "".join(
            f'<module name="{name}">\n{_xml(_heading(number, passage.title) + passage.text)}\n</module>'
            for number, (name, passage) in enumerate(zip(names, example.passages, strict=True), 1)
        )
        attributes = "" if variant.anchored else ' anchor="none"'
        scaffold = f'<scaffold modules="{" ".join(names)}"/>' if variant.scaffold and len(names) > 1 else ""
        return f'<schema name="{SCHEMA}"{attributes}><system>{_xml(instruction)}\n{modules}</system>{scaffold}</schema>'

    def prompt(self, example: Example) -> str:
        """The prompt in PML: every passage, and the question."""
        question = example.question.strip()
        request = self.request.replace("{question}", question) if question else self.unasked
        references = "".join(f"<{name}/>" for name in module_names(example))
        return f'<prompt schema="{SCHEMA}">{references}<user>{_xml(request)}</user></prompt>'


def module_names(example: Example) -> list[str]:
    """What the modules of an example's passages are called."""
    return [f"p{number}" for number in range(1, len(example.passages) + 1)]


def _heading(number: int, title: str) -> str:
    return f"Passage {number}: {title}\n" if title else f"Passage {number}:\n"


def _xml(text: str) -> str:
    return escape(_ILLEGAL.sub(" ", text))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="qa",
            instruction="Answer the question from the passages that follow. Give the answer alone, in as few words as "
            "possible, without any explanation.",
            request="Question: {question}\nAnswer, in as few words as possible:",
            unasked="Answer, in as few words as possible:",
            max_tokens=32,
            measures=MappingProxyType(
                {
                    "f1": lambda answer, example: f1(answer, example.answers),
                    "exact_match": lambda answer, example: exact_match(answer, example.answers),
                }
            ),
            stop=("\n",),
        ),
        Task(
            name="summary",
            instruction="You are given several passages. Summarise what they say, all of them together, in one "
            "paragraph.",
            request="Answer from the passages, in one paragraph: {question}",
            unasked="Write a summary of all the passages in one paragraph.",
            max_tokens=128,
            measures=MappingProxyType({"rouge_l": lambda answer, example: rouge_l(answer, example.answers)}),
        ),
        Task(
            name="choice",
            instruction="Choose the right answer to the question from the passages that follow. Give the choice alone, "
            "as it is written here, without any explanation.",
            request="{question}\nThe right choice, alone:",
            unasked="The right choice, alone:",
            max_tokens=8,
            measures=MappingProxyType(
                {"accuracy": lambda answer, example: accuracy(answer, example.answers, example.choices)}
            ),
            stop=("\n",),
        ),
    )
}


# ---- variants ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Variant:
    """One way of answering: what is reused, and what is evaluated afresh.

    ``anchored``: modules see the text of the schema that stands before them. ``scaffold``: all modules are encoded
    together besides. ``lead_tokens``, ``link_tokens`` and ``recompute`` are the engine's.
    """

    name: str
    cached: bool = True
    anchored: bool = True
    scaffold: bool = False
    lead_tokens: int = 0
    link_tokens: int = 0
    recompute: float = 0.0

    @property
    def fidelity(self) -> dict[str, Any]:
        """How exact the engine is told to be."""
        return {
            "lead_tokens": self.lead_tokens,
            "link_tokens": self.link_tokens,
            "recompute": self.recompute,
        }


FULL = "full"
ALL_VARIANTS = f"full,alone,anchored,lead:{LEAD},link:16,scaffold,recompute:0.1"

_PLAIN: dict[str, dict[str, Any]] = {
    FULL: {"cached": False},
    "anchored": {},
    "alone": {"anchored": False},
    "scaffold": {"scaffold": True},
}


def parse_variants(text: str) -> list[Variant]:
    """Variants by name, as in ``full,anchored,link:16,alone+link:16``; ``+`` does several things at once.

    Raises ``InputError``.
    """
    variants = [_variant(name.strip()) for name in text.split(",")]
    names = [variant.name for variant in variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"variant '{min(twice)}' is given twice")
    return variants


def _variant(name: str) -> Variant:
    variant = Variant(name)
    parts = name.split("+")
    kinds = [part.partition(":")[0] for part in parts]
    if len(set(kinds)) < len(kinds) or (len(kinds) > 1 and {FULL, "anchored"} & set(kinds)):
        raise InputError(f"variant '{name}': these can't be combined")
    for part, kind in zip(parts, kinds, strict=True):
        if part in _PLAIN:
            variant = replace(variant, **_PLAIN[part])
        elif kind == "lead":
            variant = replace(variant, lead_tokens=_number(part, int, f"lead:{LEAD}", "tokens", 1 << 30))
        elif kind == "link":
            variant = replace(variant, link_tokens=_number(part, int, "link:16", "tokens", 1 << 30))
        elif kind == "recompute":
            variant = replace(variant, recompute=_number(part, float, "recompute:0.15", "a share up to 1", 1))
        else:
            known = ", ".join((*_PLAIN, "lead:K", "link:K", "recompute:R"))
            raise InputError(f"unknown variant '{name}': known are {known}, and several joined by +")
    return variant


def _number(part: str, kind: Callable[[str], Any], example: str, what: str, most: float) -> Any:
    try:
        value = kind(part.partition(":")[2])
    except ValueError:
        value = 0
    if not 0 < value <= most:
        raise InputError(f"variant '{part}': write {what} behind a colon, as in {example}")
    return value

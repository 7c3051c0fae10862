"""Tasks of the accuracy benchmark: wording, scores, examples as schemas and prompts, and variants of answering."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from xml.sax.saxutils import escape

from cpucache.bench.datasets import Example
from cpucache.bench.scores import accuracy, exact_match, f1, rouge_l
from cpucache.errors import InputError
from cpucache.reuse import LEVELS, Fidelity

SCHEMA = "bench"
"""Name of every example's schema: each schema replaces the one before."""

_ASKER = 12  # most tokens of the name of the person who asks

Measure = Callable[[str, Example], float]
# Characters that XML 1.0 can't hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


# ---- tasks ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """What is asked, and how answers are scored. The first of ``measures`` is the main one.

    ``instruction`` comes before the passages, and ``request``, with the example's question for ``{question}``, after
    them. ``unasked`` replaces the request if an example has no question. ``max_tokens`` and ``stop`` limit the answer.
    """

    name: str
    instruction: str
    request: str
    unasked: str
    max_tokens: int
    measures: Mapping[str, Measure] = field(repr=False)
    stop: tuple[str, ...] = ()

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """Returns the score of an answer by each measure, from 0 to 1."""
        return {name: measure(answer.strip(), example) for name, measure in self.measures.items()}

    def check(self, example: Example) -> None:
        """Raises ``InputError`` if an example does not suit the task."""
        if self.name == "choice" and not example.choices:
            raise InputError(f"line {example.line} of the data has no choices ('all_classes' or 'choices')")

    def schema(self, example: Example, variant: Variant) -> str:
        """Returns a schema in PML with the example's passages as modules p1, p2, ..."""
        instruction = _xml(self.instruction)
        if example.choices:
            instruction += _xml(" The choices are: " + "; ".join(example.choices) + ".")
        if example.asker:
            instruction += f' The question is asked by <parameter name="asker" length="{_ASKER}" scaffold="Ann"/>.'
        names = module_names(example)
        isolate = ' isolate="true"' if variant.isolated else ""
        modules = ""
        for number, slot in enumerate(example.slots, 1):
            passages = [(names[index], example.passages[index]) for index in slot]
            members = "".join(
                f'<module name="{name}"{isolate}>\n{_xml(_heading(number, passage.title) + passage.text)}\n</module>'
                for name, passage in passages
            )
            modules += members if example.unions is None else f"<union>{members}</union>"
        attributes = "" if variant.related else ' anchor="none"'
        return f'<schema name="{SCHEMA}"{attributes}><system>{instruction}\n{modules}</system></schema>'

    def prompt(self, example: Example) -> str:
        """Returns the prompt in PML: the chosen passages, and the question."""
        question = example.question.strip()
        request = self.request.replace("{question}", question) if question else self.unasked
        names = module_names(example)
        chosen = range(len(names)) if example.chosen is None else example.chosen
        references = "".join(f"<{names[number]}/>" for number in chosen)
        argument = f' asker="{example.asker}"' if example.asker else ""
        return f'<prompt schema="{SCHEMA}"{argument}>{references}<user>{_xml(request)}</user></prompt>'

    def messages(self, example: Example, *, whole: bool = False) -> list[dict[str, str]]:
        """Returns the prompt without markup: one message of the chosen passages and the question, with blank lines.

        ``whole``: all passages in the schema's order, with the request of an example without question.
        """
        question = "" if whole else example.question.strip()
        request = self.request.replace("{question}", question) if question else self.unasked
        numbers = {index: number for number, slot in enumerate(example.slots, 1) for index in slot}
        chosen = range(len(example.passages)) if whole or example.chosen is None else example.chosen
        passages = [(numbers[index], example.passages[index]) for index in chosen]
        texts = [_heading(number, passage.title) + passage.text.strip() for number, passage in passages]
        return [{"role": "user", "content": "\n\n".join([self.instruction, *texts, request])}]


def module_names(example: Example) -> list[str]:
    """Returns the names of the modules of an example's passages."""
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
    """One way of answering.

    ``cached``: slices are reused. ``related``: while the schema is encoded, modules attend to the modules before them;
    otherwise the schema has ``anchor="none"``. ``isolated``: modules have ``isolate="true"``, so they attend only to
    the text around them. ``refined``: the prompt is asked, refined, and asked again.
    """

    name: str
    cached: bool = True
    related: bool = True
    isolated: bool = False
    refined: bool = False
    fidelity: Fidelity = field(default_factory=Fidelity)

    @property
    def encoded(self) -> tuple[bool, bool]:
        """Attributes of the schema: variants with equal ones share its slices."""
        return self.related, self.isolated


FULL = "full"
ALL_VARIANTS = "full,standalone,fast,balanced,refined"

_PLAIN: dict[str, Variant] = {
    FULL: Variant(FULL, cached=False),
    "standalone": Variant("standalone", related=False),
    "isolate": Variant("isolate", isolated=True),
    "refined": Variant("refined", refined=True),
    **{level: Variant(level, fidelity=fidelity) for level, fidelity in LEVELS.items()},
}


def parse_variants(text: str) -> list[Variant]:
    """Returns variants by name, as in ``full,fast,recompute:0.2,standalone+recompute:0.1``.

    Raises ``InputError`` if ``full`` is not the first, a name is unknown or repeated, or a share is not valid.
    """
    variants = [_variant(name.strip()) for name in text.split(",")]
    if variants[0].name != FULL:
        raise InputError(f"the first variant must be '{FULL}': the others are compared with it")
    names = [variant.name for variant in variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"variant '{min(twice)}' is given twice")
    return variants


def _variant(name: str) -> Variant:
    first, _, more = name.partition("+")
    share = more or (first if first.startswith("recompute:") else "")
    plain = _PLAIN.get("fast" if share and share == first else first)
    if plain is None or (more and not more.startswith("recompute:")) or (share and not plain.cached):
        raise InputError(f"unknown variant '{name}': known are {', '.join(_PLAIN)}, recompute:R, and one +recompute:R")
    if not share:
        return plain
    try:
        return replace(plain, name=name, fidelity=Fidelity(float(share.partition(":")[2])))
    except ValueError:
        raise InputError(f"variant '{name}': write a share from 0 to 1 after the colon, as in recompute:0.15") from None

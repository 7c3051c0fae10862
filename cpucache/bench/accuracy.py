"""Accuracy: how good answers from cached slices are, and how soon they come, against those of full prefill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpucache.bench.datasets import Example
from cpucache.bench.results import Answer, Results
from cpucache.bench.scores import Interval, paired_interval
from cpucache.bench.series import Series
from cpucache.bench.tasks import FULL, Task, Variant
from cpucache.engine import Engine
from cpucache.errors import InputError, PMLError
from cpucache.pml import parse_schema
from cpucache.store import Store

OnAnswer = Callable[[int, int, str], None]
"""Told how many questions are done, of how many, and which variant is next."""


@dataclass
class Outcome:
    """What one variant reached. ``scores`` are from 0 to 1; ``gains`` what they exceed those of full prefill by."""

    variant: str
    ttft: Series = field(default_factory=Series)
    scores: dict[str, float] = field(default_factory=dict)
    gains: dict[str, Interval] = field(default_factory=dict)
    ttft_to_full: float | None = None

    @property
    def n(self) -> int:
        """Questions answered."""
        return len(self.ttft.values)

    def as_dict(self) -> dict[str, Any]:
        """Scores in points of 100, for ``--json``."""
        scores: dict[str, dict[str, float]] = {
            name: {"mean": round(100 * score, 2)} for name, score in self.scores.items()
        }
        for name, gain in self.gains.items():
            for key, value in zip(("difference", "low", "high"), gain, strict=True):
                scores[name][key] = round(100 * value, 2)
        result = {"variant": self.variant, "n": self.n, "scores": scores, "ttft": self.ttft.as_dict()}
        if self.ttft_to_full is not None:
            result["ttft_to_full"] = round(self.ttft_to_full, 4)
        return result


@dataclass
class AccuracyReport:
    """What was measured. ``too_long`` counts examples passed over because they did not fit the context."""

    model: str
    data: str
    task: str
    seed: int
    measures: tuple[str, ...]
    """The first is the one that counts."""
    outcomes: list[Outcome]
    too_long: int

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        names = ("model", "data", "task", "seed", "too_long")
        return {
            **{name: getattr(self, name) for name in names},
            "variants": [outcome.as_dict() for outcome in self.outcomes],
        }


def settings_of(
    engine: Engine, data: Path, examples: Sequence[Example], task: Task, *, seed: int, positions: str
) -> dict[str, object]:
    """What answers and times depend on, besides the example and the variant."""
    wording = {name: value for name, value in vars(task).items() if name != "measures"}
    return {
        "model": engine.model.path.stem,
        "fingerprint": engine.fingerprint,
        "data": data.name,
        "data_hash": hashlib.sha256(data.read_bytes()).hexdigest()[:16],
        "task": task.name,
        "wording": hashlib.sha256(repr(sorted(wording.items())).encode()).hexdigest()[:16],
        "passages": len(examples[0].passages) if examples[0].alone else None,
        "seed": seed,
        "positions": positions,
        "kv_type": engine.context.kv_type,
        "flash": engine.context.flash,
        "threads": engine.context.n_threads,
        "n_ctx": engine.context.n_ctx,
    }


def measure_accuracy(
    engine: Engine,
    data: Path,
    examples: Sequence[Example],
    task: Task,
    variants: Sequence[Variant],
    results: Results,
    *,
    limit: int | None,
    seed: int,
    progress: OnAnswer,
) -> AccuracyReport:
    """Answer the first ``limit`` examples that fit the context in every variant; what ``results`` holds is not redone.

    All variants answer one question before the next is asked, greedily, with the same limit of tokens. Slices are
    encoded ahead and then spliced from RAM into an empty context; they are shared by the variants of a question and
    dropped before the next one. ``data`` and ``seed`` are where the examples are from. Raises ``InputError`` when none
    fits the context or one does not suit the task.
    """
    chosen, too_long = _chosen(engine, examples, task, limit)
    engine.warm_up()
    for done, example in enumerate(chosen):
        missing = [variant for variant in variants if (example.line, variant.name) not in results]
        if missing:
            with _slices_in_memory(engine):
                for variant in missing:
                    progress(done, len(chosen), variant.name)
                    results.add(_answer(engine, example, task, variant))
    outcomes = summarise(
        {variant.name: [results[example.line, variant.name] for example in chosen] for variant in variants}
    )
    model = engine.model.path.stem
    return AccuracyReport(model, data.name, task.name, seed, tuple(task.measures), outcomes, too_long)


def summarise(answers: dict[str, list[Answer]]) -> list[Outcome]:
    """What each variant reached. All have answered the same questions, in the same order."""
    outcomes = []
    full = answers.get(FULL)
    for variant, given in answers.items():
        outcome = Outcome(variant, Series([answer.ttft_ms for answer in given]))
        for name in given[0].scores:
            scores = [answer.scores[name] for answer in given]
            outcome.scores[name] = sum(scores) / len(scores)
            if full and variant != FULL:
                outcome.gains[name] = paired_interval(scores, [answer.scores[name] for answer in full])
        if full and variant != FULL:
            outcome.ttft_to_full = outcome.ttft.median / Series([answer.ttft_ms for answer in full]).median
        outcomes.append(outcome)
    return outcomes


def _chosen(engine: Engine, examples: Sequence[Example], task: Task, limit: int | None) -> tuple[list[Example], int]:
    """The first examples that fit, with their answers, and how many were passed over on the way."""
    chosen: list[Example] = []
    too_long = 0
    plain = Variant(FULL, cached=False)
    for example in examples:
        if len(chosen) == limit:
            break
        task.check(example)
        try:
            _add_schema(engine, example, task, plain)
        except PMLError:
            # The markup is ours, so it is the length: more than the model can hold.
            too_long += 1
            continue
        if engine.plan(task.prompt(example)).n_tokens + task.max_tokens > engine.context.n_ctx:
            too_long += 1
        else:
            chosen.append(example)
    if not chosen:
        raise InputError(
            f"none of the {len(examples)} examples fits a context of {engine.context.n_ctx} tokens; raise --ctx"
        )
    return chosen, too_long


def _answer(engine: Engine, example: Example, task: Task, variant: Variant) -> Answer:
    _add_schema(engine, example, task, variant)
    prompt = task.prompt(example)
    encoded = engine.encode_for(prompt, **variant.fidelity).tokens if variant.cached else 0
    engine.workspace.reset()
    reply = engine.generate(
        prompt, max_tokens=task.max_tokens, stop=task.stop, use_cache=variant.cached, **variant.fidelity
    )
    return Answer(
        example=example.line,
        variant=variant.name,
        text=reply.text,
        scores=task.score(reply.text, example),
        ttft_ms=reply.metrics.ttft_ms,
        prompt_tokens=reply.metrics.prompt_tokens,
        fresh_tokens=reply.metrics.fresh_tokens,
        encoded_tokens=encoded,
    )


def _add_schema(engine: Engine, example: Example, task: Task, variant: Variant) -> None:
    engine.add_schema(parse_schema(task.schema(example, variant), file=f"<line {example.line}, {variant.name}>"))


@contextmanager
def _slices_in_memory(engine: Engine) -> Iterator[None]:
    """Meanwhile slices are kept in RAM alone, as many as there are, and dropped at the end."""
    kept = engine.store
    with Store(None, ram_budget=1 << 40) as store:
        engine.workspace.store = engine.store = store
        try:
            yield
        finally:
            engine.workspace.store = engine.store = kept
            engine.workspace.reset()

"""Accuracy benchmark: quality and time to first token of answers from slices, against those of full prefill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from cpucache.bench.datasets import Example
from cpucache.bench.results import Answer, Results
from cpucache.bench.scores import Interval, paired_interval
from cpucache.bench.series import Series
from cpucache.bench.tasks import FULL, SCHEMA, Task, Variant
from cpucache.bench.ttft import floor
from cpucache.engine import Engine, Stream
from cpucache.engine.answer import Answer as Answering
from cpucache.engine.fidelity import Truth, distance, truth
from cpucache.engine.planner import Question
from cpucache.engine.saving import Saving
from cpucache.errors import ContextFull, InputError, PMLError
from cpucache.layout.vocabulary import Tokens, joined
from cpucache.pml import parse_schema
from cpucache.reuse import Plan, Span
from cpucache.reuse.way import answer, nothing
from cpucache.runtime import Sampling
from cpucache.store import Store

OnAnswer = Callable[[int, int, str], None]
"""Called with the number of answers so far and in total, and a description of the next step."""


@dataclass
class Outcome:
    """Results of one variant.

    ``scores``: means, from 0 to 1. ``gains``: differences from the scores of full prefill. Ratios of times are medians
    over the questions; ``again``: the same prompt, asked a second time. ``kl``: divergence from full prefill in nats.
    """

    variant: str
    ttft: Series = field(default_factory=Series)
    scores: dict[str, float] = field(default_factory=dict)
    gains: dict[str, Interval] = field(default_factory=dict)
    ttft_to_full: float | None = None
    ttft_to_floor: float | None = None
    again_to_floor: float | None = None
    kl: float = 0.0
    kl_median: float = 0.0
    same: float = 1.0
    """Share of answers that equal those of full prefill."""
    encoded_tokens: int = 0
    """Tokens evaluated to encode missing slices, of all questions together."""
    encode_to_once: float | None = None
    """Time to encode a schema, divided by the time to evaluate all its text once; median over the schemas."""

    @property
    def n(self) -> int:
        """Number of questions answered."""
        return len(self.ttft.values)

    def as_dict(self) -> dict[str, Any]:
        """Returns the results for ``--json``, with scores in points of 100."""
        scores: dict[str, dict[str, float]] = {
            name: {"mean": round(100 * score, 2)} for name, score in self.scores.items()
        }
        for name, gain in self.gains.items():
            for key, value in zip(("difference", "low", "high"), gain, strict=True):
                scores[name][key] = round(100 * value, 2)
        result = {"variant": self.variant, "n": self.n, "scores": scores, "ttft": self.ttft.as_dict()}
        ratios = ("ttft_to_full", "ttft_to_floor", "again_to_floor", "encode_to_once")
        for name in (*ratios, "kl", "kl_median", "same", "encoded_tokens"):
            value = getattr(self, name)
            if value is not None:
                result[name] = round(value, 4)
        return result


@dataclass
class AccuracyReport:
    """Results of all variants. ``too_long``: number of examples skipped because they do not fit the context."""

    model: str
    data: str
    task: str
    seed: int
    measures: tuple[str, ...]
    """Names of the measures; the first is the main one."""
    outcomes: list[Outcome]
    too_long: int
    answers: list[Answer] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns all results for ``--json``, without the texts of the data and of the answers."""
        names = ("model", "data", "task", "seed", "too_long")
        return {
            **{name: getattr(self, name) for name in names},
            "variants": [outcome.as_dict() for outcome in self.outcomes],
            "answers": [answer.as_dict() for answer in self.answers],
        }


def settings_of(
    engine: Engine, data: Path, examples: Sequence[Example], task: Task, *, seed: int, positions: str
) -> dict[str, object]:
    """Returns the settings that answers and times depend on, besides the example and the variant.

    Args:
        engine: Engine that answers.
        data: File of the examples.
        examples: Selected examples; all have the same numbers of passages, chosen passages and unions.
        task: What is asked.
        seed: Seed that selected the examples.
        positions: The engine's option of this name.

    Returns:
        Settings by name, as ``Results`` takes them.
    """
    wording = {name: value for name, value in vars(task).items() if name != "measures"}
    return {
        "model": engine.model.path.stem,
        "fingerprint": engine.fingerprint,
        "data": data.name,
        "data_hash": hashlib.sha256(data.read_bytes()).hexdigest()[:16],
        "task": task.name,
        "wording": hashlib.sha256(repr(sorted(wording.items())).encode()).hexdigest()[:16],
        "passages": len(examples[0].passages) if examples[0].single else None,
        "chosen": len(examples[0].chosen) if examples[0].chosen is not None else None,
        **({"unions": examples[0].unions} if examples[0].unions else {}),
        **({"argument": True} if examples[0].asker else {}),
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
    plain: bool = False,
    progress: OnAnswer,
) -> AccuracyReport:
    """Answers the first ``limit`` examples that fit the context, in every variant.

    Questions that share a schema are answered in every variant before the next schema is encoded. All variants decode
    greedily, with the same limit of tokens. Slices are encoded ahead of time with ``Engine.encode``, and spliced from
    RAM into an empty llama.cpp context.

    Args:
        engine: Engine that answers.
        data: File of the examples.
        examples: Examples, in the order in which they are asked.
        task: What is asked, and how answers are scored.
        variants: Ways of answering, ``full`` first.
        results: Earlier answers, which are not computed again; new answers are added.
        limit: Most examples that are asked; ``None``: all.
        seed: Seed that selected the examples.
        plain: Whether prompts have no markup. A message of all passages in the schema's order is evaluated ahead of
            time instead of the schema, and prompts reuse slices with ``reuse="anywhere"``.
        progress: Called before each step.

    Returns:
        Outcomes and answers of the variants.

    Raises:
        InputError: No example fits the context, or an example does not suit the task.
    """
    asking = _Plain(engine, task) if plain else _Asking(engine, task)
    chosen, too_long = _chosen(asking, examples, limit)
    engine.warm_up()
    done, total = 0, len(chosen) * len(variants)
    for _, group in groupby(chosen, key=lambda example: example.passages):
        questions = list(group)
        asked = 1 + done // len(variants)
        if all((example.line, variant.name) in results for example in questions for variant in variants):
            done += len(questions) * len(variants)
            continue
        truths: dict[int, Truth] = {}
        for (cached, _), ways in groupby(sorted(variants, key=_encoded), _encoded):
            todo = list(ways)
            with _slices_in_memory(engine):
                progress(done, total, "encoding")
                schema_ms = asking.encode(questions[0], todo[0], once=not cached)
                # Refined variants come last: the other variants must not find the slices that refining adds.
                for variant in sorted(todo, key=lambda each: each.refined):
                    for number, example in enumerate(questions):
                        done += 1
                        if all((example.line, each.name) in results for each in variants):
                            continue
                        # The other variants need the log probabilities of full prefill; results hold only its text.
                        kept = (example.line, variant.name) in results
                        if not kept or variant.name == FULL:
                            progress(done - 1, total, f"question {asked + number}, {variant.name}")
                            answer, truths[example.line] = _answer(asking, example, variant, truths.get(example.line))
                            if not kept:
                                results.add(replace(answer, schema_ms=schema_ms))
    outcomes = summarise(
        {variant.name: [results[example.line, variant.name] for example in chosen] for variant in variants}
    )
    answers = [results[example.line, variant.name] for example in chosen for variant in variants]
    model = engine.model.path.stem
    return AccuracyReport(model, data.name, task.name, seed, tuple(task.measures), outcomes, too_long, answers)


def summarise(answers: dict[str, list[Answer]]) -> list[Outcome]:
    """Returns the outcome of each variant. All variants have answered the same questions, in the same order."""
    outcomes = []
    full = answers.get(FULL)
    for variant, given in answers.items():
        outcome = Outcome(variant, Series([answer.ttft_ms for answer in given]))
        for name in given[0].scores:
            scores = [answer.scores[name] for answer in given]
            outcome.scores[name] = sum(scores) / len(scores)
            if full and variant != FULL:
                outcome.gains[name] = paired_interval(scores, [answer.scores[name] for answer in full])
        outcome.kl = sum(answer.kl for answer in given) / len(given)
        outcome.kl_median = Series([answer.kl for answer in given]).median
        outcome.same = sum(answer.same for answer in given) / len(given)
        outcome.encoded_tokens = sum(answer.encoded_tokens for answer in given)
        if full and variant != FULL:
            pairs = list(zip(given, full, strict=True))
            outcome.ttft_to_full = Series([answer.ttft_ms / other.ttft_ms for answer, other in pairs]).median
            outcome.ttft_to_floor = Series([answer.ttft_ms / answer.floor_ms for answer in given]).median
            outcome.again_to_floor = Series([answer.again_ms / answer.floor_ms for answer in given]).median
            # All questions on one schema hold the same pair of times.
            schemas = {(answer.schema_ms, other.schema_ms) for answer, other in pairs if other.schema_ms}
            if schemas:
                outcome.encode_to_once = Series([encoded / once for encoded, once in schemas]).median
        outcomes.append(outcome)
    return outcomes


class _Asking:
    """Asks the questions of a task as prompts on schemas."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine = engine
        self.task = task

    def question(self, example: Example, variant: Variant) -> Question:
        """Returns the prompt of an example, whose schema has been added."""
        return self.engine.planner.question(self.task.prompt(example), fidelity=variant.fidelity)

    def add(self, example: Example, variant: Variant) -> None:
        """Adds the schema of an example to the engine."""
        text = self.task.schema(example, variant)
        self.engine.add_schema(parse_schema(text, file=f"<line {example.line}, {variant.name}>"))

    def encode(self, example: Example, variant: Variant, *, once: bool) -> float:
        """Returns milliseconds to encode the schema, or to evaluate all its text ``once`` (0: text does not fit)."""
        self.add(example, variant)
        engine = self.engine
        text = joined([segment.tokens for segment in engine.planner.layout(SCHEMA).segments])
        if once:
            return _evaluated_once(engine, text)
        engine.forget()
        started = time.perf_counter()
        engine.encode(SCHEMA)
        return (time.perf_counter() - started) * 1000


class _Plain(_Asking):
    """Asks the questions of a task as messages without markup."""

    def question(self, example: Example, variant: Variant) -> Question:
        messages = self.task.messages(example)
        return self.engine.planner.question(messages, fidelity=variant.fidelity, reuse="anywhere")

    def add(self, example: Example, variant: Variant) -> None:
        """Does nothing, because there is no schema."""

    def encode(self, example: Example, variant: Variant, *, once: bool) -> float:
        messages = self.task.messages(example, whole=True)
        if once or not variant.cached:
            return _evaluated_once(self.engine, self.engine.plan(messages).tokens)
        self.engine.forget()
        return self.engine.generate(messages, max_tokens=1).metrics.ttft_ms


def _chosen(asking: _Asking, examples: Sequence[Example], limit: int | None) -> tuple[list[Example], int]:
    """The first ``limit`` examples that fit the context, and the number of examples skipped before the last of them."""
    chosen: list[Example] = []
    too_long = 0
    n_ctx = asking.engine.context.n_ctx
    plain = Variant(FULL, cached=False)
    for example in examples:
        if len(chosen) == limit:
            break
        asking.task.check(example)
        try:
            asking.add(example, plain)
            tokens = asking.question(example, plain).n_tokens
        except (PMLError, ContextFull):
            # The markup is generated and valid, so the text is longer than the model can hold.
            too_long += 1
            continue
        if tokens + asking.task.max_tokens > n_ctx:
            too_long += 1
        else:
            chosen.append(example)
    if not chosen:
        raise InputError(f"none of the {len(examples)} examples fits a context of {n_ctx} tokens; raise --ctx")
    return chosen, too_long


def _encoded(variant: Variant) -> tuple[bool, tuple[bool, bool]]:
    """Sort key: variants with equal keys begin with the same slices. Full prefill, without slices, comes first."""
    return variant.cached, variant.encoded


def _evaluated_once(engine: Engine, text: Tokens) -> float:
    """Milliseconds to evaluate a text (0: the text does not fit the context)."""
    if len(text) >= engine.context.n_ctx:
        return 0.0
    engine.forget()
    started = time.perf_counter()
    plan = Plan((Span(0, text),))
    engine.host.do(lambda slot, _: answer(engine.kv_cache, lambda: plan, nothing, slot=slot, fresh=True))
    return (time.perf_counter() - started) * 1000


def _answer(asking: _Asking, example: Example, variant: Variant, true: Truth | None) -> tuple[Answer, Truth]:
    """Answer of a variant, and that of full prefill, which is ``true`` if already known."""
    engine, task = asking.engine, asking.task
    question = asking.question(example, variant)
    first = _ask(engine, question, task, variant, max_tokens=1 if variant.refined else task.max_tokens)
    if variant.refined:
        engine.refine()
        first = _ask(engine, question, task, variant)
    if true is None:
        true = _truth(engine, question.plan(), first)
    known = true
    found = engine.host.do(lambda slot, _: distance(engine.kv_cache, slot, first.plan, known))
    again_ms = floor_ms = 0.0
    if variant.cached:
        again_ms = _ask(engine, question, task, variant, max_tokens=1).metrics.ttft_ms
        floor_ms = floor(engine, question.plan())
    if not variant.refined:
        # The other variants must not find slices that were missing and have been encoded for this prompt.
        for span in first.plan.spans:
            if span.slice and span.missing:
                engine.store.discard(span.slice.key)
    metrics = first.metrics
    answer = Answer(
        example=example.line,
        variant=variant.name,
        text=first.text,
        scores=task.score(first.text, example),
        ttft_ms=metrics.ttft_ms,
        prompt_tokens=metrics.prompt_tokens,
        fresh_tokens=metrics.fresh_tokens,
        encoded_tokens=metrics.encoded_tokens,
        again_ms=again_ms,
        floor_ms=floor_ms,
        kl=float(found.kl.mean()) if len(found.kl) else 0.0,
        same=first.text.strip() == true.text.strip(),
        exact=metrics.exact_tokens,
        clean=metrics.clean_tokens,
        related=metrics.related_tokens,
        foreign=metrics.foreign_tokens,
        recomputed=metrics.recomputed_tokens,
    )
    return answer, true


def _truth(engine: Engine, plan: Plan, answer: Stream) -> Truth:
    ttft_ms = answer.metrics.ttft_ms
    return engine.host.do(lambda slot, _: truth(engine.kv_cache, slot, plan, 1, answer.tokens, answer.text, ttft_ms))


def _ask(engine: Engine, question: Question, task: Task, variant: Variant, *, max_tokens: int | None = None) -> Stream:
    """Answer to a prompt, from an empty llama.cpp context."""
    engine.forget()
    answer = Answering(
        engine.kv_cache,
        question.plan,
        Sampling(stop=task.stop),
        max_tokens=max_tokens or task.max_tokens,
        started=time.perf_counter(),
        label=question.label,
        use_cache=variant.cached,
        at_end=Saving(engine.kv_cache, question).save_answer if variant.refined else None,
    )
    stream = Stream(engine.host, answer, question.n_tokens)
    stream.reply()
    return stream


@contextmanager
def _slices_in_memory(engine: Engine) -> Iterator[None]:
    """Keeps slices only in RAM, without a limit in practice, and drops them at the end."""
    with Store(None, ram_budget=1 << 40) as store:
        kept = engine.use_store(store)
        try:
            yield
        finally:
            engine.use_store(kept)

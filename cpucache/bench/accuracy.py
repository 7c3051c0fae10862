"""Accuracy: how good answers from cached slices are, and how soon they come, against those of full prefill."""

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
"""Told how many answers there are, of how many, and what is next."""


@dataclass
class Outcome:
    """What one variant reached. ``scores`` are from 0 to 1; ``gains`` what they exceed those of full prefill by."""

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
    """Share of answers that are those of full prefill."""
    encoded_tokens: int = 0
    """Tokens evaluated to make missing slices, of all questions together."""
    encode_to_once: float | None = None
    """Encoding a schema against evaluating all its text once, median of the schemas."""

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
        ratios = ("ttft_to_full", "ttft_to_floor", "again_to_floor", "encode_to_once")
        for name in (*ratios, "kl", "kl_median", "same", "encoded_tokens"):
            value = getattr(self, name)
            if value is not None:
                result[name] = round(value, 4)
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
    answers: list[Answer] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``, but no text of the data or of answers."""
        names = ("model", "data", "task", "seed", "too_long")
        return {
            **{name: getattr(self, name) for name in names},
            "variants": [outcome.as_dict() for outcome in self.outcomes],
            "answers": [answer.as_dict() for answer in self.answers],
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
    """Answer the first ``limit`` examples that fit the context in every variant; what ``results`` holds is not redone.

    Questions that share a schema are answered in every variant before the next schema is encoded, greedily, with the
    same limit of tokens. Slices are encoded ahead, as ``Engine.encode`` does it, and spliced from RAM into an empty
    context. ``full`` must be the first variant. ``data`` and ``seed`` are where the examples are from. ``plain``: there
    is no markup; a message of all passages in the schema's order is evaluated ahead, and prompts take what they can
    from anywhere. Raises ``InputError`` when none fits the context or one does not suit the task.
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
                # What refining adds would be found by the other variants.
                for variant in sorted(todo, key=lambda each: each.refined):
                    for number, example in enumerate(questions):
                        done += 1
                        if all((example.line, each.name) in results for each in variants):
                            continue
                        # The others are compared with what is said in full, of which results hold the text alone.
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
        outcome.kl = sum(answer.kl for answer in given) / len(given)
        outcome.kl_median = Series([answer.kl for answer in given]).median
        outcome.same = sum(answer.same for answer in given) / len(given)
        outcome.encoded_tokens = sum(answer.encoded_tokens for answer in given)
        if full and variant != FULL:
            pairs = list(zip(given, full, strict=True))
            outcome.ttft_to_full = Series([answer.ttft_ms / other.ttft_ms for answer, other in pairs]).median
            outcome.ttft_to_floor = Series([answer.ttft_ms / answer.floor_ms for answer in given]).median
            outcome.again_to_floor = Series([answer.again_ms / answer.floor_ms for answer in given]).median
            # All questions on a schema have the same two times.
            schemas = {(answer.schema_ms, other.schema_ms) for answer, other in pairs if other.schema_ms}
            if schemas:
                outcome.encode_to_once = Series([encoded / once for encoded, once in schemas]).median
        outcomes.append(outcome)
    return outcomes


class _Asking:
    """Asks a task's questions, as prompts on schemas."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine = engine
        self.task = task

    def question(self, example: Example, variant: Variant) -> Question:
        """The prompt of an example. Its schema has been added."""
        return self.engine.planner.question(self.task.prompt(example), fidelity=variant.fidelity)

    def add(self, example: Example, variant: Variant) -> None:
        """Add the schema of an example."""
        text = self.task.schema(example, variant)
        self.engine.add_schema(parse_schema(text, file=f"<line {example.line}, {variant.name}>"))

    def encode(self, example: Example, variant: Variant, *, once: bool) -> float:
        """Milliseconds to encode the schema, or to evaluate all its text ``once`` (0: more than the context holds)."""
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
    """Asks them in messages without markup."""

    def question(self, example: Example, variant: Variant) -> Question:
        messages = self.task.messages(example)
        return self.engine.planner.question(messages, fidelity=variant.fidelity, reuse="anywhere")

    def add(self, example: Example, variant: Variant) -> None:
        """Nothing: there is no schema."""

    def encode(self, example: Example, variant: Variant, *, once: bool) -> float:
        messages = self.task.messages(example, whole=True)
        if once or not variant.cached:
            return _evaluated_once(self.engine, self.engine.plan(messages).tokens)
        self.engine.forget()
        return self.engine.generate(messages, max_tokens=1).metrics.ttft_ms


def _chosen(asking: _Asking, examples: Sequence[Example], limit: int | None) -> tuple[list[Example], int]:
    """The first examples that fit, with their answers, and how many were passed over on the way."""
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
            # The markup is ours, so it is the length: more than the model can hold.
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
    """What tells apart the slices that variants begin with. Full prefill, with none, comes first."""
    return variant.cached, variant.encoded


def _evaluated_once(engine: Engine, text: Tokens) -> float:
    """Milliseconds to evaluate a text (0: more than the context holds)."""
    if len(text) >= engine.context.n_ctx:
        return 0.0
    engine.forget()
    started = time.perf_counter()
    plan = Plan((Span(0, text),))
    engine.host.do(lambda slot, _: answer(engine.workspace, lambda: plan, nothing, slot=slot, fresh=True))
    return (time.perf_counter() - started) * 1000


def _answer(asking: _Asking, example: Example, variant: Variant, true: Truth | None) -> tuple[Answer, Truth]:
    """What a variant answers, and what full prefill says, which is ``true`` if that is known already."""
    engine, task = asking.engine, asking.task
    question = asking.question(example, variant)
    first = _ask(engine, question, task, variant, max_tokens=1 if variant.refined else task.max_tokens)
    if variant.refined:
        engine.refine()
        first = _ask(engine, question, task, variant)
    if true is None:
        true = _truth(engine, question.plan(), first)
    known = true
    found = engine.host.do(lambda slot, _: distance(engine.workspace, slot, first.plan, known))
    again_ms = floor_ms = 0.0
    if variant.cached:
        again_ms = _ask(engine, question, task, variant, max_tokens=1).metrics.ttft_ms
        floor_ms = floor(engine, question.plan())
    if not variant.refined:
        # Exact slices would be found by the other variants.
        for span in first.plan.spans:
            if span.slice and span.made:
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
    return engine.host.do(lambda slot, _: truth(engine.workspace, slot, plan, 1, answer.tokens, answer.text, ttft_ms))


def _ask(engine: Engine, question: Question, task: Task, variant: Variant, *, max_tokens: int | None = None) -> Stream:
    """The answer to a prompt, with nothing in the llama.cpp context before."""
    engine.forget()
    answer = Answering(
        engine.workspace,
        question.plan,
        Sampling(stop=task.stop),
        max_tokens=max_tokens or task.max_tokens,
        started=time.perf_counter(),
        label=question.label,
        use_cache=variant.cached,
        at_end=Saving(engine.workspace, question).save_answer if variant.refined else None,
    )
    stream = Stream(engine.host, answer, question.n_tokens)
    stream.reply()
    return stream


@contextmanager
def _slices_in_memory(engine: Engine) -> Iterator[None]:
    """Meanwhile slices are kept in RAM alone, as many as there are, and dropped at the end."""
    with Store(None, ram_budget=1 << 40) as store:
        kept = engine.use_store(store)
        try:
            yield
        finally:
            engine.use_store(kept)

"""TTFT benchmark: full prefill, cached from RAM, cached from disk, and the floor, on the same tokens."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpucache.bench.series import Series
from cpucache.bench.text import filler_prompt, filler_schema
from cpucache.engine import Engine, Metrics
from cpucache.reuse import Level, OnProgress, Plan
from cpucache.reuse.slot import Slot
from cpucache.reuse.work import Task, Work
from cpucache.runtime import Context, Run, Sampler, Sampling
from cpucache.stages import Profile, profiled
from cpucache.store import Store

Say = Callable[[str], None]


@dataclass
class Report:
    """Measurements of ``measure``. ``full``: times of full prefill by the setting of llama.cpp."""

    model: str
    cached_tokens: int
    fresh_tokens: int
    modules: int
    slice_bytes: int = 0
    floor: Series = field(default_factory=Series)
    ram: Series = field(default_factory=Series)
    disk: Series = field(default_factory=Series)
    other_floor: Series = field(default_factory=Series)
    """Floor of prompts in another order."""
    other: Series = field(default_factory=Series)
    """From RAM, with the modules in an order never asked before, and nothing recomputed."""
    other_again: Series = field(default_factory=Series)
    """The same prompt, asked again."""
    balanced: Series = field(default_factory=Series)
    """The same prompt, with a share of the spliced tokens recomputed."""
    refined: Series = field(default_factory=Series)
    """The same prompt after refining, with nothing recomputed."""
    encode_ms: float = 0.0
    """Time to encode missing slices before the first token, of all prompts in another order together."""
    encode: Series = field(default_factory=Series)
    full: dict[str, Series] = field(default_factory=dict)
    profile: dict[str, dict[str, Series]] | None = None
    """Milliseconds by name of a series and by stage; ``None``: stages are not measured."""

    @property
    def series(self) -> dict[str, Series]:
        """All series by name, except for those of full prefill."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Series)}

    @property
    def best_full(self) -> float:
        """Median time of full prefill with llama.cpp's best setting, in milliseconds."""
        return min(series.median for series in self.full.values())

    @property
    def profile_medians(self) -> dict[str, dict[str, float]]:
        """Medians of ``profile``, in milliseconds."""
        return {
            name: {stage: each.median for stage, each in stages.items()}
            for name, stages in (self.profile or {}).items()
        }

    def add(self, name: str, metrics: Metrics, profile: Profile) -> None:
        """Adds the time to first token of an answer to the series ``name``, and its stages to ``profile``."""
        series: Series = getattr(self, name)
        series.values.append(metrics.ttft_ms)
        if self.profile is not None:
            stages = self.profile.setdefault(name, {})
            for stage, ms in profile.split(metrics.ttft_ms).items():
                stages.setdefault(stage, Series()).values.append(ms)

    @property
    def ratios(self) -> dict[str, float]:
        """Main figures: ratios between medians."""
        ratios = {f"{name}_to_floor": getattr(self, name).median / self.floor.median for name in ("ram", "disk")}
        for name in ("other", "other_again", "balanced", "refined"):
            ratios[f"{name}_to_floor"] = getattr(self, name).median / self.other_floor.median
        if self.full:
            for name in ("ram", "disk", "other", "balanced", "refined"):
                ratios[f"full_to_{name}"] = self.best_full / getattr(self, name).median
            ratios["full_to_floor"] = self.best_full / self.floor.median
            ratios["encode_to_full"] = self.encode.median / self.best_full
        return ratios

    def as_dict(self) -> dict[str, Any]:
        """Returns all measurements for ``--json``."""
        facts = {name: value for name, value in vars(self).items() if isinstance(value, str | int | float)}
        return {
            **facts,
            **{name: series.as_dict() for name, series in self.series.items()},
            "full": {name: series.as_dict() for name, series in self.full.items()},
            "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
            **({} if self.profile is None else {"profile": self.profile_medians}),
        }


def measure(
    engine: Engine,
    *,
    tokens: int,
    modules: int,
    question: int,
    repeat: int,
    full_repeat: int,
    say: Say,
    profiling: bool = False,
) -> Report:
    """Measures time to first token on one engine, in turn with the floor.

    For the floor, the state of the slices is in the llama.cpp context already: llama.cpp evaluates the question and
    samples a token. Cached times are whole calls of ``generate`` with an empty context: parsing the prompt, planning,
    splicing, evaluating, sampling. First all modules are asked in the schema's order, where slices are exact, then in a
    new order each time. Full prefill runs in llama.cpp contexts of its own, which have llama.cpp's defaults for one
    sequence, with flash attention off and on.

    Args:
        engine: Engine whose store is replaced for good.
        tokens: Tokens of the schema.
        modules: Modules of the schema.
        question: Tokens of the question.
        repeat: Number of measurements of each cached time.
        full_repeat: Number of measurements of full prefill and encoding; 0: encoding once, no full prefill.
        say: Called with a description of each step before it begins.
        profiling: Whether cached times are divided into stages.

    Returns:
        The measurements.
    """
    engine.add_schema(filler_schema(engine, tokens, modules))
    prompt = filler_prompt(engine, range(modules), question)
    plan = engine.plan(prompt)
    fresh = len(plan.spans[-1].tokens)
    report = Report(engine.model.path.stem, plan.n_tokens - fresh, fresh, modules, profile={} if profiling else None)
    engine.warm_up()
    with tempfile.TemporaryDirectory(prefix="cpucache-bench-") as folder:
        for turn in range(max(1, full_repeat)):
            say(f"encoding {report.cached_tokens:,} tokens in {modules} modules ({turn + 1}/{max(1, full_repeat)})")
            engine.use_store(Store(Path(folder) / str(turn), ram_budget=1 << 40))
            encoded = engine.encode("bench")
            report.encode.values.append(encoded.seconds * 1000)
            report.slice_bytes = encoded.bytes
            if turn < full_repeat:
                _full(engine, plan, report, say)
        plan = engine.plan(prompt)
        say(f"from RAM, floor and from disk, in turn, {repeat} times")
        engine.store.flush()
        engine.generate(prompt, max_tokens=1)
        for _ in range(repeat):
            _cached(engine, prompt, report, "ram")
            report.floor.values.append(floor(engine, plan))
            engine.store.ram.clear()
            _cached(engine, prompt, report, "disk")
            report.floor.values.append(floor(engine, plan))
        say(f"other orders and their floor in turn, {repeat} times, each order once")
        orders = random.Random(0)
        for _ in range(repeat):
            order = orders.sample(range(modules), modules)
            _other(engine, filler_prompt(engine, order, question), report)
        # Nothing may be written to the folder while it is removed.
        engine.store.flush()
    return report


def _other(engine: Engine, prompt: str, report: Report) -> None:
    """Measures one prompt in a new order: the first time, again, balanced, and refined."""
    report.encode_ms += _cached(engine, prompt, report, "other", "fast").encode_ms
    report.other_floor.values.append(floor(engine, engine.plan(prompt, fidelity="fast")))
    _cached(engine, prompt, report, "other_again", "fast")
    report.encode_ms += _cached(engine, prompt, report, "balanced", "balanced").encode_ms
    engine.refine()
    _cached(engine, prompt, report, "refined", "fast")


def floor(engine: Engine, plan: Plan) -> float:
    """Returns milliseconds to evaluate the last span of ``plan`` and sample a token.

    The last prompt must have left the state of the other spans in the llama.cpp context.
    """
    fresh, context = plan.spans[-1], engine.context
    sampler = Sampler(Sampling(), engine.model)

    def task(slot: Slot, _: OnProgress) -> Task[float]:
        context.remove(slot.sequence, fresh.start)
        started = time.perf_counter()
        index = yield Work([Run(slot.sequence, fresh.start, fresh.tokens)], logits="last")
        context.sample(sampler, index)
        return (time.perf_counter() - started) * 1000

    elapsed = engine.host.do(task)
    sampler.close()
    return elapsed


def _cached(engine: Engine, prompt: str, report: Report, name: str, level: Level | None = None) -> Metrics:
    """Answers a prompt from an empty llama.cpp context, and adds its time to ``report``."""
    engine.forget()
    profile = Profile()
    with nullcontext() if report.profile is None else profiled(profile):
        metrics = engine.generate(prompt, max_tokens=1, fidelity=level).metrics
    report.add(name, metrics, profile)
    return metrics


def _full(engine: Engine, plan: Plan, report: Report, say: Say) -> None:
    for flash in ("off", "on"):
        say(f"full prefill of {plan.n_tokens:,} tokens, flash attention {flash}")
        context = Context(
            engine.model, n_ctx=engine.context.n_ctx, n_threads=engine.context.n_threads, flash=flash, sequences=1
        )
        try:
            context.decode([Run(0, 0, plan.tokens[:1])])
            context.clear()
            sampler = Sampler(Sampling(), engine.model)
            started = time.perf_counter()
            context.decode([Run(0, 0, plan.tokens)], logits="last")
            context.sample(sampler)
            elapsed = (time.perf_counter() - started) * 1000
            sampler.close()
        finally:
            context.close()
        report.full.setdefault(f"flash {flash}", Series()).values.append(elapsed)

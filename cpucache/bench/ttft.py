"""Time to first token: full prefill, cached from RAM, cached from disk, and the floor, on the same tokens."""

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
    """What was measured. ``full`` and ``encode`` are by what llama.cpp was set to."""

    model: str
    cached_tokens: int
    fresh_tokens: int
    modules: int
    slice_bytes: int = 0
    floor: Series = field(default_factory=Series)
    ram: Series = field(default_factory=Series)
    disk: Series = field(default_factory=Series)
    other_floor: Series = field(default_factory=Series)
    """The floor of prompts in another order."""
    other: Series = field(default_factory=Series)
    """From RAM, the modules in an order never asked before, nothing recomputed."""
    other_again: Series = field(default_factory=Series)
    """The same prompt asked again."""
    balanced: Series = field(default_factory=Series)
    """From RAM, in such an order, with a share of the tokens recomputed."""
    refined: Series = field(default_factory=Series)
    """The same prompt after refining."""
    encode_ms: float = 0.0
    """Evaluation before the first token, of all prompts in another order together."""
    encode: Series = field(default_factory=Series)
    full: dict[str, Series] = field(default_factory=dict)
    profile: dict[str, dict[str, Series]] | None = None
    """Milliseconds by stage of what was measured, by its name, if that was asked for."""

    @property
    def series(self) -> dict[str, Series]:
        """What was measured in milliseconds, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Series)}

    @property
    def best_full(self) -> float:
        """Full prefill at llama.cpp's best settings."""
        return min(series.median for series in self.full.values())

    @property
    def profile_medians(self) -> dict[str, dict[str, float]]:
        """The medians of ``profile``."""
        return {
            name: {stage: each.median for stage, each in stages.items()}
            for name, stages in (self.profile or {}).items()
        }

    def add(self, name: str, metrics: Metrics, profile: Profile) -> None:
        """Note the time to first token of an answer, and where it went."""
        series: Series = getattr(self, name)
        series.values.append(metrics.ttft_ms)
        if self.profile is not None:
            stages = self.profile.setdefault(name, {})
            for stage, ms in profile.split(metrics.ttft_ms).items():
                stages.setdefault(stage, Series()).values.append(ms)

    @property
    def ratios(self) -> dict[str, float]:
        """The figures that count."""
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
        """Everything, for ``--json``."""
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
    """Measure on one engine, in turn, ``repeat`` times over.

    Floor: the slices lie in the llama.cpp context already, and llama.cpp evaluates the question and chooses a token,
    nothing else. The cached ones are whole calls of ``generate`` on an empty context: reading the prompt, planning,
    splicing, evaluating, choosing. First all modules in the schema's order, which is exact, then in a new order each
    time. Full prefill runs in contexts of its own with llama.cpp's defaults for a single sequence, with flash attention
    off and on. ``full_repeat=0`` leaves the full prefill out. ``profiling`` splits the cached ones into stages.
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
        say(f"RAM, floor and disk in turn, {repeat} times")
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
        # The folder must not be written to any more when it is removed.
        engine.store.flush()
    return report


def _other(engine: Engine, prompt: str, report: Report) -> None:
    """One prompt in an order of its own: at once, again, balanced, and refined."""
    report.encode_ms += _cached(engine, prompt, report, "other", "fast").encode_ms
    report.other_floor.values.append(floor(engine, engine.plan(prompt, fidelity="fast")))
    _cached(engine, prompt, report, "other_again", "fast")
    report.encode_ms += _cached(engine, prompt, report, "balanced", "balanced").encode_ms
    engine.refine()
    _cached(engine, prompt, report, "refined", "fast")


def floor(engine: Engine, plan: Plan) -> float:
    """Milliseconds to evaluate the question behind the slices that the last prompt left in the llama.cpp context."""
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
    """Answer a prompt with nothing in the llama.cpp context before, and note what that took."""
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

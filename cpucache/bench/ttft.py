"""Time to first token: full prefill, cached from RAM, cached from disk, and the floor, on the same tokens."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpucache.bench.series import Series
from cpucache.bench.text import filler_prompt, filler_schema
from cpucache.engine import Engine
from cpucache.engine.tuning import Level
from cpucache.layout import Plan
from cpucache.reuse.splicer import TARGET
from cpucache.runtime import Context, Run, Sampler, Sampling
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
    balanced: Series = field(default_factory=Series)
    """From RAM, with a share of the modules' tokens evaluated afresh."""
    encode: Series = field(default_factory=Series)
    full: dict[str, Series] = field(default_factory=dict)

    @property
    def best_full(self) -> float:
        """Full prefill at llama.cpp's best settings."""
        return min(series.median for series in self.full.values())

    @property
    def ratios(self) -> dict[str, float]:
        """The figures that count."""
        ratios = {
            "ram_to_floor": self.ram.median / self.floor.median,
            "disk_to_floor": self.disk.median / self.floor.median,
            "balanced_to_floor": self.balanced.median / self.floor.median,
        }
        if self.full:
            ratios["full_to_ram"] = self.best_full / self.ram.median
            ratios["full_to_disk"] = self.best_full / self.disk.median
            ratios["full_to_balanced"] = self.best_full / self.balanced.median
            ratios["full_to_floor"] = self.best_full / self.floor.median
            ratios["encode_to_full"] = self.encode.median / self.best_full
        return ratios

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {
            "model": self.model,
            "cached_tokens": self.cached_tokens,
            "fresh_tokens": self.fresh_tokens,
            "modules": self.modules,
            "slice_bytes": self.slice_bytes,
            "floor": self.floor.as_dict(),
            "ram": self.ram.as_dict(),
            "disk": self.disk.as_dict(),
            "balanced": self.balanced.as_dict(),
            "encode": self.encode.as_dict(),
            "full": {name: series.as_dict() for name, series in self.full.items()},
            "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
        }


def measure(
    engine: Engine, *, tokens: int, modules: int, question: int, repeat: int, full_repeat: int, say: Say
) -> Report:
    """Measure on one engine, in turn: balanced, RAM, floor, disk, floor, ``repeat`` times over.

    Floor: the slices lie in the context already, and llama.cpp evaluates the fresh tokens and chooses a token, nothing
    else. The cached ones are whole calls of ``generate`` on an empty context: reading the prompt, planning, splicing,
    evaluating, choosing; with ``fidelity="fast"``, and from RAM also with ``"balanced"``. Full prefill runs in contexts
    of its own with llama.cpp's defaults for a single sequence, with flash attention off and on. ``full_repeat=0``
    leaves the full prefill out.
    """
    engine.add_schema(filler_schema(engine, tokens, modules))
    prompt = filler_prompt(engine, modules, question)
    plan = engine.plan(prompt, fidelity="fast")
    report = Report(engine.model.path.stem, plan.n_cached, plan.n_tokens - plan.n_cached, modules)
    engine.warm_up()
    with tempfile.TemporaryDirectory(prefix="cpucache-bench-") as folder:
        for turn in range(max(1, full_repeat)):
            say(f"encoding {plan.n_cached:,} tokens in {modules} modules ({turn + 1}/{max(1, full_repeat)})")
            engine.workspace.store = engine.store = Store(Path(folder) / str(turn), ram_budget=1 << 40)
            encoded = engine.encode_for(prompt, fidelity="fast")
            report.encode.values.append(encoded.seconds * 1000)
            report.slice_bytes = encoded.bytes
            if turn < full_repeat:
                _full(engine, plan, report, say)
        say(f"balanced, RAM, floor and disk in turn, {repeat} times")
        engine.encode_for(prompt, fidelity="balanced")
        engine.generate(prompt, max_tokens=1, fidelity="fast")
        for _ in range(repeat):
            # The floor needs what an answer with ``fast`` leaves in the context.
            report.balanced.values.append(_cached(engine, prompt, "balanced"))
            report.ram.values.append(_cached(engine, prompt))
            report.floor.values.append(_floor(engine, plan))
            engine.store.ram.clear()
            report.disk.values.append(_cached(engine, prompt))
            report.floor.values.append(_floor(engine, plan))
    return report


def _floor(engine: Engine, plan: Plan) -> float:
    """Evaluate the fresh tokens behind the slices that the last prompt left in the context."""
    fresh = plan.spans[-1]
    sampler = Sampler(Sampling(), engine.model)
    engine.context.remove(TARGET, fresh.start)
    started = time.perf_counter()
    engine.context.decode([Run(TARGET, fresh.start, fresh.tokens)], logits="last")
    engine.context.sample(sampler)
    elapsed = (time.perf_counter() - started) * 1000
    sampler.close()
    return elapsed


def _cached(engine: Engine, prompt: str, level: Level = "fast") -> float:
    engine.workspace.reset()
    return engine.generate(prompt, max_tokens=1, fidelity=level).metrics.ttft_ms


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

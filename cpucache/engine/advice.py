"""What would bring a cached prompt nearer to the uncached one, measured: link tokens and scaffolds, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cpucache.engine.fidelity import Distance, Truth, distance, truth
from cpucache.engine.tuning import tuning_of
from cpucache.layout import Plan, Refresh, SchemaLayout, bind
from cpucache.pml import resolve
from cpucache.pml.tree import Included, Module, Prompt, Scaffold, Schema, Union
from cpucache.runtime import Sampling

if TYPE_CHECKING:
    from cpucache.engine.engine import Engine

LINK = 16
"""Link tokens that are tried."""
_TIMES = 3  # runs of each that the time to first token is the median of
OnTrial = Callable[[int, int, str], object]
"""Told how many trials are done, of how many, and what is tried next."""


@dataclass(frozen=True)
class Trial:
    """One way of answering the prompt, against the answer without reuse."""

    change: str
    """What was done, as a person would do it; empty: nothing."""
    distance: Distance
    bytes: int = 0
    """What it adds to the store."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        numbers = {name: round(value, 6) for name, value in self.distance.summary().items()}
        return {"change": self.change, **numbers, "ttft_ms": round(self.distance.ttft_ms, 3), "bytes": self.bytes}


@dataclass(frozen=True)
class FidelityReport:
    """How far a cached prompt is from the uncached one."""

    truth: Truth
    pieces: list[str]
    """The text of each token that is predicted: the prompt's fresh ones after the first, then the answer's."""
    now: Trial
    """As the prompt is answered now."""
    trials: list[Trial]
    """What was tried, the one that brings the most for its time first."""

    def worth(self, trial: Trial) -> float:
        """Nats that a change brings back, for each millisecond (at least one) that it costs."""
        gained = self.now.distance.kl_mean - trial.distance.kl_mean
        return gained / max(1.0, trial.distance.ttft_ms - self.now.distance.ttft_ms)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        now = self.now.distance
        return {
            "uncached": {"text": self.truth.text, "ttft_ms": round(self.truth.ttft_ms, 3)},
            "cached": {"text": now.text, **self.now.as_dict()},
            "tokens": [
                {"text": piece, "of": "prompt" if at < now.asked else "answer", "kl": kl, "top1": agrees, "nll_change": nll}
                for at, (piece, kl, agrees, nll) in enumerate(
                    zip(self.pieces, now.kl.tolist(), now.agrees.tolist(), now.nll.tolist(), strict=True)
                )
            ],
            "advice": [trial.as_dict() for trial in self.trials],
        }


def examine(
    engine: Engine,
    prompt: Prompt,
    plan: Plan,
    *,
    max_tokens: int,
    advise: bool,
    progress: OnTrial | None = None,
) -> FidelityReport:
    """Answer ``plan`` without reuse and with it, and then, to ``advise``, with one change at a time."""
    layout = engine.planner.layout(prompt.schema)
    changes = list(_changes(engine, layout, prompt)) if advise else []

    def say(done: int, what: str) -> None:
        if progress:
            progress(done, len(changes) + 2, what)

    say(0, "without reuse")
    stream = engine.answer(
        plan, Sampling(), max_tokens=max_tokens, started=perf_counter(), label=prompt.schema, use_cache=False
    )
    reply = stream.reply()
    true = truth(engine.workspace, plan, stream.tokens, reply.text, reply.metrics.ttft_ms)
    say(1, "as it is")
    now = _try(engine, plan, prompt.schema, true, "", max_tokens)
    trials = []
    for done, (change, changed) in enumerate(changes, 2):
        say(done, change)
        trials.append(_try(engine, changed, prompt.schema, true, change, 1))
    say(len(changes) + 2, "")
    pieces = [engine.model.text([token], special=True) for token in true.targets.tolist()]
    report = FidelityReport(true, pieces, now, trials)
    trials.sort(key=report.worth, reverse=True)
    return report


def _try(engine: Engine, plan: Plan, label: str, true: Truth, change: str, max_tokens: int) -> Trial:
    made = engine.workspace.encode(plan.segments, label)
    times, text = [], ""
    for last in reversed(range(_TIMES)):
        engine.workspace.reset()
        stream = engine.answer(
            plan, Sampling(), max_tokens=1 if last else max_tokens, started=perf_counter(), label=label
        )
        text = stream.reply().text
        times.append(stream.metrics.ttft_ms)
    apart = distance(engine.workspace, plan, true, label, text=text, ttft_ms=median(times))
    return Trial(change, apart, made.bytes)


def _changes(engine: Engine, layout: SchemaLayout, prompt: Prompt) -> Iterator[tuple[str, Plan]]:
    """What could be done about a prompt's modules, and the plans that it would give."""
    schema = layout.schema
    included = resolve(prompt, schema)
    tuning = tuning_of(schema)

    def plan(layout: SchemaLayout, refresh: Refresh | None) -> Plan:
        return bind(layout, included, file=prompt.file, scaffolds=tuning.scaffolds, refresh=refresh)

    linked = plan(layout, Refresh(LINK))
    modules = list(dict.fromkeys(span.segment.module for span in linked.spans if span.segment and span.renewed))
    for module in modules:
        yield f'link="{LINK}" on {module or "the schema"}', plan(layout, Refresh(0, {module: LINK}))
    if len(modules) > 1:
        yield f'link="{LINK}" on every module', linked
    together = _can_be_scaffolded(schema, included)
    sets = list(pairwise(together)) if len(together) > 2 else []
    for chosen in [*sets, tuple(together)] if len(together) > 1 else []:
        scaffolded = replace(schema, scaffolds=(*schema.scaffolds, Scaffold(tuple(chosen), schema.line)))
        changed = plan(engine.planner.lay(scaffolded), tuning.refresh(layout, engine.model))
        names = " ".join(module.name for module in chosen)
        yield f'<scaffold modules="{names}"/>', changed


def _can_be_scaffolded(schema: Schema, included: Included) -> list[Module]:
    """The schema's own modules in a prompt that a scaffold set may hold."""
    standing_in = {
        member: member.name == node.scaffold
        for node in _nodes(schema)
        if isinstance(node, Union) and node.scaffold
        for member in node.members
    }
    scopes = [item.scope for item in included.items if isinstance(item, Included)]
    return [
        scope for scope in scopes if isinstance(scope, Module) and scope.cache and standing_in.get(scope, True)
    ]


def _nodes(schema: Schema) -> Iterator[object]:
    todo: list[Any] = list(schema.children)
    while todo:
        node = todo.pop()
        yield node
        todo += getattr(node, "children", ()) if not isinstance(node, Module) else ()

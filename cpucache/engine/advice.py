"""What would bring a cached prompt nearer to the uncached one, measured: link tokens, scaffolds, recomputing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cpucache.engine.fidelity import WATCHED, Distance, Truth, distance, truth
from cpucache.engine.tuning import Tuning
from cpucache.errors import ContextFull, PMLError
from cpucache.layout import Plan, Refresh, bind
from cpucache.pml import resolve
from cpucache.pml.tree import Included, Module, Prompt, Scaffold, modules_of
from cpucache.runtime import Sampling

if TYPE_CHECKING:
    from cpucache.engine.engine import Engine

LINK = 16
"""Link tokens that are tried."""
SHARE = 0.1
"""The share of the modules' tokens that recomputing is tried with."""
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
        return {"change": self.change, **self.distance.as_dict(), "bytes": self.bytes}


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

    def gain(self, trial: Trial) -> float:
        """Nats that a change brings back, on average over all tokens."""
        return self.now.distance.kl_mean - trial.distance.kl_mean

    def worth(self, trial: Trial) -> float:
        """Nats that a change brings back, for each millisecond that it costs.

        A tenth of the time that it takes now, and a millisecond, are within what runs differ by, and cost the same.
        """
        return self.gain(trial) / max(1.0, self.now.distance.ttft_ms / 10, self.delay_ms(trial))

    def delay_ms(self, trial: Trial) -> float:
        """By how much later the first token comes."""
        return trial.distance.ttft_ms - self.now.distance.ttft_ms

    @property
    def best(self) -> Trial | None:
        """The change that brings the most for its time, if any helps at all."""
        return next((trial for trial in self.trials if self.gain(trial) > 0), None)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        now = self.now.distance
        return {
            "uncached": {"text": self.truth.text, "ttft_ms": round(self.truth.ttft_ms, 3)},
            "cached": {"text": now.text, **now.as_dict()},
            "tokens": [
                {
                    "text": piece,
                    "of": "prompt" if at < now.asked else "answer",
                    "kl": round(kl, 6),
                    "top1": agrees,
                    "nll_change": round(nll, 6),
                }
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
    tuning: Tuning,
    *,
    max_tokens: int,
    advise: bool,
    progress: OnTrial | None = None,
) -> FidelityReport:
    """Answer ``plan``, which ``tuning`` gave, without reuse and with it, and, to ``advise``, with one change at a time.

    Slices that only a change needs do not stay in the store.
    """
    changes = _Changes(engine, prompt, plan, tuning)
    todo = list(changes) if advise and not tuning.exact else []

    def say(done: int, what: str) -> None:
        if progress:
            progress(done, len(todo) + 2, what)

    say(0, "without reuse")
    engine.warm_up()
    stream = engine.answer(
        plan, Sampling(), max_tokens=max_tokens, started=perf_counter(), label=prompt.schema, use_cache=False
    )
    reply = stream.reply()
    watched = min(WATCHED, len(changes.apart.spans[-1].tokens))
    true = truth(engine.workspace, plan, watched, stream.tokens, reply.text, reply.metrics.ttft_ms)
    say(1, "as it is")
    engine.workspace.encode(plan.segments, prompt.schema)
    now = _try(engine, plan, prompt.schema, true, "", max_tokens)
    trials = []
    for done, (change, changed) in enumerate(todo, 2):
        say(done, change)
        # What is renewed takes cells besides; a change for which there are none is no advice.
        with suppress(ContextFull):
            trials.append(_try(engine, changed, prompt.schema, true, change, 1))
    say(len(todo) + 2, "")
    pieces = [engine.model.text([token], special=True) for token in true.targets.tolist()]
    report = FidelityReport(true, pieces, now, trials)
    trials.sort(key=report.worth, reverse=True)
    return report


def _try(engine: Engine, plan: Plan, label: str, true: Truth, change: str, max_tokens: int) -> Trial:
    workspace = engine.workspace
    made = workspace.encode(plan.segments, label)
    try:
        times: list[float] = []
        text = ""
        for last in reversed(range(_TIMES)):
            workspace.reset()
            stream = engine.answer(
                plan, Sampling(), max_tokens=1 if last else max_tokens, started=perf_counter(), label=label
            )
            text = stream.reply().text
            times.append(stream.metrics.ttft_ms)
        apart = distance(workspace, plan, true, label, text=text, ttft_ms=median(times))
    finally:
        for segment in made.made:
            engine.store.discard(workspace.key(segment))
    return Trial(change, apart, made.bytes)


class _Changes:
    """What could be done about a prompt's modules, and the plans that it would give."""

    def __init__(self, engine: Engine, prompt: Prompt, plan: Plan, tuning: Tuning) -> None:
        self._engine = engine
        self._prompt = prompt
        self._now = plan
        self._tuning = tuning
        self._layout = engine.planner.layout(prompt.schema)
        self._schema = self._layout.schema
        self._included = resolve(prompt, self._schema)
        self._refresh = tuning.refresh(self._layout, engine.planner.relevance)
        self.apart = self._plan(None)
        """The prompt with nothing renewed: every plan has what is fresh at its end."""

    def __iter__(self) -> Iterator[tuple[str, Plan]]:
        yield from self._links()
        yield from self._recomputed()
        yield from self._scaffolds()

    def _plan(self, refresh: Refresh | None) -> Plan:
        return bind(
            self._layout,
            self._included,
            file=self._prompt.file,
            lead=self._tuning.lead_tokens,
            refresh=refresh,
        )

    def _links(self) -> Iterator[tuple[str, Plan]]:
        base = self._refresh or Refresh()
        modules = dict.fromkeys(segment.module for segment in self.apart.segments if segment.module)
        helped = 0
        for module in modules:
            linked = self._plan(replace(base, links={**base.links, module: LINK}))
            if linked.n_cached < self._now.n_cached:
                helped += 1
                yield f'link="{LINK}" on {module}', linked
        everywhere = self._plan(replace(base, link=LINK))
        if helped > 1 and everywhere.n_cached < self._now.n_cached:
            yield f'link="{LINK}" on the schema', everywhere

    def _recomputed(self) -> Iterator[tuple[str, Plan]]:
        rule = self._engine.planner.relevance.rule(SHARE)
        plan = self._plan(replace(self._refresh or Refresh(), rule=rule))
        if plan.n_cached < self._now.n_cached:
            yield f"--recompute {SHARE}", plan

    def _scaffolds(self) -> Iterator[tuple[str, Plan]]:
        together = self._can_be_scaffolded()
        order = {module: index for index, module in enumerate(modules_of(self._schema).values())}
        there = [set(scaffold.modules) for scaffold in self._schema.scaffolds]
        for modules in dict.fromkeys([*pairwise(together), tuple(together)]):
            # A set is used where a prompt has its modules in the schema's order.
            in_order = [order[module] for module in modules]
            if len(modules) > 1 and in_order == sorted(in_order) and set(modules) not in there:
                # Modules that the prompt leaves out may be nested in these, and be too much for the model.
                with suppress(PMLError):
                    plan = self._scaffolded(modules)
                    yield f'<scaffold modules="{" ".join(module.name for module in modules)}"/>', plan

    def _scaffolded(self, modules: tuple[Module, ...]) -> Plan:
        schema = replace(self._schema, scaffolds=(*self._schema.scaffolds, Scaffold(modules, self._schema.line)))
        return bind(
            self._engine.planner.lay(schema),
            # What belongs to the schema itself is found under it.
            replace(self._included, scope=schema),
            file=self._prompt.file,
            lead=self._tuning.lead_tokens,
            refresh=self._refresh,
        )

    def _can_be_scaffolded(self) -> list[Module]:
        """The schema's own modules in the prompt that a scaffold set may hold."""
        scopes = [item.scope for item in self._included.items if isinstance(item, Included)]
        return [scope for scope in scopes if isinstance(scope, Module) and scope.cache]

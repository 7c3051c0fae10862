"""Encoding ahead of time: the slices of a schema, of likely prompts, and of recent prompts (refining)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cpucache.engine.host import Host
from cpucache.engine.namespaces import Namespaces
from cpucache.engine.planner import AnyPrompt
from cpucache.engine.request import Priority, Request
from cpucache.reuse import Encoded, OnProgress, Slice, asked, reading, refine, scaffolded
from cpucache.reuse.refine import exact_slices
from cpucache.reuse.slot import Slot
from cpucache.reuse.work import Task
from cpucache.runtime.hardware import on_mains


def schema_slices(host: Host, schema: str) -> list[Slice]:
    """The slices of a schema, encoded or not, in reading order. Raises ``InputError`` for an unknown schema."""
    return reading(host.planner.layout(schema), host.slices, _room(host))


def likely_slices(host: Host, schema: str, prompts: Sequence[AnyPrompt]) -> list[Slice]:
    """The exact slices, encoded or not, of a schema's scaffold sets and of prompts.

    Raises ``InputError`` for an unknown schema, and for a prompt that is not valid or does not fit.
    """
    layout = host.planner.layout(schema)
    wanted: dict[Slice, None] = {}
    for scaffold in layout.schema.scaffolds:
        wanted.update(dict.fromkeys(scaffolded(layout, host.slices, scaffold.modules, _room(host))))
    for prompt in prompts:
        question = host.planner.question(prompt)
        question.check_fits(host.context.n_ctx, host.model.n_ctx_train)
        if question.bound is not None:
            wanted.update(dict.fromkeys(exact_slices(asked(question.bound), host.slices)))
    return list(wanted)


def _room(host: Host) -> int:
    """Cells for a slice and its context: all but one, which the token that applies a shift needs."""
    return host.context.n_ctx - 1


def encode(host: Host, slices: Iterable[Slice], label: str, progress: OnProgress | None = None) -> Encoded:
    """Encodes the slices that the store lacks among ``slices``.

    Args:
        host: Model, store and core.
        slices: The slices that are needed.
        label: Label of the slices in the store: the name of their schema, or what stands in place of it.
        progress: Called as ``progress(done, total)``, in tokens.
    """
    wanted, report = list(slices), Encoded()

    def task(slot: Slot, told: OnProgress) -> Task[Encoded]:
        return host.kv_cache.encode(slot, wanted, label, told, report=report)

    return host.do(task, Priority.ENCODE, progress)


def refine_recent(host: Host, schema: str | None, progress: OnProgress | None) -> Encoded:
    """Encodes the missing exact slices of recent prompts, see ``Engine.refine``."""
    report = Encoded()

    def task(slot: Slot, told: OnProgress) -> Task[None]:
        return refine(host.kv_cache, slot, schema, report, told)

    host.do(task, Priority.REFINE, progress)
    return report


def refining_when_idle(namespaces: Namespaces) -> Request[None] | None:
    """A request that refines the prompts of all namespaces; ``None`` on battery power."""
    if not on_mains():
        return None

    def task(_: Request[None]) -> Task[None]:
        for kv_cache in namespaces:
            with kv_cache.slot() as slot:
                yield from refine(kv_cache, slot, None, Encoded())

    return Request(task, priority=Priority.REFINE, once=True)

"""Prompts on one schema, planned and answered by a KV cache over a tiny model, or by one that has no model at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cpucache.layout import Bound, ChatTemplate, Positions, SchemaLayout, bind
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.tree import Schema
from cpucache.reuse import Fidelity, Lookup, Metrics, Plan, Repair, Slice, Slices, reading
from cpucache.reuse.reports import NewSlice
from cpucache.runtime import Context, KVType, Memory
from cpucache.store import Store
from tests.support.cutting import every
from tests.support.letters import Letters
from tests.support.workbench import PLENTY, Desk, Logits, opened


def written(inside: str, attributes: str = "") -> Schema:
    """A schema by what is inside it."""
    return parse_schema(f"<schema name='s' {attributes}>{inside}</schema>", file="s.xml")


class Prompting:
    """A schema, and the slices that there are of it."""

    def __init__(self, layout: SchemaLayout, kv_cache: Desk, lookup: Lookup) -> None:
        self.layout = layout
        self.kv_cache = kv_cache
        self.lookup = lookup

    @property
    def store(self) -> Store:
        return self.kv_cache.store

    def reading(self, room: int = 1 << 20) -> list[Slice]:
        """The slices that ``encode`` saves."""
        return reading(self.layout, self.kv_cache.slices, room)

    def bound(self, content: str, attributes: str = "") -> Bound:
        """A prompt by what is inside it, and its attributes."""
        prompt = parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>")
        return bind(self.layout, resolve(prompt, self.layout.schema))

    def plan(self, bound: Bound | str, fidelity: Fidelity | None = None, **settings: Any) -> Plan:
        """Its plan by the slices that there are now; nothing is recomputed unless told."""
        bound = self.bound(bound) if isinstance(bound, str) else bound
        return self.lookup.plan(bound, fidelity or Fidelity(), **settings)

    def pretend(self, slices: Iterable[Slice]) -> None:
        """List slices in the store as if they had been evaluated."""
        for slice_ in slices:
            if slice_.key not in self.store:
                self.kv_cache._save(NewSlice(slice_, np.zeros(1, np.uint8), 0.0), "s")

    def answer(self, bound: Bound | str, fidelity: Fidelity | None = None, **settings: Any) -> tuple[Plan, Metrics]:
        """Get a prompt into the context; gives what was spliced, and what it took."""
        bound = self.bound(bound) if isinstance(bound, str) else bound
        done: tuple[Plan, Metrics] = self.kv_cache.prefill(lambda: self.plan(bound, fidelity, **settings), "s")
        return done

    @property
    def logits(self) -> Logits:
        """Those of the last token of the prompt that was answered last."""
        return self.kv_cache.context.logits()

    def with_schema(self, schema: Schema, positions: Positions | None = None) -> Prompting:
        """Another schema (or another version of it) on the same store."""
        laid = SchemaLayout(schema, self.layout.vocabulary, self.layout.template, positions or self.layout.positions)
        return Prompting(laid, self.kv_cache, self.lookup)


def prompting_in(
    context: Context, schema: Schema, positions: Positions = "reserved", store: Store | None = None
) -> Prompting:
    """Prompts answered in ``context``."""
    model = context.model
    store = store or Store(None, ram_budget=PLENTY)
    kv_cache = Desk(context, store, Slices(model.path.stem, context.state_format, every()))
    layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template), positions)
    return Prompting(layout, kv_cache, Lookup(kv_cache, Repair(model.text)))


@contextmanager
def prompting(
    path: Path, schema: Schema, positions: Positions = "reserved", *, kv_type: KVType = "f32", n_ctx: int = 1024
) -> Iterator[Prompting]:
    """Prompts answered by the model at ``path``."""
    with opened(path, kv_type, n_ctx=n_ctx) as context:
        desk = prompting_in(context, schema, positions)
        with desk.store:
            yield desk


@contextmanager
def planning(
    schema: Schema, positions: Positions = "reserved", *, letters: Letters | None = None, template: str | None = None
) -> Iterator[Prompting]:
    """Prompts that are planned only: there is no model, and slices are listed in a store without being evaluated."""
    letters = letters or Letters(n_ctx_train=1 << 20)
    context: Any = SimpleNamespace(memory=Memory(), model=SimpleNamespace(path=Path("none.gguf")))
    with Store(None, ram_budget=PLENTY) as store:
        kv_cache = Desk(context, store, Slices("model", "format", every()))
        layout = SchemaLayout(schema, letters, ChatTemplate(template), positions)
        yield Prompting(layout, kv_cache, Lookup(kv_cache, Repair(letters.text)))

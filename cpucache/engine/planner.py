"""What callers ask for, in whatever form, as plans."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from cpucache.engine.opening import Opening
from cpucache.engine.tuning import Fidelity, Tuning
from cpucache.errors import ContextFull, InputError
from cpucache.layout import Chains, ChatTemplate, Plan, Positions, SchemaLayout, Turns, bind, bind_opening
from cpucache.layout.recompute import Relevance
from cpucache.pml import load_prompt, load_schema, parse_prompt, resolve
from cpucache.pml.tree import Prompt, RoleName, Schema
from cpucache.runtime import Model

Message: TypeAlias = Mapping[str, object]
"""``role`` and ``content``."""
PREFIX = "(text)"
"""What slices of plain text and messages are listed under, as if it were their schema."""


class Request(NamedTuple):
    """A prompt, planned."""

    plan: Plan
    label: str
    """Under which its slices are listed."""
    name: str
    """For errors."""

    def too_long(self, n_ctx: int) -> ContextFull:
        """The error for a prompt that leaves no room for an answer in a context of ``n_ctx`` cells."""
        sizes: dict[str, int] = {}
        for span in self.plan.spans:
            name = span.segment.module or "text of the schema" if span.segment else "new text"
            sizes[name] = sizes.get(name, 0) + len(span.tokens)
        parts = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        largest = ", ".join(f"{name} ({size})" for name, size in parts)
        return ContextFull(
            f"{self.name}: the prompt is {self.plan.n_tokens} tokens long and leaves no room for an answer in a "
            f"context of {n_ctx}"
            + ("" if self.plan.exact else f"; its largest parts: {largest}")
            + "; raise --ctx (n_ctx=…) or leave something out"
        )


class Planner:
    """Knows the schemas, the chat template and the blocks of one model."""

    def __init__(
        self, model: Model, template: ChatTemplate, chains: Chains, positions: Positions, fidelity: Fidelity
    ) -> None:
        self._model = model
        self._template = template
        self._chains = chains
        self._positions = positions
        self._fidelity = fidelity
        self.relevance = Relevance(model.text)
        self.schemas: dict[str, SchemaLayout] = {}

    def add_schema(self, schema: str | Path | Schema) -> SchemaLayout:
        """Read and lay out a schema; prompts then find it by its name. Raises ``PMLError``."""
        parsed = schema if isinstance(schema, Schema) else load_schema(Path(schema))
        layout = self.schemas[parsed.name] = self.lay(parsed)
        return layout

    def lay(self, schema: Schema) -> SchemaLayout:
        """The layout of a schema, which is not added. Raises ``PMLError``."""
        return SchemaLayout(schema, self._model, self._template, self._positions)

    def layout(self, name: str) -> SchemaLayout:
        """The layout of a schema that has been added. Raises ``InputError``."""
        layout = self.schemas.get(name)
        if layout is None:
            near = difflib.get_close_matches(name, self.schemas, 1)
            known = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(self.schemas) or 'none'}"
            raise InputError(f"no schema '{name}' has been added ({known}); add it with add_schema()")
        return layout

    def tuning(self, layout: SchemaLayout, fidelity: Fidelity | None = None) -> Tuning:
        """What is done about modules that have not seen one another."""
        return (fidelity or Fidelity()).over(self._fidelity).tuning(layout.schema)

    def request(
        self,
        prompt: str | Path | Prompt | None,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
        *,
        fidelity: Fidelity | None = None,
    ) -> Request:
        """What a prompt consists of, see ``Engine.plan``."""
        if sum(given is not None for given in (prompt, messages, text)) != 1:
            raise InputError("give one of prompt, messages and text")
        if prompt is not None:
            parsed = parsed_prompt(prompt)
            layout = self.layout(parsed.schema)
            tuning = self.tuning(layout, fidelity)
            plan = bind(
                layout,
                resolve(parsed, layout.schema),
                file=parsed.file,
                lead=tuning.lead_tokens,
                refresh=tuning.refresh(layout, self.relevance),
                exact=self._chains if tuning.exact else None,
            )
            return Request(plan, parsed.schema, parsed.file)
        parts = [] if self._model.bos is None else [np.array([self._model.bos], np.int32)]
        if messages is not None:
            turns = Turns(self._template, self._model)
            parts += [turns.turn(*_checked(message)) for message in messages]
            parts.append(turns.answer())
        elif text is not None:
            parts.append(self._model.tokenize(text))
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
        if len(tokens) <= (self._model.bos is not None) or (messages is not None and not messages):
            raise InputError("the prompt is empty")
        return Request(self._chains.plan((), tokens), PREFIX, "messages" if text is None else "text")

    def opening(self, prompt: str | Path | Prompt) -> Opening:
        """What a conversation begins with that begins with a PML prompt."""
        parsed = parsed_prompt(prompt)
        layout = self.layout(parsed.schema)
        tuning = self.tuning(layout)
        plan, turns, asks = bind_opening(
            layout,
            resolve(parsed, layout.schema),
            file=parsed.file,
            lead=tuning.lead_tokens,
            refresh=tuning.refresh(layout, self.relevance),
        )
        return Opening(plan, turns, asks, parsed.schema)


def parsed_prompt(prompt: str | Path | Prompt) -> Prompt:
    """PML text, the path of a file, or a parsed prompt, as a parsed prompt. Raises ``PMLError``."""
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str) and prompt.lstrip().startswith("<"):
        return parse_prompt(prompt)
    return load_prompt(Path(prompt))


def _checked(message: Message) -> tuple[RoleName, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise InputError(f"a message has a role (system, user or assistant) and text as its content, not {message!r}")
    return role, content

"""The planner: turns a prompt in any form that callers use into a question, which can be planned."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from cpucache.engine.first_prompt import FirstPrompt
from cpucache.engine.writing import certain, rewritten
from cpucache.errors import ContextFull, InputError
from cpucache.layout import Bound, ChatTemplate, Positions, SchemaLayout, Segment, Text, Tokens, Turns, bind
from cpucache.pml import is_prompt, load_prompt, load_schema, parse_prompt, resolve, tree
from cpucache.pml.tree import Prompt, Reference, RoleName, Schema, Turn
from cpucache.reuse import REUSES, Fidelity, KVCache, Level, Lookup, Plan, PlanText, Repair, Reuse, plan_text

if TYPE_CHECKING:
    from cpucache.authoring import AnyPromptFunction

Message: TypeAlias = Mapping[str, object]
"""A message with ``role`` (system, user, assistant) and ``content``."""
PMLPrompt: TypeAlias = "str | Path | Prompt"
"""A prompt on a schema: PML text, the ``Path`` of a file, or a parsed prompt."""
AnyPrompt: TypeAlias = "PMLPrompt | Sequence[Message] | Sequence[int] | Tokens | Text"
"""A prompt in any form; its type tells the form, see ``Engine.plan``."""
PREFIX = "(text)"
"""Label of slices of plain text and messages in the store, in place of a schema name."""
_HEAD = 16  # characters of a long text that are tokenized first, for each token that fits the context


@dataclass(frozen=True)
class Question:
    """A prompt, as tokens, with a function that plans it."""

    plan: Callable[[], Plan]
    """Returns the plan of the prompt, by the slices that exist when it is called."""
    tokens: Tokens
    label: str
    """Label of its slices in the store: the name of its schema, or ``PREFIX``."""
    name: str
    """Name of the prompt in error messages."""
    fidelity: Fidelity
    bound: Bound | None = None
    """The prompt on the layout of its schema, if it has one."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.tokens)

    def check_fits(self, n_ctx: int, n_ctx_train: int, room: int = 1) -> None:
        """Checks that the prompt and an answer fit the llama.cpp context and the trained positions of the model.

        Args:
            n_ctx: Cells of the llama.cpp context.
            n_ctx_train: Number of positions that the model was trained on.
            room: Minimum length of the answer, in tokens.

        Raises:
            ContextFull: They do not fit.
        """
        limit = min(n_ctx, n_ctx_train)
        if self.n_tokens + room <= limit:
            return
        what = (
            f"a context of {n_ctx}"
            if n_ctx <= n_ctx_train
            else f"the {n_ctx_train} positions that the model was trained on"
        )
        raise ContextFull(
            f"{self.name}: the prompt is {self.n_tokens} tokens long and leaves no room for an answer in {what}"
            f"{self._largest()}; {_advice(n_ctx, n_ctx_train)}"
        )

    def _largest(self) -> str:
        """The three longest parts of a prompt on a schema, as text for an error message."""
        if self.bound is None:
            return ""
        sizes: dict[str, int] = {}
        for piece in self.bound.pieces:
            name = (piece.module or "text of the schema") if isinstance(piece, Segment) else "new text"
            sizes[name] = sizes.get(name, 0) + len(piece.tokens)
        parts = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        return "; its largest parts: " + ", ".join(f"{name} ({size})" for name, size in parts)


class Planner:
    """Turns prompts into questions, by the schemas and the chat template of one model.

    Args:
        kv_cache: The model, which tokenizes, and the store.
        template: Chat template of the model.
        positions: Layout of schemas, see ``Engine``.
        fidelity: Default for prompts without their own.
        reuse: Default for prompts without their own.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        template: ChatTemplate,
        positions: Positions,
        *,
        fidelity: Fidelity | None = None,
        reuse: Reuse = "schema",
    ) -> None:
        self._kv_cache = kv_cache
        self._model = model = kv_cache.context.model
        self._repair = Repair(model.text)
        self._lookup = Lookup(kv_cache, self._repair)
        self._template = template
        self._positions = positions
        self._fidelity = fidelity
        self._reuse = reuse
        self._n_ctx = kv_cache.context.n_ctx
        self.schemas: dict[str, SchemaLayout] = {}

    def within(self, kv_cache: KVCache) -> Planner:
        """Returns a planner for the KV cache of a namespace, with the same defaults and no schemas."""
        return Planner(kv_cache, self._template, self._positions, fidelity=self._fidelity, reuse=self._reuse)

    def add_schema(self, schema: str | Path | Schema | AnyPromptFunction) -> SchemaLayout:
        """Reads and lays out a schema, which prompts then refer to by its name. Raises ``PMLError``."""
        if not isinstance(schema, str | Path | Schema):
            # Imported here because most processes never need it. A caller with a prompt function has it loaded already.
            from cpucache.authoring import PromptFunction, PromptMethod

            if isinstance(schema, PromptFunction | PromptMethod):
                schema = schema.tree()
        parsed = schema if isinstance(schema, Schema) else load_schema(Path(schema))
        layout = self.schemas[parsed.name] = self.lay(parsed)
        return layout

    def lay(self, schema: Schema) -> SchemaLayout:
        """The layout of a schema, without adding the schema. Raises ``PMLError``."""
        return SchemaLayout(schema, self._model, self._template, self._positions)

    def layout(self, name: str) -> SchemaLayout:
        """The layout of a schema that has been added. Raises ``InputError`` for an unknown name."""
        layout = self.schemas.get(name)
        if layout is None:
            near = difflib.get_close_matches(name, self.schemas, 1)
            known = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(self.schemas) or 'none'}"
            raise InputError(f"no schema '{name}' has been added ({known}); add it with add_schema()")
        return layout

    def question(
        self,
        prompt: AnyPrompt | None,
        *,
        text: str | None = None,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
    ) -> Question:
        """The question of a prompt.

        Args:
            prompt: Prompt in a form that ``Engine.plan`` takes.
            text: Plain text instead of a prompt.
            fidelity: Treatment of slices that are not exact (default: that of the planner).
            reuse: Slices that the prompt may take (default: that of the planner).

        Raises:
            InputError: The prompt is not valid (``PMLError`` for PML), or its schema has not been added.
        """
        reuse = self._reuse_of(reuse)
        wanted = Fidelity.of(fidelity, usual=self._fidelity)
        if text is not None:
            if prompt is not None:
                raise InputError("give a prompt, or text to continue, not both")
            if not isinstance(text, str):
                raise InputError(f"text must be a str to continue, not {_shown(text)}")
            return self._of_text(Text(self.tokens_of(text)), wanted, reuse, "text")
        if isinstance(prompt, Prompt | Path) or (isinstance(prompt, str) and is_prompt(prompt)):
            return self._of_pml(parsed_prompt(prompt), wanted, reuse)
        if isinstance(prompt, str):
            return self._of_messages([("user", _message(prompt))], wanted, reuse)
        if isinstance(prompt, Text):
            ids = self.checked_tokens(prompt.tokens)
            return self._of_text(replace(prompt, tokens=ids), wanted, reuse, "tokens")
        if isinstance(prompt, np.ndarray):
            return self._of_text(Text(self.checked_tokens(prompt)), wanted, reuse, "tokens")
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise InputError(f"a prompt must be {_FORMS}, not {_shown(prompt)}")
        if prompt and not isinstance(prompt[0], str | Mapping):
            return self._of_text(Text(self.checked_tokens(prompt)), wanted, reuse, "tokens")
        return self._of_messages([_checked(message) for message in prompt], wanted, reuse)

    def _of_pml(self, prompt: Prompt, fidelity: Fidelity, reuse: Reuse) -> Question:
        layout = self.layout(prompt.schema)
        included = resolve(prompt, layout.schema)
        self._check_size(prompt.file, _new_texts(prompt.children))
        bound = bind(layout, included, file=prompt.file)
        plan = self._planning(bound, fidelity, reuse)
        return Question(plan, bound.tokens, prompt.schema, prompt.file, fidelity, bound)

    def _of_messages(self, messages: Sequence[tuple[RoleName, str]], fidelity: Fidelity, reuse: Reuse) -> Question:
        self._check_size("messages", [content for _, content in messages])
        return self._of_text(Text(self._tokens(messages, None)), fidelity, reuse, "messages")

    def size_ahead(self, question: Question, prompt: AnyPrompt | None, text: str | None) -> int:
        """Number of leading tokens of an unfinished prompt that stay the same however its last text continues.

        Args:
            question: The question of the prompt as it stands.
            prompt: The prompt that ``question`` was built from.
            text: The text that ``question`` was built from, if it has no prompt.
        """
        if isinstance(prompt, str) and is_prompt(prompt):
            prompt = parsed_prompt(prompt)
        others = [self.question(given, text=each).tokens for given, each in rewritten(prompt, text)]
        return min(certain(question.tokens, others), question.n_tokens - 1)

    def _of_text(self, text: Text, fidelity: Fidelity, reuse: Reuse, name: str) -> Question:
        plan = partial(plan_text, self._kv_cache, self._repair, text, fidelity, reuse)
        return Question(plan, text.tokens, PREFIX, name, fidelity)

    def tokens_of(self, text: str) -> Tokens:
        """The tokens of a plain text, with BOS. Raises ``InputError`` for an empty or a far too long text."""
        self._check_size("text", [text])
        return self._tokens(None, text)

    def checked_tokens(self, tokens: Sequence[object] | Tokens) -> Tokens:
        """Token ids as an array ``[n_tokens]``. Raises ``InputError`` for values that are no ids of the vocabulary."""
        try:
            ids = np.array(tokens)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError("tokens must be a list of numbers") from error
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise InputError("tokens must be a list of at least one number")
        if ids.min() < 0 or ids.max() >= self._model.n_vocab:
            raise InputError(f"tokens: the model has ids from 0 to {self._model.n_vocab - 1}")
        return ids.astype(np.int32)

    def first_prompt(
        self, prompt: PMLPrompt, *, fidelity: Level | Fidelity | None = None, reuse: Reuse | None = None
    ) -> FirstPrompt:
        """The first prompt of a conversation, from a PML prompt. Raises ``PMLError`` or ``InputError``."""
        wanted = Fidelity.of(fidelity, usual=self._fidelity)
        parsed = parsed_prompt(prompt)
        layout = self.layout(parsed.schema)
        bound = bind(layout, resolve(parsed, layout.schema), file=parsed.file, opens=True)
        plan = self._planning(bound, wanted, self._reuse_of(reuse), ends=False)()
        spans = self._kv_cache.slices.chained(plan, "first_prompt")
        return FirstPrompt(spans, bound.turns, bound.asks, parsed.schema)

    def continuing(self, fidelity: Level | Fidelity | None = None, reuse: Reuse | None = None) -> PlanText | None:
        """A function that plans the messages of a conversation; ``None`` if messages take exact slices only.

        ``fidelity`` and ``reuse`` are those of ``question``. Raises ``InputError``.
        """
        if self._reuse_of(reuse) != "anywhere":
            return None
        wanted = Fidelity.of(fidelity, usual=self._fidelity)
        return lambda before, tokens: plan_text(self._kv_cache, self._repair, Text(tokens), wanted, "anywhere", before)

    def _reuse_of(self, reuse: Reuse | None) -> Reuse:
        """``reuse``, or the default. Raises ``InputError`` for an unknown value."""
        reuse = self._reuse if reuse is None else reuse
        if reuse not in REUSES:
            raise InputError(f"reuse={reuse!r}: must be one of {', '.join(REUSES)}")
        return reuse

    def _planning(self, bound: Bound, fidelity: Fidelity, reuse: Reuse, *, ends: bool = True) -> Callable[[], Plan]:
        """A function that plans a prompt on a schema by the slices that exist when it is called."""
        if reuse == "exact":
            fidelity = Fidelity(exact=True)

        def plan() -> Plan:
            found = self._lookup.plan(bound, fidelity, reuse=reuse, ends=ends)
            if found.end >= self._model.n_ctx_train:
                # Gaps of left-out modules may push the end of the prompt beyond the trained positions.
                found = self._lookup.plan(bound, fidelity, reuse=reuse, ends=ends, packed=True)
            return found

        return plan

    def _check_size(self, name: str, texts: Iterable[str]) -> None:
        """Raises ``ContextFull`` for far too long texts, after tokenizing only as much of them as proves it."""
        text = "".join(texts)
        limit = min(self._n_ctx, self._model.n_ctx_train)
        size = _HEAD * limit
        while size < len(text):
            # A cut text may tokenize differently near the cut, so only twice the limit is proof.
            if len(self._model.tokenize(text[:size])) > 2 * limit:
                raise ContextFull(
                    f"{name}: {len(text):,} characters exceed a context of {limit:,} tokens; "
                    + _advice(self._n_ctx, self._model.n_ctx_train)
                )
            size *= 4

    def _tokens(self, messages: Sequence[tuple[RoleName, str]] | None, text: str | None) -> Tokens:
        """The tokens of messages in the chat template, or of plain text, with BOS. Raises ``InputError`` for none."""
        parts = [] if self._model.bos is None else [np.array([self._model.bos], np.int32)]
        if messages is not None:
            turns = Turns(self._template, self._model)
            parts += [turns.turn(*message) for message in messages]
            parts.append(turns.answer())
        elif text is not None:
            parts.append(self._model.tokenize(text))
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
        if len(tokens) <= (self._model.bos is not None) or (messages is not None and not messages):
            raise InputError("the prompt is empty")
        return tokens


def parsed_prompt(prompt: PMLPrompt) -> Prompt:
    """A PML prompt, parsed. Raises ``PMLError``, and ``InputError`` for a value that is no PML prompt."""
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, Path):
        return load_prompt(prompt)
    if isinstance(prompt, str) and is_prompt(prompt):
        return parse_prompt(prompt)
    raise InputError(
        f'a PML prompt must be text that begins with <prompt, a Path("...") or a parsed prompt, not {_shown(prompt)}'
    )


_FORMS = (
    'a message, PML text that begins with <prompt, a Path("...") of a PML file, messages such as '
    '[{"role": "user", "content": "..."}], or token ids; give text to continue as text="..."'
)
_SHOWN = 60


def _shown(value: object) -> str:
    """A value as error messages quote it, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _message(text: str) -> str:
    """The text of a user's message. Raises ``InputError`` for blank text, and for the path of a PML file."""
    if text.casefold().endswith(".xml") and not any(map(str.isspace, text)):
        raise InputError(
            f"{_shown(text)} looks like the path of a PML file: pass Path({_shown(text)}) for the prompt in it, or "
            '[{"role": "user", "content": "..."}] for a message with this text'
        )
    if not text.strip():
        raise InputError(f"the prompt is empty; it must be {_FORMS}")
    return text


def _advice(n_ctx: int, n_ctx_train: int) -> str:
    """Advice for an error message about a prompt that does not fit."""
    return "raise --ctx (n_ctx=…) or shorten the prompt" if n_ctx < n_ctx_train else "shorten the prompt"


def _new_texts(nodes: Iterable[Reference | tree.Text | Turn]) -> Iterator[str]:
    """The new texts and turns of a PML prompt, without those of its schema."""
    for node in nodes:
        if isinstance(node, Reference):
            yield from _new_texts(node.children)
        else:
            yield node.text


def _checked(message: object) -> tuple[RoleName, str]:
    """Role and content of a message. Raises ``InputError`` for a value that is no message."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise InputError(
            f"a message must be a mapping with a role (system, user, assistant) and text as content, not {message!r}"
        )
    return role, content

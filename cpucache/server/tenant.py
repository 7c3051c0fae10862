"""Tenants: what each API key has for itself. Without keys there is one, who has everything."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np

from cpucache.engine import Engine, Sampling, Stream
from cpucache.engine.reply import Prepared
from cpucache.layout import Text, Tokens
from cpucache.layout.conversation import ChatMessage, Conversations, Tool
from cpucache.layout.vocabulary import common, empty
from cpucache.reuse import OnProgress
from cpucache.runtime.grammar import CallForm
from cpucache.server.answers import CLOSE, OPEN, AnswerParser, answer_of, separated
from cpucache.server.asked import Asked, Conversation, Extension, prompt_of
from cpucache.server.background import Background, Job
from cpucache.server.choice import Forced, form_of
from cpucache.server.failures import Refusal
from cpucache.server.library import Library
from cpucache.server.records import Records
from cpucache.server.settings import ServerSettings

_REMEMBERED = 4096
"""Answers whose tokens are remembered."""
_AHEAD = 4
"""Conversations whose next turn is evaluated ahead."""
_TAIL = 16  # tokens of a prompt that its end is looked for in


@dataclass(frozen=True, eq=False)
class _Said:
    """An answer as the model wrote it."""

    raw: str
    ids: Tokens
    text: str
    """What stands behind its reasoning, calls as they were written."""
    reasoning: str


class Tenant:
    """An engine, the schemas that were uploaded, how answers were written, and what was asked lately.

    Args:
        engine: In the tenant's namespace.
        settings: What clients may do.
        background: Encodes schemas.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, background: Background) -> None:
        self.engine = engine
        self.schemas = Library(engine, background, settings.max_schemas, settings.max_schema_bytes)
        self.conversations = Conversations(engine.model, engine.host.template, self._ids_of)
        self.records = Records(engine)
        self._settings = settings
        self._background = background
        self._said: OrderedDict[bytes, _Said] = OrderedDict()
        self._ahead: deque[Job] = deque(maxlen=_AHEAD)

    # -- prompts -----------------------------------------------------------------------------------------------------
    def asked(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        modules: Collection[str] = (),
        extension: Extension | None = None,
    ) -> Asked:
        """What a request asks for, ready to be answered. Raises ``PMLError`` or ``InputError``."""
        settings = {} if extension is None else extension.settings
        if extension is not None and extension.prompt is not None:
            prompt = prompt_of(extension, messages, tools)
            return Asked(prompt, self.engine.planner.question(prompt).n_tokens, settings)
        text = self.text(messages, tools, modules)
        return Asked(text, len(text.tokens), settings, conversation=Conversation(messages, tools, modules))

    def following(self, talk: Conversation, settings: dict[str, Any]) -> Asked:
        """What every prompt begins with that goes on from a conversation, whatever is said next."""
        messages, tools, modules = talk.messages, talk.tools, talk.modules
        one, other = (self.text([*messages, ChatMessage("user", text)], tools, modules) for text in "1A")
        size = common(one.tokens, other.tokens)
        # The last token is not evaluated.
        return Asked(one.first(size + 1), size, settings)

    def text(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), modules: Collection[str] = ()) -> Text:
        """A conversation, ready to be answered. What this server has said itself is taken as it was said.

        Tool definitions, and ``modules`` in messages, may be reused wherever they stand.
        """
        if self._settings.sorted_tools:
            tools = sorted(tools, key=lambda tool: tool.name)
        if self._takes_reasoning:
            messages = [separated(message) for message in messages]
        written = [self._as_said(message) for message in messages]
        return self.conversations.text(messages, tools, modules, written=written)

    def sampling(self, sampling: Sampling, forced: Forced | None) -> Sampling:
        """How tokens are chosen, where calls may be forced. Raises ``InputError``."""
        return sampling if forced is None else forced.of(sampling, self._call_form)

    @cached_property
    def _call_form(self) -> CallForm:
        """How the model writes calls."""
        return form_of(self.conversations, partial(self.engine.model.text, special=True))

    @cached_property
    def _takes_reasoning(self) -> bool:
        """Whether the model's template knows reasoning, and decides itself what is kept of it."""
        source = self.engine.model.chat_template or ""
        return CLOSE in source or "reasoning_content" in source

    def parser(self, prompt: Asked, names: Collection[str]) -> AnswerParser:
        """What separates the parts of the answer to a prompt. ``names``: those of its tools."""
        end = prompt.prompt.tokens[-_TAIL:] if isinstance(prompt.prompt, Text) else empty()
        opened = self.engine.model.text(end, special=True).rstrip().endswith(OPEN)
        return AnswerParser(names, thinking=opened)

    # -- answers -----------------------------------------------------------------------------------------------------
    def _as_said(self, message: ChatMessage) -> ChatMessage:
        known = self._said.get(_identity(message)) if message.role == "assistant" else None
        if known is None:
            return message
        return replace(message, text=known.text, calls=(), reasoning=message.reasoning or known.reasoning)

    def _ids_of(self, text: str) -> Tokens | None:
        known = self._said.get(_identity(ChatMessage("assistant", text)))
        return None if known is None or known.raw != text else known.ids

    def remember(self, parser: AnswerParser, stream: Stream, prompt: Asked) -> None:
        """Note how an answer was written, to find it again when the client sends it back.

        What the model thought may be left out of the history from the next turn on, by the client or by the template:
        what is left is evaluated whenever no answer is on its way.
        """
        message, raw = parser.message, stream.text
        ids = np.array(stream.tokens, np.int32)
        # Where a text to stop at was cut off, the tokens say more than the text.
        if raw and raw == raw.strip() and self.engine.model.text(ids) == raw:
            said = _Said(raw, ids, answer_of(raw) if message.reasoning else raw, message.reasoning)
            for key in (_identity(message), _identity(ChatMessage("assistant", raw))):
                self._said[key] = said
                self._said.move_to_end(key)
            while len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)
        talk = prompt.conversation
        if talk is None or message.calls or not stream.evaluated:
            return  # the result of a call is read with all that was thought before it
        known = [self._as_said(separated(each)) for each in talk.messages]
        if message.reasoning or any(each.reasoning for each in known):
            self._evaluate_ahead(replace(talk, messages=[*talk.messages, message]), prompt.settings)

    def forget(self) -> None:
        """Forget how answers were written, as after a restart."""
        self._said.clear()

    def _evaluate_ahead(self, talk: Conversation, settings: dict[str, Any]) -> None:
        def work(progress: OnProgress) -> Prepared:
            asked = self.following(talk, settings)
            return self.engine.prepare(asked.prompt, progress, **asked.settings)

        if len(self._ahead) == self._ahead.maxlen:
            self._ahead.popleft().cancel()
        with suppress(Refusal):  # there is enough to do
            self._ahead.append(self._background.add(Job(work)))


def _identity(message: ChatMessage) -> bytes:
    """What an answer is known by, however its JSON is written."""
    calls = [[call.name, call.arguments] for call in message.calls]
    return blake2b(json.dumps([message.text.strip(), calls], sort_keys=True).encode(), digest_size=16).digest()

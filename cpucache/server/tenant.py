"""Tenants: schemas, answers and records of each API key. A server without keys has one tenant."""

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
"""Number of entries for remembered answers; an answer has up to two."""
_AHEAD = 4
"""Number of conversations that are prefilled ahead of their next turn."""
_TAIL = 16  # tokens at the end of a prompt that may hold an opening tag


@dataclass(frozen=True, eq=False)
class _Said:
    """An answer as the model wrote it: its text, token ids and reasoning."""

    raw: str
    ids: Tokens
    text: str
    """Text after the reasoning, with calls as the model wrote them."""
    reasoning: str


class Tenant:
    """An engine in the namespace of one API key, with its uploaded schemas, remembered answers and last requests.

    Args:
        engine: Engine in the tenant's namespace.
        settings: Limits and options of the server.
        background: Encodes schemas, and prefills conversations ahead of their next turn.
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
        """Returns the prompt of a request, ready to be answered.

        Args:
            messages: The conversation; turns to append to a PML prompt.
            tools: Tools that may be called. A PML prompt takes none.
            modules: Texts within messages that are reused at any position.
            extension: The field ``cpucache`` of the request.

        Raises:
            PMLError: The PML prompt is invalid.
            InputError: The request can't be answered.
        """
        settings = {} if extension is None else extension.settings
        if extension is not None and extension.prompt is not None:
            prompt = prompt_of(extension, messages, tools)
            return Asked(prompt, self.engine.planner.question(prompt).n_tokens, settings)
        text = self.text(messages, tools, modules)
        return Asked(text, len(text.tokens), settings, conversation=Conversation(messages, tools, modules))

    def following(self, talk: Conversation, settings: dict[str, Any]) -> Asked:
        """Returns the longest prompt prefix that does not depend on the user's next message in a conversation.

        It is found by rendering two next messages whose first characters differ.
        """
        messages, tools, modules = talk.messages, talk.tools, talk.modules
        one, other = (self.text([*messages, ChatMessage("user", text)], tools, modules) for text in "1A")
        size = common(one.tokens, other.tokens)
        # ``Engine.prepare`` does not evaluate the last token.
        return Asked(one.first(size + 1), size, settings)

    def text(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), modules: Collection[str] = ()) -> Text:
        """Renders a conversation. Remembered answers keep the token ids that the model wrote.

        Tool definitions, and ``modules`` in messages, may be reused at any position.
        """
        if self._settings.sorted_tools:
            tools = sorted(tools, key=lambda tool: tool.name)
        if self._takes_reasoning:
            messages = [separated(message) for message in messages]
        written = [self._as_said(message) for message in messages]
        return self.conversations.text(messages, tools, modules, written=written)

    def sampling(self, sampling: Sampling, forced: Forced | None) -> Sampling:
        """Returns ``sampling``, restricted to forced calls if there are any. Raises ``InputError``."""
        return sampling if forced is None else forced.of(sampling, self._call_form)

    @cached_property
    def _call_form(self) -> CallForm:
        """Form in which the model writes calls."""
        return form_of(self.conversations, partial(self.engine.model.text, special=True))

    @cached_property
    def _takes_reasoning(self) -> bool:
        """Whether the model's chat template handles reasoning, and decides which of it stays in the history."""
        source = self.engine.model.chat_template or ""
        return CLOSE in source or "reasoning_content" in source

    def parser(self, prompt: Asked, names: Collection[str]) -> AnswerParser:
        """Returns a parser for the answer to a prompt. ``names`` are the names of its tools."""
        end = prompt.prompt.tokens[-_TAIL:] if isinstance(prompt.prompt, Text) else empty()
        opened = self.engine.model.text(end, special=True).rstrip().endswith(OPEN)
        return AnswerParser(names, thinking=opened)

    # -- answers -----------------------------------------------------------------------------------------------------
    def _as_said(self, message: ChatMessage) -> ChatMessage:
        """Returns a message of the assistant as the model wrote it, if it is remembered; else unchanged."""
        known = self._said.get(_identity(message)) if message.role == "assistant" else None
        if known is None:
            return message
        return replace(message, text=known.text, calls=(), reasoning=message.reasoning or known.reasoning)

    def _ids_of(self, text: str) -> Tokens | None:
        """Returns the token ids of the remembered answer that is exactly ``text``, if there is one."""
        known = self._said.get(_identity(ChatMessage("assistant", text)))
        return None if known is None or known.raw != text else known.ids

    def remember(self, parser: AnswerParser, stream: Stream, prompt: Asked) -> None:
        """Remembers the tokens of an answer for when the client sends it back, however its JSON is written.

        The client or the template may drop the reasoning from the history at the next turn. All later tokens would
        then be evaluated, so a job prefills the shorter history while no answer is running.
        """
        message, raw = parser.message, stream.text
        ids = np.array(stream.tokens, np.int32)
        # If a stop text was cut off, the tokens contain more than the text and can't stand for it.
        if raw and raw == raw.strip() and self.engine.model.text(ids) == raw:
            said = _Said(raw, ids, answer_of(raw) if message.reasoning else raw, message.reasoning)
            for key in (_identity(message), _identity(ChatMessage("assistant", raw))):
                self._said[key] = said
                self._said.move_to_end(key)
            while len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)
        talk = prompt.conversation
        if talk is None or message.calls or not stream.evaluated:
            return  # before the result of a call, reasoning stays in the history
        known = [self._as_said(separated(each)) for each in talk.messages]
        if message.reasoning or any(each.reasoning for each in known):
            self._evaluate_ahead(replace(talk, messages=[*talk.messages, message]), prompt.settings)

    def forget(self) -> None:
        """Forgets all remembered answers, as a restart does."""
        self._said.clear()

    def _evaluate_ahead(self, talk: Conversation, settings: dict[str, Any]) -> None:
        """Queues a job that prefills a conversation ahead of its next turn. Beyond ``_AHEAD``, cancels the oldest."""

        def work(progress: OnProgress) -> Prepared:
            asked = self.following(talk, settings)
            return self.engine.prepare(asked.prompt, **asked.settings).result(progress)

        if len(self._ahead) == self._ahead.maxlen:
            self._ahead.popleft().cancel()
        with suppress(Refusal):  # the queue is full: the next turn is not prefilled
            self._ahead.append(self._background.add(Job(work)))


def _identity(message: ChatMessage) -> bytes:
    """Hash by which an answer is remembered. It does not depend on how the JSON of its calls is written."""
    calls = [[call.name, call.arguments] for call in message.calls]
    return blake2b(json.dumps([message.text.strip(), calls], sort_keys=True).encode(), digest_size=16).digest()

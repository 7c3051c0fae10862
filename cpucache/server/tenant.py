"""Tenants: what each API key has for itself. Without keys there is one, who has everything."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial
from hashlib import blake2b

import numpy as np

from cpucache.engine import Engine, Sampling, Stream
from cpucache.layout import Text, Tokens
from cpucache.layout.conversation import ChatMessage, Conversations, Tool
from cpucache.runtime.grammar import CallForm
from cpucache.server.asked import Asked, Extension, prompt_of
from cpucache.server.background import Background
from cpucache.server.choice import Forced, form_of
from cpucache.server.library import Library
from cpucache.server.records import Records
from cpucache.server.settings import ServerSettings

_REMEMBERED = 4096
"""Answers whose tokens are remembered."""


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
        self._said: OrderedDict[bytes, tuple[str, Tokens]] = OrderedDict()

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
        return Asked(text, len(text.tokens), settings)

    def text(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), modules: Collection[str] = ()) -> Text:
        """A conversation, ready to be answered. What this server has said itself is taken as it was said.

        Tool definitions, and ``modules`` in messages, may be reused wherever they stand.
        """
        if self._settings.sorted_tools:
            tools = sorted(tools, key=lambda tool: tool.name)
        written = [self._as_said(message) for message in messages]
        return self.conversations.text(messages, tools, modules, written=written)

    def sampling(self, sampling: Sampling, forced: Forced | None) -> Sampling:
        """How tokens are chosen, where calls may be forced. Raises ``InputError``."""
        return sampling if forced is None else forced.of(sampling, self._call_form)

    @cached_property
    def _call_form(self) -> CallForm:
        """How the model writes calls."""
        return form_of(self.conversations, partial(self.engine.model.text, special=True))

    # -- answers -----------------------------------------------------------------------------------------------------
    def _as_said(self, message: ChatMessage) -> ChatMessage:
        known = self._said.get(_identity(message)) if message.role == "assistant" else None
        return message if known is None else replace(message, text=known[0], calls=())

    def _ids_of(self, text: str) -> Tokens | None:
        known = self._said.get(_identity(ChatMessage("assistant", text)))
        return None if known is None or known[0].strip() != text else known[1]

    def remember(self, message: ChatMessage, stream: Stream) -> None:
        """Note how an answer was written, to find it again when the client sends it back."""
        text = stream.text
        ids = np.array(stream.tokens, np.int32)
        # Where a text to stop at was cut off, the tokens say more than the text.
        if text != text.strip() or not text or self.engine.model.text(ids) != text:
            return
        for key in (_identity(message), _identity(ChatMessage("assistant", text))):
            self._said[key] = (text, ids)
            self._said.move_to_end(key)
        while len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)


def _identity(message: ChatMessage) -> bytes:
    """What an answer is known by, however its JSON is written."""
    calls = [[call.name, call.arguments] for call in message.calls]
    return blake2b(json.dumps([message.text.strip(), calls], sort_keys=True).encode(), digest_size=16).digest()

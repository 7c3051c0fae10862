"""Replay: the state of a conversation, computed from the entries of its transcript."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpucache.engine.first_prompt import FirstPrompt, load_spans, tokens_of
from cpucache.engine.host import Host
from cpucache.layout import Tokens, Turns
from cpucache.layout.vocabulary import empty, joined
from cpucache.reuse import History, Span
from cpucache.sessions import Entry


@dataclass
class State:
    """State of a conversation after some of its entries, which its next turn continues."""

    history: History
    turns: Turns
    """State of the chat template."""
    pending: Tokens
    """Tokens of these entries that have not been evaluated yet."""
    asks: bool
    """Whether an answer is due."""

    def copy(self) -> State:
        """Independent copy of this state."""
        return State(self.history.copy(), copy.copy(self.turns), self.pending, self.asks)


class Replay:
    """Computes states of one conversation.

    Args:
        host: Model, store and core.
        first_prompt: PML prompt that the conversation starts with now. That of a conversation that has begun is in its
            transcript.
    """

    def __init__(self, host: Host, first_prompt: FirstPrompt | None = None) -> None:
        self._host = host
        self._first_prompt: Sequence[Span] = first_prompt.spans if first_prompt else ()

    def state(self, entries: Sequence[Entry]) -> State:
        """The state of the conversation after ``entries``, which are all or the first ones."""
        host = self._host
        history = History(host.slices, movable=host.context.memory.moves)
        turns = Turns(host.template, host.model)
        # An empty conversation begins with the BOS token.
        pending = empty() if host.model.bos is None else np.array([host.model.bos], np.int32)
        asks = False
        for index, entry in enumerate(entries):
            pieces = entry.pieces
            if index == 0 and entry.role in ("system", "prompt"):
                history.fixed = 1
            history.leave_out(entry.left_out)
            turns.begun, asks = True, entry.role == "user"
            if entry.role == "prompt":
                self._first_prompt = self._first_prompt or self._reopened(pieces)
                history.add(self._first_prompt)
                turns.role, turns.open, asks = pieces["role"], pieces["open"], pieces["asks"]
                pending = empty()
                continue
            number = sum(other.role == "user" for other in entries[: index + 1])
            self._add(history, pieces, f"turn {number}")
            pending = np.array(pieces["pending"], np.int32)
            turns.role = "system" if entry.role == "system" else "assistant"
            turns.open = entry.role != "system"
        return State(history, turns, pending, asks)

    def system_entry(self, text: str) -> Entry:
        """The transcript entry of a system text that starts the conversation."""
        start = self.state(())
        tokens = joined([start.pending, start.turns.turn("system", text)])
        parts = [slice_.tokens.tolist() for slice_ in self._host.slices.cut((), tokens)]
        return Entry("system", text, {"parts": parts, "pending": []}, metrics={"tokens": len(tokens)})

    def _add(self, history: History, pieces: Any, module: str) -> None:
        """Adds an entry of the transcript to a history, as exact slices of its tokens if the store lacks its own."""
        if "parts" in pieces:
            history.add_tokens([np.array(part, np.int32) for part in pieces["parts"]], module)
        elif spans := self._saved(pieces):
            history.add_saved(spans)
        else:
            history.add(block.span for block in self._host.slices.cut(history.spans, tokens_of(pieces), module))

    def _saved(self, pieces: Any) -> list[Span] | None:
        """The spans of an entry from the transcript; ``None`` when the store lacks one of their slices."""
        spans = load_spans(pieces["spans"])
        loaded = self._host.kv_cache.loaded([span.slice for span in spans if span.slice])
        return spans if all(slice_.key in self._host.store for slice_ in loaded) else None

    def _reopened(self, pieces: Any) -> list[Span]:
        """The spans of the first prompt from the transcript; exact slices of its tokens if the store lacks its own."""
        if "segments" not in pieces and (spans := self._saved(pieces)):
            return spans
        return [block.span for block in self._host.slices.cut((), tokens_of(pieces), "first_prompt")]


def same_start(begun: Entry, first: Entry) -> bool:
    """Whether two first entries of conversations have the same role and tokens."""
    # Compares tokens, not slices: the store may have gained or lost slices since the conversation began.
    return begun.role == first.role and np.array_equal(tokens_of(begun.pieces), tokens_of(first.pieces))

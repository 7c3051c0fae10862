"""Spans of a conversation in its transcript: saved as tokens and slices, so that replay needs no schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cpucache.layout import Tokens, Turns
from cpucache.layout.vocabulary import joined
from cpucache.reuse import Slice, Span
from cpucache.sessions import Entry


class FirstPrompt(NamedTuple):
    """A PML prompt that starts a conversation."""

    spans: Sequence[Span]
    """Its spans. Each has a slice."""
    turns: Turns
    """State of the chat template after the prompt."""
    asks: bool
    """Whether the prompt ends with a message of the user, which needs an answer."""
    text: str
    """Text of its entry in the transcript: the name of its schema."""

    @property
    def entry(self) -> Entry:
        """The transcript entry of the prompt."""
        state = {"role": self.turns.role, "open": self.turns.open, "asks": self.asks}
        size = sum(len(span.tokens) for span in self.spans)
        return Entry("prompt", self.text, {"spans": dump_spans(self.spans), **state}, metrics={"tokens": size})


def dump_spans(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The spans with a slice as JSON values; other spans are left out."""
    return [
        {
            "at": span.start,
            "count": len(span.tokens),
            "relation": span.relation,
            "key": span.slice.key,
            "tokens": span.slice.tokens.tolist(),
            "start": span.slice.start,
            "context": span.slice.context_key,
            "attends_to": [text.hex() for text in span.slice.attends_to],
            "attended_tokens": span.slice.attended_tokens,
            "module": span.slice.module,
        }
        for span in spans
        if span.slice
    ]


def dump_pieces(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans of an entry as JSON values.

    Exact slices follow from their tokens, so an entry of exact spans is saved as tokens only.
    """
    if all(span.relation == "exact" for span in spans):
        return {"parts": [span.tokens.tolist() for span in spans]}
    return {"spans": dump_spans(spans)}


def load_spans(dumped: Sequence[dict[str, Any]]) -> list[Span]:
    """The spans that ``dump_spans`` returned as JSON values. Their slices can be spliced, but not encoded again."""
    spans = []
    for each in dumped:
        attends_to = tuple(bytes.fromhex(text) for text in each["attends_to"])
        tokens = np.array(each["tokens"], np.int32)
        slice_ = Slice(
            each["key"], tokens, each["start"], each["context"], attends_to, each["attended_tokens"], each["module"]
        )
        spans.append(Span(each["at"], tokens[: each["count"]], slice_, each["relation"]))
    return spans


def tokens_of(pieces: dict[str, Any]) -> Tokens:
    """Tokens of an entry of a conversation, without its pending ones, in this JSON format or an earlier one."""
    if "parts" in pieces:
        return joined([np.array(part, np.int32) for part in pieces["parts"]])
    if "segments" in pieces:
        parts = [pieces["segments"][number]["tokens"][:count] for number, _, count, _ in pieces["spans"]]
    else:
        parts = [each["tokens"][: each["count"]] for each in pieces["spans"]]
    return joined([np.array(part, np.int32) for part in parts])

"""Which tokens of a slice to evaluate afresh, when a share of them may be: a rule, after what was measured.

CacheBlend picks the tokens whose keys and values are furthest from what they should be, layer by layer. llama.cpp's
public interface evaluates whole tokens or none, so the rule has to know beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Protocol

from cpucache.layout.segment import Runs, Segment


class Pieces(Protocol):
    """The one thing that rules ask of a model."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""


def first_tokens(share: float) -> Callable[[Segment], Runs]:
    """The first tokens of each slice."""
    return lambda segment: ((0, math.ceil(share * len(segment.tokens))),)


def sentence_starts(model: Pieces, share: float) -> Callable[[Segment], Runs]:
    """The first tokens of each sentence, equally many of all, and those of the slice itself."""

    @cache
    def ends(token: int) -> bool:
        return model.piece(token).rstrip().endswith((b".", b"!", b"?", b"\n", b":"))

    def choose(segment: Segment) -> Runs:
        tokens = segment.tokens.tolist()
        starts = [0, *(at + 1 for at, token in enumerate(tokens[:-1]) if ends(token))]
        each = max(1, round(share * len(tokens) / len(starts)))
        budget = math.ceil(share * len(tokens))
        chosen = starts[: max(1, budget // each)]
        return tuple((at, min(at + each, len(tokens))) for at in chosen)

    return choose


def rare_tokens(share: float) -> Callable[[Segment], Runs]:
    """The rarest tokens: vocabularies are numbered by how common their words are, by and large."""

    def choose(segment: Segment) -> Runs:
        count = math.ceil(share * len(segment.tokens))
        rarest = sorted(segment.tokens.argsort(kind="stable")[::-1][:count].tolist())
        return tuple((at, at + 1) for at in rarest)

    return choose

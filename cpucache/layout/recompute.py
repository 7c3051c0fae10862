"""Which tokens of a slice to evaluate afresh, when a share of them may be.

CacheBlend picks the tokens whose keys and values are furthest from what they should be, layer by layer. llama.cpp's
public interface evaluates whole tokens or none, so which ones has to be known beforehand. Of the rules that were tried
(the first tokens, those that sentences begin with, the last, the rarest, those whose keys and values another text
before them moves most) this one brings answers nearest; bench/RESULTS.md has the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cpucache.layout.segment import Runs, Segment


def rare_tokens(share: float) -> Callable[[Segment], Runs]:
    """The rarest tokens of each slice: the higher a token's number, the rarer, for vocabularies are learned that way.

    ``share``: how many of them, from 0 to 1.
    """

    def choose(segment: Segment) -> Runs:
        count = math.ceil(share * len(segment.tokens))
        rarest = sorted(segment.tokens.argsort(kind="stable")[::-1][:count].tolist())
        return tuple((at, at + 1) for at in rarest)

    return choose

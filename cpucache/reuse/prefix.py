"""Prefixes: what is known of a text from its first token on, however it was cut when it was evaluated."""

from __future__ import annotations

from cpucache.layout import Tokens
from cpucache.reuse.slices import Plan, Slices, Span, Trail
from cpucache.store import Store


def plan_text(slices: Slices, store: Store, tokens: Tokens) -> Plan:
    """The plan of a text: the longest known slice behind all before it, again and again, then blocks to be made.

    Each slice is exact. The last token is evaluated in any case.
    """
    spans: list[Span] = []
    trail = Trail()
    left = tokens[:-1]
    while len(left):
        for size in sorted((size for size in store.sizes_behind(trail.key) if size <= len(left)), reverse=True):
            known = slices.make(spans, left[:size], trail=trail)
            if known.key in store:
                break
        else:
            break
        spans.append(known.span)
        trail.add(known.span)
        left = left[size:]
    return slices.plan(spans, tokens[trail.end :])

"""What may happen to a file, as a strategy of hypothesis, and how often fuzz tests let it happen."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONGER = int(os.environ.get("CPUCACHE_LONGER", "1"))
"""How many times as many examples fuzz tests try; `make stress` sets it."""


def tries(examples: int) -> settings:
    """Settings of a fuzz test: so many examples, however long one takes."""
    return settings(
        max_examples=examples * LONGER,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def changes() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Bytes overwritten, cut out, put in or repeated, and the end cut off."""
    fraction, data = st.floats(0, 1), st.binary(max_size=40)

    def change(kind: str, at: float, new: bytes) -> Callable[[bytes], bytes]:
        def apply(good: bytes) -> bytes:
            i = int(at * len(good))
            return {
                "overwrite": good[:i] + new + good[i + len(new) :],
                "insert": good[:i] + new + good[i:],
                "cut": good[:i] + good[i + len(new) :],
                "repeat": good[:i] + good[max(0, i - len(new)) :],
                "end": good[:i],
            }[kind]

        return apply

    return st.builds(change, st.sampled_from(["overwrite", "insert", "cut", "repeat", "end"]), fraction, data)

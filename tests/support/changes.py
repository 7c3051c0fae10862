"""What may happen to a file, as a strategy of hypothesis."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st


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

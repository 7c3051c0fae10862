"""Names for slices, made from all that decides their bytes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash


def slice_key(model: str, state_format: str, context: str, tokens: npt.NDArray[np.int32], start: int) -> str:
    """32 hexadecimal digits that name the state of ``tokens`` from position ``start``.

    ``model`` is the fingerprint of the weights, ``state_format`` what the bytes of a state depend on besides (types,
    version of llama.cpp), ``context`` the ``context_key`` of what the tokens attended to.
    """
    digest = xxhash.xxh3_128()
    for part in (model, state_format, context, str(start)):
        # Each part ends in a byte that none contains, so that no two lists of parts run together.
        digest.update(part.encode() + b"\0")
    digest.update(np.ascontiguousarray(tokens, "<i4").tobytes())
    return digest.hexdigest()


def context_key(
    slices: Iterable[tuple[str, int, int, tuple[tuple[int, int], ...]]], lead: npt.NDArray[np.int32] | None = None
) -> str:
    """The key of a context: of the slices that could be attended to, in order, and of the tokens behind them.

    Each comes as its key, the position where it stood then, how many of its tokens were there, and which ranges of them
    had been evaluated afresh there. ``lead`` are tokens that could be attended to besides, and have no slice.
    """
    digest = xxhash.xxh3_128()
    for key, start, count, renewed in slices:
        digest.update(f"{key}/{start}/{count}/{renewed}\0".encode())
    if lead is not None and len(lead):
        digest.update(b"lead\0" + np.ascontiguousarray(lead, "<i4").tobytes())
    return digest.hexdigest()

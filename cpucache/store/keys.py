"""Names for slices, made from all that decides their bytes, by a cryptographic hash (BLAKE2b of 128 bits).

A collision would splice the state of another text, so that whoever can choose text must not be able to find one.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
TEXT_ID = 8
"""Bytes of a ``text_id``."""


def slice_key(model: str, state_format: str, context: str, tokens: Ids, start: int) -> str:
    """32 hexadecimal digits that name the state of ``tokens`` from position ``start``.

    ``model`` is the fingerprint of the weights, ``state_format`` what the bytes of a state depend on besides (types,
    version of llama.cpp), ``context`` the key of what the tokens attended to.
    """
    return _digest(_bytes(tokens), model, state_format, context, str(int(start)))


def content_key(model: str, state_format: str, tokens: Ids) -> str:
    """32 hexadecimal digits that all slices of these tokens have in common, whatever their contexts and positions."""
    return _digest(_bytes(tokens), model, state_format)


def text_id(tokens: Ids) -> bytes:
    """``TEXT_ID`` bytes that stand for a run of tokens in the account of what a slice attended to."""
    return blake2b(_bytes(tokens), digest_size=TEXT_ID).digest()


def _digest(data: bytes, *parts: str) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        # Each part ends in a byte that none contains, so that no two lists of parts run together.
        digest.update(part.encode() + b"\0")
    digest.update(data)
    return digest.hexdigest()


def _bytes(tokens: Ids) -> bytes:
    return np.ascontiguousarray(tokens, "<i4").tobytes()

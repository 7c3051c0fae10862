"""Keys of slices: a cryptographic hash (BLAKE2b, 128 bits) of everything that the bytes of a slice depend on.

The hash is cryptographic because a collision would splice the state of another text: whoever can choose text must not
be able to find one.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
TEXT_ID = 8
"""Length of a ``text_id``, in bytes."""


def slice_key(model: str, state_format: str, context: str, tokens: Ids, start: int) -> str:
    """Key of a slice.

    Args:
        model: Fingerprint of the model's file.
        state_format: What the bytes of a state depend on besides the model: types, version of llama.cpp.
        context: Key of the context that the tokens attended to.
        tokens: Token ids, ``[n_tokens]``.
        start: Position of the first token.

    Returns:
        32 hexadecimal digits.
    """
    return _digest(_bytes(tokens), model, state_format, context, str(int(start)))


def content_key(model: str, state_format: str, tokens: Ids) -> str:
    """Key that all slices of these tokens share, whatever their contexts and positions: 32 hexadecimal digits."""
    return _digest(_bytes(tokens), model, state_format)


def text_id(tokens: Ids) -> bytes:
    """Hash of a run of tokens, ``TEXT_ID`` bytes long, for ``SliceInfo.attends_to``."""
    return blake2b(_bytes(tokens), digest_size=TEXT_ID).digest()


def _digest(data: bytes, *parts: str) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        # Each part ends with a byte that no part contains, so different lists of parts never give the same bytes.
        digest.update(part.encode() + b"\0")
    digest.update(data)
    return digest.hexdigest()


def _bytes(tokens: Ids) -> bytes:
    return np.ascontiguousarray(tokens, "<i4").tobytes()

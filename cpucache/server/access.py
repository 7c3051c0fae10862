"""Access: who may ask, and what each has for himself."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import blake2b

from fastapi import Request

from cpucache.server.failures import Refusal


def namespace_of(key: str) -> str:
    """What slices and schemas of an API key are kept under: a hash, which does not give the key away."""
    return blake2b(key.encode(), digest_size=16, person=b"cpucache").hexdigest()


class Keys:
    """The API keys of a server.

    Args:
        keys: Any of them is enough. Without any, nobody is asked.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [(key.encode(), namespace_of(key)) for key in keys]

    def check(self, request: Request) -> str:
        """The namespace of a request by the key that it shows; empty without keys. Raises ``Refusal`` (401)."""
        if not self._keys:
            return ""
        headers = request.headers
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        shown = given.encode("latin-1")  # the bytes that were sent
        found = ""
        # All are compared, each in the same time, whatever is shown.
        for key, namespace in self._keys:
            if hmac.compare_digest(shown, key):
                found = namespace
        if not found:
            raise Refusal(401, "the API key is missing, or not the server's", code="invalid_api_key")
        return found

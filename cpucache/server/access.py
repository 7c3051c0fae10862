"""Access: API keys, and the namespace that belongs to each."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import blake2b

from fastapi import Request

from cpucache.server.failures import Refusal


def namespace_of(key: str) -> str:
    """Namespace of an API key's slices and schemas: a hash, from which the key can't be recovered."""
    return blake2b(key.encode(), digest_size=16, person=b"cpucache").hexdigest()


def shown_key(request: Request) -> str:
    """Returns the API key that a request shows, ``""`` if it shows none. ``x-api-key`` takes precedence."""
    headers = request.headers
    return headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")


class Keys:
    """The API keys of a server.

    Args:
        keys: Keys of which a request must show one. If there are none, every request is let in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [(key.encode(), namespace_of(key)) for key in keys]

    def check(self, request: Request) -> str:
        """Returns the namespace of the key that a request shows, ``""`` on a server without keys.

        Raises ``Refusal`` (401) if the key is missing or unknown.
        """
        if not self._keys:
            return ""
        shown = shown_key(request).encode("latin-1")  # the bytes as they were sent
        found = ""
        # Every key is compared, each in constant time: response times must not reveal a key.
        for key, namespace in self._keys:
            if hmac.compare_digest(shown, key):
                found = namespace
        if not found:
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")
        return found

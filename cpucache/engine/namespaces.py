"""The namespaces of an engine: a KV cache for each, on one llama.cpp context and one store."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

from cpucache.errors import InputError
from cpucache.reuse import KVCache, Slices


class Namespaces:
    """The KV caches of one engine: its own, and one for each namespace. May be used from several threads.

    Args:
        kv_cache: The KV cache that belongs to no namespace.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self._lock = threading.Lock()
        self._kv_caches = {_space(kv_cache.slices): kv_cache}

    def __iter__(self) -> Iterator[KVCache]:
        with self._lock:
            return iter(list(self._kv_caches.values()))

    def within(self, kv_cache: KVCache, namespace: str, *, isolate: bool) -> KVCache:
        """Returns the KV cache of a namespace, the same one for each call.

        Args:
            kv_cache: The KV cache that the namespace shares exact slices with.
            namespace: Name of 1 to 64 letters, digits, ``-`` and ``_``.
            isolate: Whether to share no slices at all.

        Raises:
            InputError: The name has other characters, or is too long.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", namespace):
            raise InputError(f"namespace={namespace!r:.80}: must be at most 64 letters, digits, - or _")
        slices = kv_cache.slices.within(namespace, isolate=isolate)
        with self._lock:
            return self._kv_caches.setdefault(_space(slices), kv_cache.within(slices))


def _space(slices: Slices) -> tuple[str, str]:
    """What distinguishes the KV caches of one engine: which slices they share, and which they find by content."""
    return slices.state_format, slices.scope

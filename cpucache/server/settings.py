"""Settings of a server."""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.engine import Reuse

MAX_TOKENS = 1024
"""Tokens of an answer to a request that does not say how many."""


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows its clients."""

    api_keys: tuple[str, ...] = ()
    """What clients must show one of, as ``Authorization: Bearer`` or ``x-api-key``."""
    isolate: bool = False
    """Whether keys share no slices, not even those that are exact."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]", "testserver")
    """Names that the Host header may have: others come from a page that resolved its own name to this machine."""
    queue: int = 64
    """Requests that may wait for their turn."""
    timeout: float = 600.0
    """Seconds that a request may take."""
    max_body: int = 32 << 20
    """Bytes of a request at most."""
    max_schemas: int = 100
    """Schemas that each key may upload."""
    max_schema_bytes: int = 64 << 20
    """Characters of all of them."""
    max_tokens: int = MAX_TOKENS
    reuse: Reuse = "schema"
    """Which slices prompts may take that do not say so themselves, see ``Engine.plan``."""
    sorted_tools: bool = True
    """Whether tools are told to the model in the order of their names, whatever order they were sent in."""

"""Settings of a server."""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.engine import Reuse

MAX_TOKENS = 1024
"""Tokens of an answer at most, if the request sets no limit."""


@dataclass(frozen=True)
class ServerSettings:
    """Limits and options of a server."""

    api_keys: tuple[str, ...] = ()
    """Keys of which clients must send one, as ``Authorization: Bearer`` or ``x-api-key``. Empty: none is needed."""
    isolate: bool = False
    """Whether keys share no slices. Otherwise they share exact slices only."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]", "testserver")
    """Names that the Host header may have; if empty, any. Others are refused: they may come from DNS rebinding."""
    queue: int = 64
    """Number of requests that may wait for admission, and of waiting background jobs."""
    timeout: float = 600.0
    """Seconds that a request may wait for admission, and again that its answer may take."""
    max_body: int = 32 << 20
    """Size of a request body at most."""
    max_schemas: int = 100
    """Number of schemas that each key may upload."""
    max_schema_bytes: int = 64 << 20
    """Length of the texts of a key's schemas together, in bytes as UTF-8."""
    max_tokens: int = MAX_TOKENS
    reuse: Reuse = "schema"
    """Which slices a prompt may take if the request does not say, see ``Engine.plan``."""
    sorted_tools: bool = True
    """Whether tools are sorted by name before they are rendered, so that their order does not change the prompt."""

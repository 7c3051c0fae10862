"""The public classes for applications that embed an engine."""

from cpucache.engine.ahead import Preparation, TypingAhead
from cpucache.engine.engine import Engine
from cpucache.engine.reply import Metrics, Reply
from cpucache.engine.session import Session
from cpucache.engine.stream import Stream
from cpucache.reuse import Fidelity, Reuse
from cpucache.runtime import Sampling

__all__ = [
    "Engine",
    "Fidelity",
    "Metrics",
    "Preparation",
    "Reply",
    "Reuse",
    "Sampling",
    "Session",
    "Stream",
    "TypingAhead",
]

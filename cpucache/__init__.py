"""cpucache: long, repetitive prompts answered at once on an ordinary CPU, from KV state slices of llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpucache.errors import ContextFull, CpucacheError, InputError, ModelError, PMLError

if TYPE_CHECKING:
    from cpucache.authoring import MaxTokens, assistant, prompt, system, user
    from cpucache.engine import Engine, Fidelity, Metrics, Reply, Sampling, Session, Stream

__version__ = "0.1.0"
__all__ = [
    "ContextFull",
    "CpucacheError",
    "Engine",
    "Fidelity",
    "InputError",
    "MaxTokens",
    "Metrics",
    "ModelError",
    "PMLError",
    "Reply",
    "Sampling",
    "Session",
    "Stream",
    "__version__",
    "assistant",
    "prompt",
    "system",
    "user",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the engine loads llama.cpp, which `cpucache --help` and the PML parser don't need.
    if name in {"Engine", "Fidelity", "Metrics", "Reply", "Sampling", "Session", "Stream"}:
        import cpucache.engine

        return getattr(cpucache.engine, name)
    if name in {"MaxTokens", "assistant", "prompt", "system", "user"}:
        import cpucache.authoring

        return getattr(cpucache.authoring, name)
    raise AttributeError(f"module 'cpucache' has no attribute '{name}'")

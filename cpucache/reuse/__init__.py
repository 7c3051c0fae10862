"""Reuse of KV state: looks slices up, builds missing ones (encoder), and splices them into a llama.cpp context."""

from cpucache.reuse.fidelity import DEFAULT, LEVELS, REUSES, Fidelity, Level, Reuse
from cpucache.reuse.history import History
from cpucache.reuse.kv_cache import KVCache
from cpucache.reuse.lookup import Lookup
from cpucache.reuse.plan import Plan, Slice, Span
from cpucache.reuse.progress import OnProgress
from cpucache.reuse.reading import reading, scaffolded
from cpucache.reuse.refine import asked, refine, text_parts
from cpucache.reuse.repair import Repair
from cpucache.reuse.reports import Encoded, Metrics
from cpucache.reuse.slices import Slices
from cpucache.reuse.text import PlanText, plan_text

__all__ = [
    "DEFAULT",
    "LEVELS",
    "REUSES",
    "Encoded",
    "Fidelity",
    "History",
    "KVCache",
    "Level",
    "Lookup",
    "Metrics",
    "OnProgress",
    "Plan",
    "PlanText",
    "Repair",
    "Reuse",
    "Slice",
    "Slices",
    "Span",
    "asked",
    "plan_text",
    "reading",
    "refine",
    "scaffolded",
    "text_parts",
]

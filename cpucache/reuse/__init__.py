"""Reuse: slices made (encoder), put into a context (splicer), and the two brought together for a plan (workspace)."""

from cpucache.reuse.encoder import Encoder
from cpucache.reuse.splicer import Splicer
from cpucache.reuse.workspace import Prefill, Workspace

__all__ = ["Encoder", "Prefill", "Splicer", "Workspace"]

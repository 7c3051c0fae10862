"""Reuse: slices made (encoder), put into a context (splicer), and the two brought together for a plan (workspace)."""

from cpucache.reuse.encoder import Encoder
from cpucache.reuse.progress import OnProgress
from cpucache.reuse.splicer import Splicer
from cpucache.reuse.workspace import Encoded, Prefill, Workspace

__all__ = ["Encoded", "Encoder", "OnProgress", "Prefill", "Splicer", "Workspace"]

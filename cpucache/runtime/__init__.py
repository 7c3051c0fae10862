"""The only room that touches llama.cpp: a model, one context of KV cells, sampling, and what the machine offers."""

from cpucache.runtime.context import Batch, Context, KVType, Run, Stopped
from cpucache.runtime.hardware import Hardware, hardware
from cpucache.runtime.memory import Memory
from cpucache.runtime.model import Model
from cpucache.runtime.sampler import Sampler, Sampling

__all__ = [
    "Batch",
    "Context",
    "Hardware",
    "KVType",
    "Memory",
    "Model",
    "Run",
    "Sampler",
    "Sampling",
    "Stopped",
    "hardware",
]

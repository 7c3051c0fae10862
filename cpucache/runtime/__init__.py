"""The only package that calls llama.cpp: model, llama.cpp context, sampling, and detection of the hardware."""

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

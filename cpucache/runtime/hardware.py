"""Hardware of this machine, and the defaults for threads and GPU layers that follow from it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from cpucache.runtime import llama
from cpucache.runtime.llama import api


@dataclass(frozen=True)
class Hardware:
    """Properties of the machine. Memory is in bytes, as psutil counts it."""

    cpu: str
    physical_cores: int
    logical_cores: int
    threads: int
    memory_total: int
    memory_available: int
    gpu_offload: bool
    features: tuple[str, ...]
    llama_cpp: str


def hardware() -> Hardware:
    """Returns the machine's properties. Only the available memory changes between calls."""
    memory = psutil.virtual_memory()
    return Hardware(
        cpu=_cpu_name(),
        physical_cores=psutil.cpu_count(logical=False) or usable_cores(),
        logical_cores=psutil.cpu_count() or 1,
        threads=default_threads(),
        memory_total=memory.total,
        memory_available=memory.available,
        gpu_offload=gpu_offload(),
        features=_features(),
        llama_cpp=llama.version(),
    )


def usable_cores() -> int:
    """Number of logical cores that this process may run on; a container or ``taskset`` may allow fewer than exist."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Number of usable physical cores: a second thread on a core shares its arithmetic units and slows it down."""
    return max(1, min(psutil.cpu_count(logical=False) or usable_cores(), usable_cores()))


def gpu_offload() -> bool:
    """Whether llama.cpp supports offloading layers (``llama_supports_gpu_offload``)."""
    llama.start()
    return bool(api.llama_supports_gpu_offload())


def gpu_layers(setting: int | str) -> int:
    """``n_gpu_layers`` (llama.h) for ``"auto"`` or a number: -1 for all layers, 0 for none or without offloading."""
    if setting == "auto":
        return -1 if gpu_offload() else 0
    return int(setting) if gpu_offload() else 0


@cache
def _features() -> tuple[str, ...]:
    """Instruction sets that llama.cpp uses, from ``llama_print_system_info`` (``AVX512 = 1 | …``)."""
    llama.start()
    text = api.llama_print_system_info().decode("utf-8", "replace")
    pairs = (item.rpartition(":")[2].partition("=") for item in text.split("|"))
    return tuple(name.strip() for name, _, value in pairs if value.strip() == "1")


@cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def on_mains() -> bool:
    """Whether the machine runs on mains power; true if no battery is found."""
    sensors = getattr(psutil, "sensors_battery", None)  # not on every platform
    battery = sensors() if sensors else None
    return battery is None or bool(battery.power_plugged)

"""``cpucache info``: what this machine offers and what is used of it."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal
from rich.table import Table

import cpucache
from cpucache.cli.console import out
from cpucache.models import models_dir
from cpucache.runtime import hardware
from cpucache.store import default_home


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show what this machine offers, what is used of it, and why."""
    facts = _facts()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("cpucache", f"{facts['cpucache']} on Python {facts['python']}"),
        ("llama.cpp", f"llama-cpp-python {facts['llama_cpp']}"),
        ("CPU", f"{facts['cpu']}, {facts['physical_cores']} cores ({facts['logical_cores']} threads)"),
        ("  used", f"{facts['threads']} threads: {_why(facts)}"),
        ("  features", ", ".join(facts["features"])),
        ("memory", f"{decimal(facts['memory_total'])}, {decimal(facts['memory_available'])} free"),
        ("GPU", _gpu(facts["gpu_offload"])),
        ("flash attention", "auto" if facts["gpu_offload"] else "off: on a CPU it slows cached prompts down"),
        (
            "store",
            f"{facts['store']}: {decimal(facts['store_bytes'])}, {decimal(facts['store_free'])} free on its disk",
        ),
        ("models", facts["models"]),
    ):
        table.add_row(f"[dim]{name}[/dim]", str(value))
    out.print(table, soft_wrap=True)


def _why(facts: dict[str, Any]) -> str:
    if facts["threads"] < facts["physical_cores"]:
        return "the cores that this process may use"
    return "one for each physical core; more threads would share the same arithmetic units"


def _gpu(offload: bool) -> str:
    if offload:
        return "all layers are offloaded (--gpu-layers auto); --gpu-layers 0 uses the CPU only"
    return "none used: this build of llama.cpp has no GPU backend, or finds no device"


def _facts() -> dict[str, Any]:
    machine = hardware()
    home = default_home()
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    return {
        "cpucache": cpucache.__version__,
        "python": platform.python_version(),
        "llama_cpp": machine.llama_cpp,
        "cpu": machine.cpu,
        "physical_cores": machine.physical_cores,
        "logical_cores": machine.logical_cores,
        "threads": machine.threads,
        "features": list(machine.features),
        "memory_total": machine.memory_total,
        "memory_available": machine.memory_available,
        "gpu_offload": machine.gpu_offload,
        "store": str(home),
        "store_bytes": _size(home),
        "store_free": shutil.disk_usage(there).free,
        "models": str(models_dir()),
    }


def _size(folder: Path) -> int:
    """Returns the bytes of all files below a folder. Other processes may delete some meanwhile."""
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += file.stat().st_size if file.is_file() else 0
    return size

"""Bytes a token, speed, and divergence from f16 for each type of keys and values, in the context and on disk.

python bench/kv_types.py MODEL [--tokens 1000] [--json FILE]

For each type, one engine encodes a schema and answers from RAM. New engines then answer from disk, with the files in
the page cache (``disk``) and without (``cold``).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from cpucache import Engine
from cpucache.bench.text import filler_prompt, filler_schema
from cpucache.runtime import KVType
from cpucache.runtime.packing import AtRest

_SETTINGS: tuple[tuple[KVType, str, AtRest], ...] = (
    ("f16", "off", "f16"),
    ("f16", "off", "q8_0"),
    ("f16", "off", "q4_0"),
    ("q8_0", "off", "f16"),
    ("f16", "on", "f16"),
    ("q8_0", "on", "f16"),
)
_MODULES, _QUESTION = 4, 12


def _uncached(folder: Path) -> None:
    """Removes every slice file from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    model: str, tokens: int, repeat: int, settings: tuple[KVType, str, AtRest], folder: Path
) -> tuple[dict[str, Any], np.ndarray[Any, np.dtype[np.float64]]]:
    """Measures one type of keys and values.

    Args:
        model: Name in the catalogue, or path of a model.
        tokens: Tokens of the schema.
        repeat: Number of answers of each kind.
        settings: Type in the context, flash attention, and type on disk.
        folder: Folder of the store.

    Returns:
        Measurements by name, and log probabilities ``[n_vocab]`` of the first token of an answer from disk.
    """
    kv_type, flash, at_rest = settings
    given: dict[str, Any] = {"store": folder, "kv_type": kv_type, "flash": flash, "at_rest": at_rest}
    given["n_ctx"] = tokens + 256
    with Engine(model, **given) as engine:
        schema = filler_schema(engine, tokens, _MODULES)
        prompt = filler_prompt(engine, range(_MODULES), _QUESTION)
        engine.add_schema(schema)
        encoded = engine.encode("bench")
        memory = []
        for _ in range(repeat + 1):
            engine.forget()
            memory.append(engine.generate(prompt, max_tokens=1).metrics.ttft_ms)
        engine.store.flush()
        kept = engine.store.kept([slice_.key for slice_ in encoded.wanted])
    disk: dict[str, list[float]] = {"disk": [], "cold": []}
    for _ in range(repeat):
        for where, times in disk.items():
            if where == "cold":
                _uncached(folder)
            with Engine(model, **given) as engine:
                engine.add_schema(schema)
                engine.warm_up()
                times.append(engine.generate(prompt, max_tokens=1).metrics.ttft_ms)
                logits = engine.context.logits().astype(np.float64)
                if len(times) == repeat:
                    tpot = engine.generate(prompt, max_tokens=24).metrics.tpot_ms
    row = {
        "keys": kv_type,
        "flash": flash,
        "at_rest": at_rest,
        "bytes_per_token": round(kept.bytes / encoded.tokens),
        "ram_ms": round(median(memory[1:]), 1),
        "disk_ms": round(median(disk["disk"]), 1),
        "cold_disk_ms": round(median(disk["cold"]), 1),
        "tpot_ms": round(tpot, 1),
    }
    return row, logits - np.logaddexp.reduce(logits)


@click.command()
@click.argument("model")
@click.option("--tokens", default=1000, show_default=True, help="Tokens cached, in 4 modules.")
@click.option("--repeat", default=5, show_default=True, help="Answers of each kind; their median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all measurements to this file.")
def main(model: str, tokens: int, repeat: int, file: Path | None) -> None:
    """Compare types of keys and values on MODEL (a name of the catalogue or a path)."""
    reference = None
    rows = []
    for settings in _SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            row, logprobs = measure(model, tokens, repeat, settings, Path(folder))
        reference = logprobs if reference is None else reference
        row["kl"] = round(float((np.exp(reference) * (reference - logprobs)).sum()), 6)
        rows.append(row)
        click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
    if file:
        file.write_text(
            json.dumps({"model": model, "tokens": tokens, "types": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()

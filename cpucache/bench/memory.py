"""Peak memory: a process with llama.cpp only, against a process that encodes a schema and answers from slices.

``python -m cpucache.bench.memory plain|cached MODEL N_CTX TOKENS MODULES`` prints one JSON object. Each measurement
needs a process of its own, because a process can't reset its peak resident set.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from cpucache.bench.text import filler_prompt, filler_schema
from cpucache.engine import Engine
from cpucache.errors import CpucacheError
from cpucache.runtime import Context, Model, Run


def compare_memory(model: str, *, n_ctx: int, tokens: int, modules: int) -> dict[str, int]:
    """Measures peak memory in two processes.

    Args:
        model: Path of the model.
        n_ctx: Cells of the llama.cpp context.
        tokens: Tokens of the schema.
        modules: Modules of the schema.

    Returns:
        Bytes: ``plain`` (llama.cpp only), ``cached``, its ``slices``, and the rest of the difference, ``overhead``.

    Raises:
        CpucacheError: One of the processes fails.
    """
    plain, cached = (_measured(mode, model, str(n_ctx), str(tokens), str(modules)) for mode in ("plain", "cached"))
    return {
        "plain": plain["peak"],
        "cached": cached["peak"],
        "slices": cached["slices"],
        "overhead": cached["peak"] - plain["peak"] - cached["slices"],
    }


def _measured(*arguments: str) -> dict[str, int]:
    child = subprocess.run(
        [sys.executable, "-m", "cpucache.bench.memory", *arguments], check=False, capture_output=True, text=True
    )
    if child.returncode:
        raise CpucacheError(f"can't measure memory: {child.stderr.strip().rpartition(chr(10))[2] or 'out of memory?'}")
    result: dict[str, int] = json.loads(child.stdout)
    return result


def _plain(path: str, n_ctx: int, tokens: int) -> dict[str, int]:
    with Model(path) as model:
        # llama.cpp's own defaults for one sequence; every buffer is at its largest after the first full micro-batch.
        context = Context(model, n_ctx=n_ctx, sequences=1)
        context.decode([Run(0, 0, np.full(min(tokens, 1024), 100, np.int32))], logits="last")
        context.close()
    return {"peak": _peak()}


def _cached(path: str, n_ctx: int, tokens: int, modules: int) -> dict[str, int]:
    with (
        tempfile.TemporaryDirectory(prefix="cpucache-bench-") as folder,
        Engine(path, n_ctx=n_ctx, store=folder) as engine,
    ):
        engine.add_schema(filler_schema(engine, tokens, modules))
        slices = engine.encode("bench").bytes
        engine.generate(filler_prompt(engine, range(modules), 12), max_tokens=4)
    return {"peak": _peak(), "slices": slices}


def _peak() -> int:
    """Peak resident set of this process, in bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, ru_maxrss includes memory that the parent had when it started this process.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    mode, path, *numbers = sys.argv[1:]
    n_ctx, tokens, modules = (int(number) for number in numbers)
    print(json.dumps(_plain(path, n_ctx, tokens) if mode == "plain" else _cached(path, n_ctx, tokens, modules)))

"""Encoding of a schema: time, speed and size, against one evaluation of the same tokens."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpucache.bench.series import Series
from cpucache.engine import Engine
from cpucache.reuse import Encoded
from cpucache.store import Store


@dataclass
class EncodeReport:
    """Measurements of one schema."""

    model: str
    schema: str
    slices: int = 0
    tokens: int = 0
    """Tokens of all slices."""
    bytes: int = 0
    """State of all slices."""
    encode: Series = field(default_factory=Series)
    """Encoding into an empty store, until the slices are on disk."""
    again: Series = field(default_factory=Series)
    """Encoding once more, with every slice in the store."""
    full: Series = field(default_factory=Series)
    """Full prefill of the schema's text. Empty if it does not fit the llama.cpp context."""

    @property
    def ratios(self) -> dict[str, float]:
        """Encoding relative to full prefill, which is 1.0 at best."""
        return {"encode_to_full": self.encode.median / self.full.median} if self.full.values else {}

    @property
    def tokens_per_second(self) -> float:
        """Tokens encoded a second."""
        return self.tokens / self.encode.median * 1000

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        facts = {name: value for name, value in vars(self).items() if isinstance(value, str | int)}
        series = {name: value for name, value in vars(self).items() if isinstance(value, Series) and value.values}
        return {
            "benchmark": "encode",
            **facts,
            **{name: value.as_dict() for name, value in series.items()},
            "tokens_per_second": round(self.tokens_per_second, 1),
            "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
        }


def measure_encode(engine: Engine, schema: str, *, repeat: int, say: Callable[[str], None]) -> EncodeReport:
    """Encodes a schema into empty stores, and evaluates its text at once, in turn.

    Args:
        engine: An engine that the schema has been added to. Its store is replaced.
        schema: The name of the schema.
        repeat: Runs of each.
        say: Called with a line of progress before each step.
    """
    report = EncodeReport(engine.model.path.stem, schema)
    text = np.concatenate([segment.tokens for segment in engine.planner.layout(schema).segments])
    engine.warm_up()
    with tempfile.TemporaryDirectory(prefix="cpucache-bench-") as folder:
        for run in range(repeat):
            say(f"encoding '{schema}' ({run + 1}/{repeat})")
            engine.use_store(Store(Path(folder) / str(run), ram_budget=1 << 40))
            encoded = _timed(engine, schema, report.encode)
            report.slices, report.tokens, report.bytes = encoded.slices, encoded.tokens, encoded.bytes
            engine.forget()
            _timed(engine, schema, report.again)
            if len(text) < engine.context.n_ctx:
                say(f"full prefill of {len(text):,} tokens ({run + 1}/{repeat})")
                engine.forget()
                report.full.values.append(engine.generate(text, max_tokens=1, use_cache=False).metrics.prefill_ms)
    return report


def _timed(engine: Engine, schema: str, series: Series) -> Encoded:
    """Encode a schema, and note the milliseconds until its slices are on disk."""
    started = time.perf_counter()
    encoded = engine.encode(schema)
    engine.store.flush()
    series.values.append((time.perf_counter() - started) * 1000)
    return encoded

"""Store benchmark: the store against lower bounds: plain copies, plain writes, and answers while nothing is written."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpucache.bench.series import Series
from cpucache.bench.text import filler_prompt, filler_schema
from cpucache.engine import Engine
from cpucache.reuse import OnProgress
from cpucache.reuse.slot import Slot
from cpucache.reuse.work import Task
from cpucache.store import SliceInfo, Store, slice_key
from cpucache.store.ram import Bytes
from cpucache.store.store import WAITING

_MODULES = 4
_ROWS = 100_000
_LOOKUPS = 2_000


@dataclass
class StoreReport:
    """Measurements of the store, of the names in ``measure_store``. ``bytes``: size of the states loaded and saved."""

    bytes: int = 0
    load: Series = field(default_factory=Series)
    copy: Series = field(default_factory=Series)
    save: Series = field(default_factory=Series)
    write: Series = field(default_factory=Series)
    lookup: Series = field(default_factory=Series)
    variants: Series = field(default_factory=Series)
    """Times to look up all slices of some tokens."""
    idle: Series = field(default_factory=Series)
    busy: Series = field(default_factory=Series)

    @property
    def ratios(self) -> dict[str, float]:
        """Main figures: ratios between medians."""
        return {
            "load_to_copy_speed": self.copy.median / self.load.median,
            "save_to_write_speed": self.write.median / self.save.median,
            "busy_to_idle_ttft": self.busy.median / self.idle.median,
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns all measurements for ``--json``."""
        names = ("load", "copy", "save", "write", "lookup", "variants", "idle", "busy")
        return {
            "bytes": self.bytes,
            **{name: getattr(self, name).as_dict() for name in names},
            "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
        }


def measure_store(engine: Engine, *, tokens: int, repeat: int, say: Callable[[str], None]) -> StoreReport:
    """Measures the store in turn with its lower bounds.

    - ``load``: slices from the store into llama.cpp, with nothing in RAM and the files in the page cache.
    - ``copy``: the same bytes from plain memory into llama.cpp.
    - ``save``: slices into the store, until they are on disk.
    - ``write``: the same bytes to plain files, with fsync.
    - ``lookup``: the state of a key, with 100,000 other keys in the index.
    - ``variants``: all slices of some tokens, among these 100,000.
    - ``idle`` and ``busy``: time to first token of a cached prompt, while slices are not, or are, being written.

    Args:
        engine: Engine whose store is replaced for good.
        tokens: Tokens of all slices together.
        repeat: Number of measurements, except for lookups.
        say: Called with a description of each step before it begins.

    Returns:
        The measurements.
    """
    report = StoreReport()
    with tempfile.TemporaryDirectory(prefix="cpucache-bench-") as name:
        folder = Path(name)
        engine.use_store(Store(folder / "store", ram_budget=0))
        engine.add_schema(filler_schema(engine, tokens, _MODULES))
        say(f"encoding {tokens:,} tokens")
        keys = sorted(slice_.key for slice_ in engine.encode("bench").new)
        engine.store.flush()
        states = [np.array(engine.store.get(key)) for key in keys]
        report.bytes = sum(state.nbytes for state in states)
        say(f"loading and saving, {repeat} times")
        store = engine.store
        for turn in range(repeat):
            report.copy.values.append(_timed(_load, engine, states))
            report.load.values.append(_timed(lambda: _load(engine, [store.get(key) for key in keys])))
            report.write.values.append(_timed(_write, folder / f"plain-{turn}", states))
            report.save.values.append(_timed(_save, folder / f"saved-{turn}", states))
        say(f"looking up among {_ROWS:,} slices")
        _fill(store)
        for key in keys * (_LOOKUPS // len(keys)):
            report.lookup.values.append(_timed(store.get, key))
        for number in range(_LOOKUPS):
            report.variants.values.append(_timed(store.variants, [_content(number * (_ROWS // _LOOKUPS))]))
        say(f"answering, {repeat} times, without and with writes at the same time")
        prompt = filler_prompt(engine, range(_MODULES), 12)
        for _ in range(repeat):
            report.idle.values.append(_ttft(engine, prompt))
            with _writing(engine.store, states):
                report.busy.values.append(_ttft(engine, prompt))
        engine.forget()
    return report


def _timed(action: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    action(*arguments)
    return (time.perf_counter() - started) * 1000


def _load(engine: Engine, states: list[Any]) -> None:
    def task(slot: Slot, _: OnProgress) -> Task[None]:
        for state in states:
            engine.context.load(slot.sequence, state)
        yield from engine.kv_cache.reset(slot)

    engine.host.do(task)


def _write(folder: Path, states: list[Bytes]) -> None:
    folder.mkdir()
    for index, state in enumerate(states):
        with (folder / str(index)).open("wb") as file:
            file.write(state.data)
            file.flush()
            os.fsync(file.fileno())


def _save(folder: Path, states: list[Bytes]) -> None:
    store = Store(folder, ram_budget=0)
    for index, state in enumerate(states):
        store.put(*_slice(index, state))
    store.close()


def _slice(index: int, state: Bytes) -> tuple[str, Bytes, Any, SliceInfo]:
    tokens = np.array([index], np.int32)
    info = SliceInfo("bench", "bench", "bench", "", 1, 0, "bench", "context", 1.0)
    return slice_key("bench", "bench", "context", tokens, 0), state, tokens, info


def _fill(store: Store) -> None:
    """Adds rows without files to the index: the time of a lookup must not depend on their number."""
    assert store.index is not None
    row = SliceInfo("rows", "rows", "rows", "", 1, 0, "rows", "context", 1.0, "", "00" * 8 * 20, 2000)
    store.index.add_all((f"{number:032x}", replace(row, content=_content(number)), 1) for number in range(_ROWS))


def _content(number: int) -> str:
    return f"{number:08x}" * 4


def _ttft(engine: Engine, prompt: str) -> float:
    engine.forget()
    return engine.generate(prompt, max_tokens=1).metrics.ttft_ms


@contextmanager
def _writing(store: Store, states: list[Bytes]) -> Iterator[None]:
    """Has as many slices written during the block as may wait for it."""
    number, backlog = time.monotonic_ns() % (1 << 30), 0
    while backlog + max(state.nbytes for state in states) <= WAITING:
        state = states[number % len(states)]
        store.put(*_slice(number, state))
        backlog += state.nbytes
        number += 1
    yield
    store.flush()

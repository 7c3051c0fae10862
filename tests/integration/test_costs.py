"""What encoding is said to have cost: the seconds of each slice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.reuse import Span
from cpucache.runtime import Batch
from cpucache.store import Store
from tests.support.workbench import PLENTY, SLICES, Desk, opened, some_tokens

TinyModel = Callable[..., Path]


class Timed:
    """A KV cache whose context takes a while for every token, and tells how long it was at work."""

    def __init__(self, kv_cache: Desk) -> None:
        self.kv_cache = kv_cache
        self.seconds = 0.0
        self.tokens = 0
        self._evaluate = kv_cache.context.evaluate
        kv_cache.context.evaluate = self._slowly  # type: ignore[method-assign, assignment]

    def _slowly(self, batch: Batch, *arguments: Any) -> None:
        started = time.perf_counter()
        time.sleep(batch.size * 2e-4)
        self._evaluate(batch, *arguments)
        self.seconds += time.perf_counter() - started
        self.tokens += batch.size


@pytest.fixture
def timed(tiny: TinyModel, tmp_path: Path) -> Iterator[Timed]:
    with opened(tiny("llama")) as context, Store(tmp_path, ram_budget=PLENTY) as store:
        yield Timed(Desk(context, store, SLICES))


def recorded(timed: Timed, key: str) -> float:
    """The seconds that the store has of a slice."""
    store = timed.kv_cache.store
    store.flush()
    found = store.files.info(key) if store.files else None
    assert found is not None
    return found[0].seconds


def test_a_slice_costs_what_its_own_tokens_do(timed: Timed) -> None:
    """Not what it takes to get its context back into the slot, whether that is loaded or evaluated."""
    tokens = some_tokens(840)
    written = SLICES.make([Span(0, tokens[:400])], tokens[400:440])
    timed.kv_cache.encode([written])
    assert timed.tokens == 440
    assert recorded(timed, written.key) < 2 * timed.seconds * 40 / 440
    # What the slot holds already is not evaluated, and the rest costs no less for that.
    timed.seconds = 0.0
    more = SLICES.make([Span(0, tokens[:400])], np.concatenate([tokens[400:440], tokens[:10]]))
    timed.kv_cache.encode([more])
    assert timed.tokens == 450
    assert recorded(timed, more.key) > 3 * timed.seconds

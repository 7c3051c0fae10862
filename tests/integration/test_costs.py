"""What encoding is said to have cost: the seconds of each slice and of a report, and the misses of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.reuse import KVCache, Span
from cpucache.runtime import Batch
from cpucache.store import SliceInfo, Store
from cpucache.store.claims import Claims
from tests.support.workbench import PLENTY, SLICES, Desk, chain, cut, opened, slice_of, some_tokens

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
    written = SLICES.create([Span(0, tokens[:400])], tokens[400:440])
    timed.kv_cache.encode([written])
    assert timed.tokens == 440
    assert recorded(timed, written.key) < 2 * timed.seconds * 40 / 440
    # What the slot holds already is not evaluated, and the rest costs no less for that.
    timed.seconds = 0.0
    more = SLICES.create([Span(0, tokens[:400])], np.concatenate([tokens[400:440], tokens[:10]]))
    timed.kv_cache.encode([more])
    assert timed.tokens == 450
    assert recorded(timed, more.key) > 3 * timed.seconds


def test_an_attempt_that_fails_costs_time_and_no_second_miss(timed: Timed) -> None:
    kv_cache = timed.kv_cache
    context, *following = chain(cut(some_tokens(200), 40, 120))
    first = slice_of(some_tokens(300, seed=1))
    # A state that llama.cpp refuses: known only once it is loaded, after another slice has been encoded.
    nonsense = SliceInfo("", "", "", "", 0, 0, "", "", 0.0)
    kv_cache.store.put(context.key, np.zeros(100, np.uint8), context.tokens, nonsense)
    report = kv_cache.encode([first, *following])
    assert report.new == {first, context, *following}
    assert kv_cache.store.account().misses == 4
    assert report.seconds >= timed.seconds > 0


def test_waiting_for_another_process_is_no_encoding(timed: Timed, tmp_path: Path) -> None:
    kv_cache = timed.kv_cache
    kv_cache.store.patience = 0.5
    (slice_,) = chain([some_tokens(40)])
    somebody = Claims(tmp_path / "claims")
    assert somebody.take(slice_.key)
    report = kv_cache.encode([slice_])
    somebody.release([slice_.key])
    assert 0 <= report.seconds - timed.seconds < 0.5
    assert kv_cache.store.account().misses == 1


def test_patience_begins_anew_for_who_comes_later(
    timed: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that has ended while it waited does not use up the patience of another one, long after it."""
    kv_cache = timed.kv_cache
    kv_cache.store.patience = 0.5
    monkeypatch.setattr("cpucache.reuse.kv_cache._LOOKED_FOR", 0.3)
    (slice_,) = chain([some_tokens(40)])
    somebody = Claims(tmp_path / "claims")
    assert somebody.take(slice_.key)
    task = KVCache.encode(kv_cache, kv_cache.only, [slice_])
    assert not next(task).runs
    task.close()
    time.sleep(0.6)
    started = time.monotonic()
    assert kv_cache.encode([slice_]).new == {slice_}
    assert time.monotonic() - started > 0.5
    somebody.release([slice_.key])

"""An engine that packs its states for the disk: what it says after a restart, and what it does not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpucache.errors import InputError
from cpucache.runtime.packing import Packing
from tests.support import sessions
from tests.support.sessions import engine, message
from tests.support.tiny import ARCHS, HYBRID_ARCHS, RECURRENT_ARCHS
from tests.support.workbench import distance

Tiny = Callable[..., Path]
TEXT = message(1, 240)  # long enough for the headers of files not to matter


@pytest.mark.parametrize("arch", ARCHS)
def test_an_answer_after_a_restart_is_near(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    sizes = {}
    for at_rest in ("f16", "q8_0", "q4_0"):
        folder = tmp_path / at_rest
        with engine(tiny(arch), folder, kv_type="f16", at_rest=at_rest) as running:
            first = sessions.said(running, running.stream(text=TEXT, max_tokens=3))
            assert first.stream.metrics.cached_tokens == 0
        with engine(tiny(arch), folder, kv_type="f16", at_rest=at_rest) as running:
            again = sessions.said(running, running.stream(text=TEXT, max_tokens=3))
            assert again.stream.metrics.cached_tokens > 0
            totals = running.store.index.totals() if running.store.index else {}
            sizes[at_rest] = totals["bytes"]
        assert distance(again.rows[0], first.rows[0]) < (0.02 if at_rest == "f16" else 0.6)
    attends = arch not in RECURRENT_ARCHS or arch in HYBRID_ARCHS
    assert max(sizes["q8_0"], sizes["q4_0"]) < 0.7 * sizes["f16"] or not attends


def test_slices_of_one_way_are_not_found_by_another(tiny: Tiny, tmp_path: Path) -> None:
    for at_rest in ("f16", "q8_0", "q4_0"):
        with engine(tiny("llama"), tmp_path, kv_type="f16", at_rest=at_rest) as running:
            assert running.generate(text=TEXT, max_tokens=1).metrics.cached_tokens == 0


def test_a_packed_file_that_says_nonsense_is_set_aside(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"kv_type": "f16", "at_rest": "q8_0"}
    with engine(tiny("llama"), tmp_path, **settings) as running:
        stream = running.stream(text=TEXT, max_tokens=1)
        stream.reply()
        key = stream.plan.slices[0].key
        running.store.flush()
        found = running.store.files.info(key) if running.store.files else None
        state = running.store.files.get(key) if running.store.files else None
        assert found is not None and state is not None
        cut = state[0][:-1].copy()
        running.store.files.drop(key)  # type: ignore[union-attr]
        running.store.files.put(key, cut, stream.plan.slices[0].tokens, found[0])  # type: ignore[union-attr]
    with engine(tiny("llama"), tmp_path, **settings) as running:
        again = running.stream(text=TEXT, max_tokens=1)
        assert again.reply().text == stream.text
        assert again.metrics.fresh_tokens > 1
    assert list(tmp_path.rglob("*.damaged"))


def test_kinds_that_are_none(tiny: Tiny, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="at_rest='q2': must be one of f16, q8_0, q4_0"),
        engine(tiny("llama"), tmp_path, at_rest="q2"),
    ):
        pass
    with pytest.raises(InputError, match="at_rest='f16': must be one of"):
        Packing("f16")

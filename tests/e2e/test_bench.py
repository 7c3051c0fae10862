"""``bench ttft``: the report is consistent, and what is measured is what its names say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache import CpucacheError, Engine
from cpucache.bench.memory import compare_memory
from cpucache.bench.text import filler_prompt, filler_schema
from cpucache.bench.ttft import Report, _cached, floor
from tests.support.command import cpucache, invoke

COMMAND = ("bench", "ttft", "--tokens", "300", "--modules", "4", "--question", "20", "--threads", "1")
OTHERS = ("other", "other_again", "balanced", "refined")
"""The rows of prompts in an order of their own."""


def test_the_report_is_consistent(model: Path, store_home: Path) -> None:
    report = json.loads(invoke(*COMMAND, "-m", model, "--repeat", "3", "--full-repeat", "2", "--json"))

    assert (report["model"], report["modules"]) == (model.stem, 4)
    # Modules consist of whole words, so their lengths vary.
    assert 250 < report["cached_tokens"] <= 300
    assert 5 < report["fresh_tokens"] <= 20
    assert report["slice_bytes"] > 1000 * report["cached_tokens"]
    assert set(report["full"]) == {"flash off", "flash on"}
    measured = ("floor", "ram", "disk", "other_floor", *OTHERS, "encode")
    series = {name: report[name] for name in measured} | report["full"]
    assert {name: one["runs"] for name, one in series.items()} == {
        "floor": 6,
        "ram": 3,
        "disk": 3,
        **dict.fromkeys(("other_floor", *OTHERS), 3),
        "encode": 2,
        "flash off": 2,
        "flash on": 2,
    }
    assert all(0 < one["min_ms"] <= one["median_ms"] <= one["max_ms"] for one in series.values())
    assert report["ratios"] == pytest.approx(ratios(report), rel=0.01)
    assert report["encode_ms"] == 0, "another order must not wait for a slice"
    assert not (store_home / "slices").exists(), "a benchmark must not fill the user's store"


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """The quotients that the report must give, from its medians."""
    took = {name: one["median_ms"] for name, one in report.items() if isinstance(one, dict) and "median_ms" in one}
    full = min(one["median_ms"] for one in report["full"].values())
    return {
        **{f"{name}_to_floor": took[name] / took["floor"] for name in ("ram", "disk")},
        **{f"{name}_to_floor": took[name] / took["other_floor"] for name in OTHERS},
        **{f"full_to_{name}": full / took[name] for name in ("floor", "ram", "disk", "other", "balanced", "refined")},
        "encode_to_full": took["encode"] / full,
    }


def test_full_prefill_can_be_left_out(model: Path) -> None:
    report = json.loads(invoke(*COMMAND, "-m", model, "--repeat", "1", "--full-repeat", "0", "--json"))

    assert report["full"] == {}
    assert set(report["ratios"]) == {f"{name}_to_floor" for name in ("ram", "disk", *OTHERS)}
    assert report["encode"]["runs"] == 1


def test_the_table_has_a_row_for_each_measurement(model: Path) -> None:
    shown = cpucache(*COMMAND, "-m", model, "--repeat", "1", "--memory", COLUMNS="80").out

    for text in (
        f"{model.stem}: ",
        " tokens cached in 4 modules, ",
        "  floor ",
        "  exact, from RAM ",
        "  exact, from disk ",
        "  floor, other orders ",
        "  other order, fast, first time ",
        "    asked again ",
        "    balanced ",
        "    after refining ",
        "  full prefill, flash off ",
        "  full prefill, flash on ",
        "  encoding, once ",
        "\nencoding, before other orders can be answered: 0 µs\n",
        "\nfull prefill takes ",
        "\nencoding takes ",
        "\npeak memory: ",
    ):
        assert text in shown


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_floor_and_cached_prompts_end_in_the_same_state(model: Path, order: tuple[int, ...]) -> None:
    with Engine(model, n_ctx=1024, threads=1) as engine:
        engine.add_schema(filler_schema(engine, 300, 4))
        prompt = filler_prompt(engine, order, 20)
        engine.encode("bench")

        _cached(engine, prompt, Report("", 0, 0, 0), "ram")
        cached = engine.context.logits()
        floor(engine, engine.plan(prompt, fidelity="fast"))
        found = engine.context.logits()

        assert engine.generate(prompt, max_tokens=1).metrics.encoded_tokens == 0
    np.testing.assert_allclose(cached, found, atol=1e-3)


def test_prompts_are_as_long_as_asked_for(smollm2: Path) -> None:
    with Engine(smollm2, n_ctx=2048, fidelity="fast") as engine:
        layout = engine.add_schema(filler_schema(engine, 1000, 7))
        plan = engine.plan(filler_prompt(engine, range(7), 12))

        assert sum(len(segment.tokens) for segment in layout.segments) == 1000
        assert (plan.n_cached, plan.n_tokens) == (1000, 1012)


def test_memory_is_that_of_the_processes_measured(model: Path) -> None:
    # What this process has must not show in what is measured in others.
    ballast = np.ones(800 << 20, np.uint8)

    result = compare_memory(str(model), n_ctx=1024, tokens=300, modules=4)

    assert model.stat().st_size < result["plain"] < ballast.nbytes
    assert result["slices"] > 300 * 1000
    assert result["overhead"] == result["cached"] - result["plain"] - result["slices"] < 250_000_000


def test_memory_that_can_not_be_measured_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CpucacheError, match=r"^can't measure memory: .*nothing\.gguf") as raised:
        compare_memory(str(tmp_path / "nothing.gguf"), n_ctx=1024, tokens=300, modules=4)

    assert "\n" not in str(raised.value)

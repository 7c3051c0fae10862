"""``bench encode``, and the tables of ``bench report``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import SCHEMA, cpucache, invoke


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.xml"
    path.write_text(SCHEMA)
    return path


def encoded(model: Path, *more: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(invoke("bench", "encode", *more, "-m", model, "--threads", "1", "--json"))
    return result


def test_a_schema_is_encoded_as_often_as_asked_for(model: Path, schema: Path, store_home: Path) -> None:
    (shop,) = encoded(model, schema, "--repeat", "2")["schemas"]
    assert (shop["schema"], shop["encode"]["runs"], shop["full"]["runs"]) == ("shop", 2, 2)
    assert shop["tokens"] > 100
    assert shop["slices"] > 3
    assert shop["bytes"] > shop["tokens"]
    ratio = shop["encode"]["median_ms"] / shop["full"]["median_ms"]
    assert shop["ratios"]["encode_to_full"] == pytest.approx(ratio, rel=0.01)
    assert shop["tokens_per_second"] == pytest.approx(shop["tokens"] / shop["encode"]["median_ms"] * 1000, rel=0.01)
    assert not (store_home / "slices").exists(), "a benchmark must not fill the user's store"


def test_random_words_without_a_schema(model: Path) -> None:
    (words,) = encoded(model, "--tokens", "300", "--modules", "3", "--repeat", "1")["schemas"]
    assert 250 < words["tokens"] <= 300
    assert words["slices"] == 3


def test_a_schema_longer_than_the_context_has_no_full_prefill(model: Path, tmp_path: Path) -> None:
    modules = "".join(f"<module name='m{index}'>{'rain ' * 30}</module>" for index in range(4))
    long = tmp_path / "long.xml"
    long.write_text(f"<schema name='long'>{modules}</schema>")
    (found,) = encoded(model, long, "--ctx", "256", "--repeat", "1")["schemas"]
    assert "full" not in found
    assert found["ratios"] == {}
    assert found["tokens"] > 256


def test_results_become_tables(model: Path, schema: Path, tmp_path: Path) -> None:
    results = {
        "encode": ("bench", "encode", schema, "--repeat", "1"),
        "ttft": ("bench", "ttft", "--tokens", "200", "--modules", "2", "--repeat", "1"),
        "sessions": ("bench", "sessions", "--turns", "2", "--answer", "4", "--repeat", "1", "--no-recompute"),
    }
    for name, command in results.items():
        (tmp_path / name).write_text(invoke(*command, "-m", model, "--threads", "1", "--json"))
    shown = invoke("bench", "report", *(tmp_path / name for name in results))
    blocks = shown.split(f"{model.stem}\n\n")[1:]
    tables = [[line.split("|")[1:-1] for line in block.strip().splitlines()] for block in blocks]
    for name, rows in zip(results, tables, strict=True):
        assert len({len(row) for row in rows}) == 1, name
        assert all(cell == "---" for cell in rows[1])
    assert [len(rows) - 2 for rows in tables] == [1, 11, 2]
    measured = json.loads((tmp_path / "ttft").read_text())["ram"]["median_ms"]
    row = next(row for row in tables[1] if "from RAM" in row[0])
    assert float(re.sub(r"[^\d.]", "", row[1])) == pytest.approx(measured, abs=0.6)


@pytest.mark.parametrize("text", ["", "[]", '{"floor": {}}', '{"variants": 3}', '{"answer": 42}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    done = cpucache("bench", "report", tmp_path / "result.json")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"cpucache: {tmp_path / 'result.json'}: ")
    assert "Traceback" not in done.err


def test_a_result_that_is_not_there(tmp_path: Path) -> None:
    done = cpucache("bench", "report", tmp_path / "none.json")
    assert done.status == 2
    assert "No such file" in done.err

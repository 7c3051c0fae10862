"""``plan`` and the passes of ``encode`` on the real model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cpucache.resources import resource
from tests.support.command import cpucache, invoke

pytestmark = pytest.mark.usefixtures("folder")

ON = ("prompt.xml", "-s", "schema.xml", "--threads", "1")


def told(command: str, model: Path, *options: str) -> dict[str, Any]:
    """What a command on the prompt says as JSON."""
    found: dict[str, Any] = json.loads(invoke(command, *ON, "-m", model, "--json", *options))
    return found


def encode(model: Path, *options: str) -> str:
    return invoke("encode", "schema.xml", "-m", model, "--threads", "1", *options)


def test_the_real_model_is_refined_and_a_small_disk_is_told(smollm2: Path, folder: Path) -> None:
    trip = resource("schemas") / "trip"
    (folder / "schema.xml").write_bytes((trip / "schema.xml").read_bytes())
    (folder / "prompt.xml").write_bytes((trip / "lisbon-with-grandmother.xml").read_bytes())

    small = cpucache("encode", "schema.xml", "--disk", "1MiB", "-m", smollm2)
    encode(smollm2)
    first = told("run", smollm2, "-n", "4", "--compare")
    encode(smollm2, "--refine")
    second = told("run", smollm2, "-n", "4", "--compare")

    assert small.status == 1
    short = re.fullmatch(
        r"cpucache: trip: (\d+) of (\d+) slices did not fit on the disk; to keep all of them, use --disk (\d+)MiB\n",
        small.err,
    )
    assert short and 0 < int(short[1]) <= int(short[2]) and 1 < int(short[3]) < 100
    assert first["cached"]["related_tokens"] > 0
    assert first["same"] == (first["cached"]["text"] == first["uncached"]["text"])
    assert second["cached"]["related_tokens"] == second["cached"]["clean_tokens"] == 0
    assert second["same"] is True
    assert {span["relation"] for span in told("plan", smollm2)["spans"] if "slice" in span} == {"exact"}

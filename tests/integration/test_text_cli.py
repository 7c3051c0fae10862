"""``run``, ``plan`` and ``fidelity`` for text without a schema, as a person edits it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import cpucache, invoke
from tests.support.sessions import message

pytestmark = pytest.mark.usefixtures("folder")

PARAGRAPHS = [message(number, 25) for number in range(6)]
EDITED = [*PARAGRAPHS[:2], message(77, 25), *PARAGRAPHS[3:]]
ANYWHERE = ("--reuse", "anywhere", "--recompute", "0.1")


@pytest.fixture
def texts(folder: Path) -> tuple[str, str]:
    """A text, and the same with one paragraph changed."""
    for name, paragraphs in (("notes.txt", PARAGRAPHS), ("edited.txt", EDITED)):
        (folder / name).write_text("\n\n".join(paragraphs))
    return "notes.txt", "edited.txt"


def told(command: str, name: str, model: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        invoke(command, name, "-m", model, "--threads", "1", "--segment-tokens", "16-64", "--json", *options)
    )
    return found


def test_an_edited_paragraph_is_evaluated_and_little_besides(model: Path, texts: tuple[str, str]) -> None:
    notes, edited = texts
    first = told("run", notes, model, "-n", "2", *ANYWHERE)
    assert first["cached_tokens"] == 0

    planned = told("plan", edited, model, *ANYWHERE)
    assert planned["foreign"] > planned["tokens"] / 3
    assert planned["exact"] + planned["foreign"] + planned["clean"] + planned["evaluated"] == planned["tokens"]
    assert 0 < planned["recomputed"] <= planned["foreign"]
    rows = planned["spans"]
    assert {row["why"] for row in rows if row["from"] == "to be encoded"} == {"no slice yet"}
    assert {row["why"] for row in rows if row["from"] == "evaluated"} == {"recomputed", "the last segment"}
    assert all(row["text"] for row in rows)

    second = told("run", edited, model, "-n", "2", *ANYWHERE)
    assert (second["exact_tokens"], second["foreign_tokens"]) == (planned["exact"], planned["foreign"])
    assert second["fresh_tokens"] == planned["evaluated"]


def test_unless_told_it_is_exact(model: Path, texts: tuple[str, str]) -> None:
    notes, edited = texts
    told("run", notes, model, "-n", "2")
    exact = told("run", edited, model, "-n", "2")
    assert exact["foreign_tokens"] == exact["clean_tokens"] == 0
    assert 0 < exact["cached_tokens"] == exact["exact_tokens"] < exact["prompt_tokens"] / 2


def test_both_answers_are_compared_as_they_are_the_first_time(model: Path, texts: tuple[str, str]) -> None:
    notes, edited = texts
    told("run", notes, model, "-n", "2", *ANYWHERE)
    result = told("run", edited, model, "-n", "2", "--compare", *ANYWHERE)
    assert result["uncached"]["cached_tokens"] == 0
    assert result["cached"]["foreign_tokens"] > 0
    assert result["cached"]["encoded_tokens"] > 0
    # What is exact has been asked before.
    again = told("run", edited, model, "-n", "2", "--compare")
    assert again["cached"]["cached_tokens"] == again["cached"]["prompt_tokens"] - 1
    assert again["same"]


def test_how_near_it_comes_is_measured(model: Path, texts: tuple[str, str]) -> None:
    notes, edited = texts
    told("run", notes, model, "-n", "2", *ANYWHERE)
    near = told("fidelity", edited, model, "-n", "4", "--reuse", "anywhere")
    changes = {each["change"]: each["kl_answer"] for each in near["advice"]}
    assert set(changes) == {"--recompute 0.1", "--recompute 0.2", "--reuse exact"}
    assert changes["--reuse exact"] < 1e-5 < near["cached"]["kl_answer"]


def test_slices_of_a_short_text_take_no_time_of_their_own(model: Path, folder: Path) -> None:
    (folder / "short.txt").write_text("hi")
    told = cpucache("run", "short.txt", "-m", model, "-n", "2", "--threads", "1").err
    assert re.search(r"\d+ tokens encoded, saved for next time", told), told

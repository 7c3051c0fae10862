"""``plan`` and the passes of ``encode``: what they say, and what the next prompt finds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import PROMPT, SCHEMA, cpucache, invoke, slices

pytestmark = pytest.mark.usefixtures("folder")


ON = ("prompt.xml", "-s", "schema.xml", "--threads", "1")


def plan(model: Path, *options: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(invoke("plan", *ON, "-m", model, "--json", *options))
    return found


def run(model: Path, *options: str | Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(invoke("run", *ON, "-m", model, "-n", "4", "--json", *options))
    return answer


def encode(model: Path, *options: str | Path) -> str:
    return invoke("encode", "schema.xml", "-m", model, "--threads", "1", *options)


# -- plan --------------------------------------------------------------------------------------------------------------
def test_a_plan_before_anything_is_encoded_says_what_is_missing(model: Path, store_home: Path) -> None:
    found = plan(model, "--fidelity", "fast")

    assert not (store_home / "slices").exists() or not slices(store_home)
    assert found["evaluated"] == found["tokens"] == run(model, "--no-cache")["prompt_tokens"]
    missing = [span for span in found["spans"] if "slice" in span]
    assert {span["from"] for span in missing} == {"to be encoded"}
    assert {span["why"] for span in missing} == {"no slice yet"}
    assert found["evaluate_ms"] is None, "nothing tells how fast it would be"


def test_a_plan_names_every_span(model: Path, store_home: Path) -> None:
    encode(model)
    saved = slices(store_home)

    found = plan(model, "--fidelity", "fast")

    assert slices(store_home) == saved
    spans = found["spans"]
    assert [span["module"] for span in spans] == ["", "hours", "", "hours", "summer", "", ""]
    assert sum(span["tokens"] for span in spans) == found["tokens"]
    assert [span["from"] for span in spans] == ["disk", "disk", "evaluated", "disk", "disk", *["evaluated"] * 2]
    assert [span.get("relation") for span in spans] == ["exact", "exact", None, *["related"] * 2, None, None]
    other = "not yet evaluated after this text"
    assert [span["why"] for span in spans] == ["", "", "new text", other, other, "recomputed", "new text"]
    assert spans[1]["context"] == ["(schema)"]
    assert spans[4]["context"] == ["(schema)", "hours", "(argument)"]
    assert spans[4]["context_tokens"] == sum(span["tokens"] for span in spans[:4]) + 8 - spans[2]["tokens"]
    assert {span["slice"] for span in spans if "slice" in span} <= saved
    assert found["exact"] + found["related"] + found["evaluated"] == found["tokens"]
    answer = run(model, "--fidelity", "fast")
    for name in ("exact", "clean", "related", "foreign", "recomputed"):
        assert found[name] == answer[f"{name}_tokens"]
    assert found["evaluated"] == answer["fresh_tokens"]
    assert found["evaluate_ms"] > 0


def test_a_plan_tells_what_is_recomputed(model: Path) -> None:
    encode(model)

    found = plan(model, "--fidelity", "balanced")

    recomputed = [span for span in found["spans"] if span["recomputed"]]
    assert recomputed
    assert {(span["from"], span["why"]) for span in recomputed} == {("evaluated", "recomputed")}
    assert (
        sum(span["tokens"] for span in recomputed)
        == found["recomputed"]
        == run(model, "--fidelity", "balanced")["recomputed_tokens"]
    )


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_a_plan_keeps_its_names_on_any_terminal(model: Path, folder: Path, columns: int) -> None:
    for name, text in (("schema.xml", SCHEMA), ("prompt.xml", PROMPT)):
        (folder / name).write_text(text.replace("summer", "summertime"))
    encode(model)

    done = cpucache("plan", *ON, "-m", model, COLUMNS=str(columns))

    *table, summary = done.out.splitlines()
    assert "…" not in done.out
    assert all(len(line) <= columns for line in table)
    assert re.search(r"^  summertime +.*related, disk", done.out, re.MULTILINE)
    assert ("evaluated after" in table[1], " why" in table[1]) == (columns >= 80, columns >= 140)
    assert ("tokens: (schema), hours" in done.out) == (columns >= 140)
    assert re.fullmatch(r"\d+ tokens: \d+ exact, \d+ related from slices; \d+ to evaluate, about .*", summary)


# -- encode ------------------------------------------------------------------------------------------------------------
def test_the_second_pass_makes_prompts_exact(model: Path) -> None:
    first, second = encode(model, "-p", "prompt.xml").splitlines()

    assert first.startswith("shop: ")
    assert re.match(r"shop, likely prompts: [1-9]\d* slices, ", second)
    assert {span["relation"] for span in plan(model)["spans"] if "slice" in span} == {"exact"}
    answer = run(model)
    assert (answer["clean_tokens"], answer["related_tokens"], answer["encoded_tokens"]) == (0, 0, 0)
    assert encode(model, "-p", "prompt.xml").splitlines()[1] == (
        "shop, likely prompts: all its slices are in the store already"
    )


def test_scaffold_sets_are_the_second_pass_unless_it_is_to_be_quick(model: Path, folder: Path) -> None:
    days = "".join(
        f'<module name="{day}">{day} is a day of the week. </module>' for day in ("monday", "friday", "sunday")
    )
    schema = f'<schema name="week"><scaffold modules="sunday monday"/>Root. {days}</schema>'
    (folder / "schema.xml").write_text(schema)
    (folder / "prompt.xml").write_text('<prompt schema="week"><monday/><sunday/><user>Which?</user></prompt>')

    quick = encode(model, "--quick")
    before = plan(model, "--fidelity", "fast")
    whole = encode(model)
    after = plan(model, "--fidelity", "fast")

    assert quick.count("\n") == 1
    assert "week, likely prompts: " in whole
    assert before["related"] > 0 == after["related"]


def test_refine_makes_what_was_asked_exact(model: Path) -> None:
    encode(model)
    assert run(model)["related_tokens"] > 0

    refined = encode(model, "--refine").splitlines()[-1]

    assert re.match(r"shop, refined: [1-9]\d* slices, ", refined)
    found = plan(model)
    assert {span["relation"] for span in found["spans"] if "slice" in span} == {"exact"}
    answer = run(model)
    assert (answer["related_tokens"], answer["clean_tokens"], answer["recomputed_tokens"]) == (0, 0, 0)
    assert answer["exact_tokens"] == answer["cached_tokens"] == found["exact"]
    assert answer["text"] == run(model, "--no-cache")["text"]


# -- recurrent models --------------------------------------------------------------------------------------------------
def test_a_recurrent_model_reuses_what_is_exact(tiny: Callable[..., Path]) -> None:
    model = tiny("mamba")

    lines = encode(model, "-p", "prompt.xml")
    answer = run(model, "--fidelity", "high")

    assert "likely prompts" in lines
    assert answer["encoded_tokens"] == 0 < answer["exact_tokens"] == answer["cached_tokens"]
    assert answer["text"] == run(model, "--no-cache")["text"]


def test_a_recurrent_model_saves_what_it_evaluates(tiny: Callable[..., Path]) -> None:
    model = tiny("mamba")

    first, second = run(model, "--fidelity", "high"), run(model, "--fidelity", "high")

    assert first["encoded_tokens"] > 0 == first["cached_tokens"]
    assert second["encoded_tokens"] == 0 < second["cached_tokens"]
    assert first["text"] == second["text"]

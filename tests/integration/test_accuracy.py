"""``bench accuracy``: the report is of the answers, and a file of results can be gone on with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cpucache.bench.datasets import read_examples
from cpucache.bench.results import Answer, Results
from cpucache.bench.tasks import TASKS
from cpucache.errors import InputError
from tests.support.command import cpucache, invoke, started, until
from tests.support.questions import MULTI_NEWS, MUSIQUE, ORACLE, TREC, write_data

VARIANTS = ("full", "standalone", "fast", "refined", "isolate", "recompute:0.2")
"""Those that are run."""


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of examples, or of lines as they are."""
    return partial(write_data, tmp_path)


class Bench:
    """The command on a tiny model, and what it leaves."""

    def __init__(self, model: Path, data: Path, folder: Path) -> None:
        self.data = data
        self.file = folder / "results.jsonl"
        self.common = ("bench", "accuracy", "-m", model, "--ctx", "1024", "--threads", "1", "--data", data)

    def arguments(
        self, *more: str | Path, task: str = "qa", variants: str = ",".join(VARIANTS)
    ) -> tuple[str | Path, ...]:
        return (*self.common, "--task", task, "--variants", variants, "--results", self.file, *more)

    def run(self, *more: str | Path, **settings: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(invoke(*self.arguments("--json", *more, **settings)))
        return report

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@pytest.fixture
def bench(tiny: Callable[..., Path], data: Callable[..., Path], tmp_path: Path) -> Callable[..., Bench]:
    return lambda records: Bench(tiny("llama"), data(records, zipped=True), tmp_path)


@pytest.mark.parametrize(
    ("task", "records", "measures", "longest"),
    [
        ("qa", MUSIQUE, ["f1", "exact_match"], 32),
        ("qa", ORACLE, ["f1", "exact_match"], 32),
        ("summary", MULTI_NEWS, ["rouge_l"], 128),
        ("choice", TREC * 3, ["accuracy"], 8),
    ],
)
def test_the_report_is_of_the_answers(
    bench: Callable[..., Bench],
    store_home: Path,
    task: str,
    records: list[Any],
    measures: list[str],
    longest: int,
) -> None:
    run = bench(records)
    report = run.run("--limit", "3", task=task)

    assert (report["task"], report["data"], report["too_long"]) == (task, "data.jsonl", 0)
    header, *answers = run.lines
    assert {line["settings"] for line in answers} == {header["settings"]}
    # All variants answer the questions on one schema before the next is encoded.
    asked = [example.line for example in read_examples(run.data)[:3]]
    assert {(line["example"], line["variant"]) for line in answers} == {(e, v) for e in asked for v in VARIANTS}
    assert [line["variant"] for line in answers].count("full") == len(answers) / len(VARIANTS) == 3
    examples = {example.line: example for example in read_examples(run.data)}
    for line in answers:
        assert line["scores"] == TASKS[task].score(line["text"], examples[line["example"]])
        assert list(line["scores"]) == measures
        assert task == "summary" or "\n" not in line["text"]
        if line["variant"] == "full":
            assert line["encoded_tokens"] == 0
            assert line["fresh_tokens"] == line["prompt_tokens"]
            assert line["kl"] < 1e-4 and line["same"]
        else:
            assert line["fresh_tokens"] < line["prompt_tokens"]
            assert line["exact"] + line["clean"] + line["related"] == line["prompt_tokens"] - line["fresh_tokens"]
            assert line["encoded_tokens"] == 0, "everything is encoded ahead"
        if line["variant"] in ("fast", "refined"):
            # All passages in the schema's order.
            assert line["clean"] == line["related"] == 0
            assert line["kl"] < 1e-3
        assert line["schema_ms"] > 0
    for outcome in report["variants"]:
        mine = [line for line in answers if line["variant"] == outcome["variant"]]
        assert outcome["n"] == 3
        for name in measures:
            mean = 100 * sum(line["scores"][name] for line in mine) / 3
            assert outcome["scores"][name]["mean"] == pytest.approx(mean, abs=0.01)
            assert ("difference" in outcome["scores"][name]) == (outcome["variant"] != "full")
        assert outcome["ttft"]["median_ms"] == pytest.approx(sorted(line["ttft_ms"] for line in mine)[1], abs=0.01)
        assert ("encode_to_once" in outcome) == (outcome["variant"] != "full")
    # What is reported of each answer names it, and holds no text.
    each = [(answer["example"], answer["variant"]) for answer in report["answers"]]
    assert each == [(example, variant) for example in asked for variant in VARIANTS]
    assert all(re.fullmatch("[0-9a-f]{12}", answer["text"]) for answer in report["answers"])
    assert not (store_home / "slices").exists(), "a benchmark must not fill the user's store"


def test_a_rerun_skips_what_is_there(bench: Callable[..., Bench]) -> None:
    run = bench(MUSIQUE)
    first = run.run("--limit", "2")
    before = run.file.read_bytes()

    assert run.run("--limit", "2") == first
    assert run.file.read_bytes() == before

    # More questions, fewer variants: what is there counts, and nothing else is asked.
    more = run.run("--limit", "3", variants="full")
    assert run.file.read_bytes().startswith(before)
    assert len(run.lines) == 1 + 2 * len(VARIANTS) + 1
    assert [outcome["n"] for outcome in more["variants"]] == [3]


def test_an_answer_is_in_the_file_at_once(tmp_path: Path) -> None:
    path, answer = tmp_path / "results.jsonl", Answer(3, "full", "Ünder", {"f1": 0.5}, 12.5, 9, 9, 0)
    with Results(path, {"seed": 1}) as results:
        results.add(answer)
        assert path.read_bytes().count(b"\n") == 2
        with Results(path, {"seed": 1}) as again:
            assert (len(again), again[3, "full"]) == (1, answer)


def test_a_line_cut_short_is_done_again(bench: Callable[..., Bench]) -> None:
    run = bench(MUSIQUE)
    run.run("--limit", "2")
    whole = run.file.read_bytes()
    kept = whole[: whole.rindex(b"\n", 0, -1) + 1]
    run.file.write_bytes(whole[:-20])

    run.run("--limit", "2")

    assert run.file.read_bytes().startswith(kept)
    texts = [(line["example"], line["variant"], line["text"]) for line in run.lines[1:]]
    assert texts == [
        (line["example"], line["variant"], line["text"]) for line in map(json.loads, whole.splitlines()[1:])
    ]


def test_results_of_other_settings_are_refused(bench: Callable[..., Bench], tmp_path: Path) -> None:
    run = bench(MUSIQUE)
    run.run("--limit", "1", variants="full")
    before = run.file.read_bytes()

    with pytest.raises(
        InputError, match=r"results.jsonl: its answers were measured with other settings \(seed 0, now 7\); name"
    ):
        run.run("--limit", "1", "--seed", "7")
    assert run.file.read_bytes() == before
    for other in (b"a file of mine", b"a file\nof mine\n", b'{"settings": "x"}\n'):
        run.file.write_bytes(other)
        with pytest.raises(InputError, match="not a "):
            run.run("--limit", "1")
        assert run.file.read_bytes() == other


def test_questions_that_do_not_fit_are_passed_over(bench: Callable[..., Bench]) -> None:
    long = [{**MUSIQUE[0], "question": "why? " * size} for size in (5, 500, 6, 5000, 7)]
    run = bench(long)

    report = run.run(variants="full")

    assert {line["example"] for line in run.lines[1:]} == {1, 3, 5}
    assert report["too_long"] == 2
    with pytest.raises(InputError, match=r"none of the 1 examples fits a context of 1024 tokens; raise --ctx"):
        bench(long[3:4]).run("--results", run.file.with_name("other"))


NAMED = [
    {**record, "text": f"{record['text']} It is {number} that the {number}th of these passages is about."}
    for number, record in enumerate(ORACLE)
]


def test_picked_passages_share_schemas(bench: Callable[..., Bench]) -> None:
    run = bench(NAMED)

    report = run.run("--pick", "3", "--of", "5", "--limit", "7", variants="full,standalone,fast,high,balanced,refined")

    by_variant: dict[str, list[dict[str, Any]]] = {}
    for line in run.lines[1:]:
        by_variant.setdefault(line["variant"], []).append(line)
    assert [len(lines) for lines in by_variant.values()] == [7] * 6
    # Two schemas: five questions on one, two on the other.
    assert [line["variant"] for line in run.lines[1:]].index("standalone") == 5
    assert sum(line["related"] for line in by_variant["fast"]) > 0, "an order of its own"
    assert sum(line["clean"] + line["related"] for line in by_variant["standalone"]) > 0
    assert all(line["encoded_tokens"] == 0 for name, lines in by_variant.items() if name != "high" for line in lines)
    assert sum(line["encoded_tokens"] for line in by_variant["high"]) > 0
    # Slices that high has encoded are not found by the others.
    assert [line["related"] for line in by_variant["balanced"]] != [0] * 7
    assert sum(line["recomputed"] for line in by_variant["balanced"]) > 0
    assert all(line["clean"] == line["related"] == 0 for line in by_variant["refined"])
    kl = {outcome["variant"]: outcome["kl"] for outcome in report["variants"]}
    assert max(kl["full"], kl["high"], kl["refined"]) < 1e-3 < kl["fast"]
    for outcome in report["variants"]:
        assert ("ttft_to_floor" in outcome) == ("again_to_floor" in outcome) == (outcome["variant"] != "full")


def test_members_of_unions_and_arguments(bench: Callable[..., Bench]) -> None:
    run = bench(NAMED)
    selection = ("--unions", "2", "--of", "5", "--argument", "--limit", "7")

    report = run.run(*selection, variants="full,fast,balanced,refined")

    by_variant: dict[str, list[dict[str, Any]]] = {}
    for line in run.lines[1:]:
        by_variant.setdefault(line["variant"], []).append(line)
    # Nothing waits for an argument that no slice has attended to.
    assert all(line["encoded_tokens"] == 0 for name in ("fast", "balanced") for line in by_variant[name])
    assert all(line["related"] + line["clean"] > 0 for line in by_variant["fast"])
    assert all(line["related"] == line["clean"] == 0 for line in by_variant["refined"])
    kl = {outcome["variant"]: outcome["kl"] for outcome in report["variants"]}
    assert max(kl["full"], kl["refined"]) < 1e-3 < kl["fast"]
    # Five questions share a schema, and so what encoding it took.
    for lines in by_variant.values():
        assert len({line["schema_ms"] for line in lines[:5]}) == len({line["schema_ms"] for line in lines[5:]}) == 1
    with pytest.raises(InputError, match=r"other settings .*unions 2, now 3"):
        run.run("--unions", "3", "--of", "5", "--argument", variants="full")


def test_a_rerun_adds_what_is_missing_and_nothing_else(bench: Callable[..., Bench]) -> None:
    run = bench(NAMED)
    selection = ("--pick", "3", "--of", "5", "--limit", "5")
    run.run(*selection, variants="full,fast")
    before = run.file.read_bytes()
    # Killed after the third answer of the second variant.
    run.file.write_bytes(b"".join(before.splitlines(keepends=True)[:9]))

    report = run.run(*selection, variants="full,fast")

    assert len(run.lines) == 11, "what is said in full is asked again, and not kept twice"
    texts = [{key: line.get(key) for key in ("example", "variant", "text", "same")} for line in run.lines]
    wanted = [
        {key: line.get(key) for key in ("example", "variant", "text", "same")}
        for line in map(json.loads, before.splitlines())
    ]
    assert texts == wanted
    assert [outcome["n"] for outcome in report["variants"]] == [5, 5]


def test_shuffled_and_dropped_are_other_settings(bench: Callable[..., Bench]) -> None:
    run = bench(MUSIQUE)
    run.run("--limit", "1", "--shuffle", variants="full")

    with pytest.raises(InputError, match=r"other settings .*drop 0.0, now 0.5"):
        run.run("--limit", "1", "--shuffle", "--drop", "0.5", variants="full")
    with pytest.raises(InputError, match="other settings"):
        run.run("--limit", "1", variants="full")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--of", "5"), "--of needs --pick or --unions"),
        (("--unions", "2"), "--unions N needs --of M, where M is at least N"),
        (("--unions", "2", "--of", "5", "--drop", "0.5"), "--unions can be combined with --of and --shuffle only"),
        (("--pick", "2", "--of", "5", "--unions", "2"), "--pick can be combined with --of only"),
        (("--pick", "2"), "--pick K needs --of M, where M is at least K"),
        (("--pick", "6", "--of", "5"), "--pick K needs --of M, where M is at least K"),
        (("--pick", "2", "--of", "50"), "--of 50 needs at least 50 questions; the file has 20"),
        (("--pick", "2", "--of", "5", "--shuffle"), "--pick can be combined with --of only"),
        (("--pick", "2", "--of", "5", "--drop", "0.5"), "--pick can be combined with --of only"),
        (("--pick", "2", "--of", "5", "--passages", "3"), "--pick can be combined with --of only"),
        (("--variants", "fast,full"), "the first variant must be 'full'"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(
    bench: Callable[..., Bench], more: tuple[str, ...], message: str
) -> None:
    run = bench(NAMED)

    done = cpucache(*run.arguments(*more))

    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not run.file.exists()


@pytest.mark.parametrize("columns", [40, 60, 80, 140])
def test_the_table_fits_the_terminal(bench: Callable[..., Bench], columns: int) -> None:
    run = bench(ORACLE)

    shown = cpucache(*run.arguments("--limit", "2", variants="full,fast,recompute:0.2"), COLUMNS=str(columns)).out

    _, *table, last = shown.splitlines()
    assert "…" not in shown
    assert all(len(line) <= columns for line in table)
    assert all(re.search(rf"^  {name} +[0-9.]+ ", shown, re.MULTILINE) for name in ("full", "fast"))
    assert "recompute:0.2" in shown or columns == 40, "a long name is folded"
    assert ("95%" in "".join(table)) == (columns == 140)
    assert (" EM " in "".join(table), "floor" in "".join(table)) == (columns >= 60, columns >= 80)
    assert last == "Scores: 100 is the best. Differences are paired; --json has their 95% intervals. Times are medians."


def test_the_table_and_the_drawing_have_every_variant(bench: Callable[..., Bench], tmp_path: Path) -> None:
    run = bench(ORACLE)
    for suffix, beginning in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        shown = invoke(*run.arguments("--limit", "2", "--passages", "2", "--plot", tmp_path / f"plot.{suffix}"))

        assert shown.startswith(f"{run.common[3].stem}: qa on data.jsonl, 2 questions\n")
        assert all(f"\n  {name} " in shown for name in VARIANTS)
        assert (tmp_path / f"plot.{suffix}").read_bytes().startswith(beginning)
    for name, message in (("plot.doc", "its suffix must be one of"), ("no/plot.png", "there is no folder")):
        with pytest.raises(InputError, match=message):
            invoke(*run.arguments("--plot", tmp_path / name))


def test_ctrl_c_keeps_what_is_done(bench: Callable[..., Bench]) -> None:
    run = bench([{**ORACLE[number % 20], "title": f"title {number}"} for number in range(300)])
    arguments = run.arguments("--passages", "8")
    with started(*arguments) as command:
        until(lambda: run.file.exists() and run.file.read_bytes().count(b"\n") > 3, command)
        told = ""
        while command.poll() is None:
            # Pressed again where the first one is lost in a callback of llama.cpp's.
            command.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                _, told = command.communicate(timeout=10)

    assert command.returncode == 130
    done = run.lines
    assert f"stopped; {len(done) - 1} answers are saved in {run.file}: the same command continues after them" in told
    assert 3 < len(done) < 1 + len(VARIANTS) * 300
    again = cpucache(*arguments, "--limit", str(len(done)))
    assert again.status == 0, again.err
    assert run.lines[: len(done)] == done
    assert len(run.lines) == 1 + len(VARIANTS) * len(done)
    assert again.err == "", "a bar is for terminals"

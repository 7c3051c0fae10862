"""``run``, ``encode`` and ``schema``: what they print, and what they leave in the store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cpucache.resources import resource
from tests.support.command import PROMPT, SCHEMA, cpucache, invoke, slices

NAMES = {
    "text": str,
    "model": str,
    "finish": str,
    "stop": str,
    "prompt_tokens": int,
    "cached_tokens": int,
    "fresh_tokens": int,
    "encoded_tokens": int,
    "exact_tokens": int,
    "clean_tokens": int,
    "related_tokens": int,
    "foreign_tokens": int,
    "recomputed_tokens": int,
    "completion_tokens": int,
    "ttft_ms": float,
    "encode_ms": float,
    "splice_ms": float,
    "prefill_ms": float,
    "total_ms": float,
    "save_ms": float,
    "left_out_tokens": int,
    "recompute_ms": float,
}


pytestmark = pytest.mark.usefixtures("folder")


def run(model: Path, *options: str, prompt: str = "prompt.xml", stdin: str | None = None) -> dict[str, Any]:
    """``run --json`` on the shop's schema."""
    settings = ("-n", "8", "--threads", "1", *options)
    answer: dict[str, Any] = json.loads(
        invoke("run", prompt, "-s", "schema.xml", "-m", model, "--json", *settings, stdin=stdin)
    )
    return answer


# -- run ---------------------------------------------------------------------------------------------------------------
def test_run_prints_the_answer_and_nothing_else(model: Path) -> None:
    expected = run(model)["text"]

    done = cpucache("run", "prompt.xml", "-s", "schema.xml", "-m", model, "-n", "8", "--threads", "1")

    assert done.status == 0
    assert expected
    assert done.out == f"{expected}\n"
    # By default only the schema's closing text is recomputed; the answer is as long as it may be.
    kinds = r"\(\d+ exact, \d+ related; 2 recomputed\)"
    figures = (
        r"first token after \S+ m?s · \d+ of \d+ prompt tokens from cache {} · \S+ tok/s · cut off after 8 tokens\n"
    )
    assert re.fullmatch(figures.format(kinds), done.err)


def test_the_figures_say_what_was_encoded_and_whether_it_was_saved(model: Path) -> None:
    command = ("run", "prompt.xml", "-s", "schema.xml", "-m", model, "-n", "1", "--threads", "1")

    unsaved = cpucache(*command, "--disk", "1KiB").err
    first, second = cpucache(*command).err, cpucache(*command).err

    assert "tokens encoded in" in unsaved and "saved" not in unsaved
    assert re.search(r"0 of \d+ prompt tokens from cache · \d+ tokens encoded in \S+ m?s, saved for next time", first)
    assert "encoded" not in second and "saved" not in second


def test_an_answer_that_ends_by_itself_was_not_cut(model: Path) -> None:
    stop = run(model)["text"][:2]

    err = cpucache("run", "prompt.xml", "-s", "schema.xml", "-m", model, "--stop", stop, "--threads", "1").err

    assert "cut off after" not in err


def test_an_answer_is_cut_where_the_context_asked_for_ends(model: Path, folder: Path) -> None:
    (folder / "text.txt").write_text("a" * 60)
    size = ask(model, "text.txt", "--raw")["prompt_tokens"]

    room = ask(model, "text.txt", "--raw", "--ctx", str(size + 3))
    none = cpucache("run", "text.txt", "--raw", "-m", model, "--ctx", str(size))

    assert (room["completion_tokens"], room["finish"]) == (3, "length")
    assert (none.status, none.out) == (2, "")
    assert f"the prompt is {size} tokens long and leaves no room for an answer in a context of {size}" in none.err


def test_a_huge_text_is_refused_by_its_head(smollm2: Path, folder: Path) -> None:
    (folder / "huge.txt").write_text("And so it went on, from day to day and year to year. " * 400_000)
    (folder / "huge.xml").write_text(f'<prompt schema="shop"><user>{"so it went on " * 200_000}</user></prompt>')

    for command, name in ((("huge.txt",), "messages"), (("huge.xml", "-s", "schema.xml"), "huge.xml")):
        done = cpucache("run", *command, "-m", smollm2, "--ctx", "512")
        assert (done.status, done.out) == (2, "")
        assert re.fullmatch(
            rf"cpucache: {name}: [\d,]+ characters exceed a context of 512 tokens; raise --ctx .*\n",
            done.err,
        )


def test_a_text_of_long_tokens_is_not_refused_by_its_size(smollm2: Path, folder: Path) -> None:
    # Many more characters than sixteen for each token of the context.
    (folder / "ruler.txt").write_text("=" * 16_000)

    answer = ask(smollm2, "ruler.txt", "--ctx", "512", "-n", "1")

    assert answer["prompt_tokens"] < 512 < 16_000 / 16


def test_run_json_has_all_counts_and_times(model: Path) -> None:
    run(model)
    answer = run(model)

    assert {name: type(value) for name, value in answer.items()} == NAMES
    assert answer["model"] == model.stem
    assert answer["prompt_tokens"] == answer["cached_tokens"] + answer["fresh_tokens"]
    assert answer["cached_tokens"] > answer["fresh_tokens"] > 0
    kinds = ("exact_tokens", "clean_tokens", "related_tokens", "foreign_tokens")
    assert sum(answer[name] for name in kinds) == answer["cached_tokens"]
    assert (answer["completion_tokens"], answer["finish"]) == (8, "length")
    assert (
        min(
            answer[name]
            for name in NAMES
            if name.endswith("_ms") and name not in ("save_ms", "recompute_ms", "encode_ms")
        )
        > 0
    )
    parts = answer["encode_ms"] + answer["splice_ms"] + answer["prefill_ms"]
    assert parts <= answer["ttft_ms"] <= answer["total_ms"]


def test_slices_are_found_again_by_another_process(model: Path, store_home: Path) -> None:
    command = ("run", "prompt.xml", "-s", "schema.xml", "-m", model, "--json", "-n", "8", "--threads", "1")

    first = json.loads(cpucache(*command).out)
    saved = slices(store_home)
    second = json.loads(cpucache(*command).out)

    assert first["encoded_tokens"] > 0
    assert first["cached_tokens"] == 0, "what was evaluated for the prompt does not count as cached"
    assert (second["encoded_tokens"], second["encode_ms"]) == (0, 0)
    assert second["cached_tokens"] > 0
    assert second["text"] == first["text"]
    assert saved == slices(store_home)


def test_no_cache_reuses_nothing_and_saves_nothing(model: Path, store_home: Path) -> None:
    cached = run(model)
    saved = slices(store_home)

    uncached = run(model, "--no-cache", "-m", str(model))

    assert (uncached["cached_tokens"], uncached["encoded_tokens"]) == (0, 0)
    assert uncached["fresh_tokens"] == uncached["prompt_tokens"] == cached["prompt_tokens"]
    assert saved == slices(store_home)


def test_compare_gives_both_answers(model: Path) -> None:
    result = run(model, "--compare")

    assert set(result) == {"cached", "uncached", "speedup", "same"}
    assert result["same"] == (result["cached"]["text"] == result["uncached"]["text"])
    assert set(result["cached"]) == set(result["uncached"]) == set(NAMES)
    assert result["uncached"]["cached_tokens"] == 0
    assert result["cached"]["cached_tokens"] > 0
    # Slices that were missing are encoded before the cached answer is timed.
    assert result["cached"]["encoded_tokens"] == 0
    quotient = result["uncached"]["ttft_ms"] / result["cached"]["ttft_ms"]
    assert result["speedup"] == pytest.approx(quotient, rel=0.01)


def test_compare_shows_both_answers_side_by_side(model: Path) -> None:
    command = ("run", "prompt.xml", "-s", "schema.xml", "-m", model, "-n", "4", "--compare", "--threads", "1")

    shown = invoke(*command)
    again = invoke(*command)

    assert re.search(r"without the cache +from cached slices", shown)
    assert re.search(r"time to first token +\S+ m?s +\S+ m?s \(\S+ times faster\)", shown)
    assert re.search(r"from cache +0 +[1-9]\d*", shown)
    assert "tokens were encoded in" in shown
    assert "encoded" not in again


def test_a_seed_gives_the_same_answer_again(model: Path) -> None:
    one, same, other = (run(model, "--temp", "0.8", "--seed", seed)["text"] for seed in ("7", "7", "8"))

    assert one == same != other


def test_an_answer_ends_at_a_stop_text(model: Path) -> None:
    whole = run(model)["text"]
    stop = whole[len(whole) // 2 :][:2]

    answer = run(model, "--stop", "never said", "--stop", stop)

    assert answer["text"] == whole.partition(stop)[0]
    assert answer["finish"] == "stop"


def test_an_answer_is_as_long_as_wished(model: Path) -> None:
    assert run(model, "-n", "3")["completion_tokens"] == 3


def test_the_prompt_may_be_standard_input(model: Path) -> None:
    assert run(model, prompt="-", stdin=PROMPT)["text"] == run(model)["text"]


def test_a_schema_from_standard_input_finds_its_files_here(model: Path, folder: Path) -> None:
    (folder / "notes.txt").write_text("The key is under the third flower pot.")
    text = '<schema name="s"><module name="notes" src="notes.txt"/></schema>'
    (folder / "p.xml").write_text('<prompt schema="s"><notes/><user>Where?</user></prompt>')

    answer = json.loads(invoke("run", "p.xml", "-s", "-", "-m", model, "--json", "-n", "1", stdin=text))

    assert answer["encoded_tokens"] >= len("third flower pot")


@pytest.mark.parametrize("option", [("--kv-type", "q8_0"), ("--flash", "on"), ("--positions", "packed")])
def test_run_takes_the_options_of_the_engine(model: Path, store_home: Path, option: tuple[str, str]) -> None:
    plain = run(model)
    saved = slices(store_home)

    changed = run(model, *option)

    assert changed["prompt_tokens"] == plain["prompt_tokens"]
    # Their slices are others, except where only positions differ and these are the same.
    assert option[0] == "--positions" or not saved & (slices(store_home) - saved)
    assert option[0] == "--positions" or changed["encoded_tokens"] > 0


def ask(model: Path, prompt: str, *options: str, stdin: str | None = None) -> dict[str, Any]:
    """``run --json`` without a schema."""
    settings = ("-m", model, "--json", "-n", "8", "--threads", "1")
    answer: dict[str, Any] = json.loads(invoke("run", prompt, *settings, *options, stdin=stdin))
    return answer


LONG = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 12


def test_what_is_no_pml_is_a_message(model: Path, folder: Path) -> None:
    (folder / "question.txt").write_text("What is there to eat?\n")
    message = {"role": "user", "content": "What is there to eat?"}
    (folder / "messages.json").write_text(json.dumps([message]))

    answer = ask(model, "question.txt")

    assert answer["text"]
    assert ask(model, "-", stdin="What is there to eat?")["text"] == answer["text"]
    assert ask(model, "messages.json")["prompt_tokens"] == answer["prompt_tokens"]
    assert ask(model, "messages.json")["text"] == answer["text"]


def test_messages_have_roles(model: Path, folder: Path) -> None:
    messages = [{"role": role, "content": f"as {role}"} for role in ("system", "user", "assistant", "user")]
    (folder / "messages.json").write_text(json.dumps(messages))
    (folder / "last.json").write_text(json.dumps(messages[-1:]))

    assert ask(model, "messages.json")["prompt_tokens"] > 3 * ask(model, "last.json")["prompt_tokens"]


def test_raw_text_is_gone_on_with(model: Path, folder: Path) -> None:
    (folder / "text.txt").write_text("abc")

    raw, message = ask(model, "text.txt", "--raw"), ask(model, "text.txt")

    assert raw["prompt_tokens"] == len("abc")
    assert raw["prompt_tokens"] < message["prompt_tokens"]


def test_text_is_cached_in_blocks(model: Path, folder: Path) -> None:
    (folder / "one.txt").write_text(f"{LONG}Why?")
    (folder / "other.txt").write_text(f"{LONG}When was that?")

    first, again, other = ask(model, "one.txt"), ask(model, "one.txt"), ask(model, "other.txt")
    uncached = ask(model, "one.txt", "--no-cache")

    assert (first["cached_tokens"], uncached["cached_tokens"]) == (0, 0)
    assert again["cached_tokens"] >= other["cached_tokens"] >= 256
    assert first["text"] == again["text"] == uncached["text"]
    # However it was cut, it is found.
    for name in ("one.txt", "other.txt"):
        found = ask(model, name, "--segment-tokens", "20-80")
        assert found["cached_tokens"] == found["prompt_tokens"] - 1


def test_text_is_compared_too(model: Path, folder: Path) -> None:
    (folder / "one.txt").write_text(LONG)

    result = ask(model, "one.txt", "--compare")

    assert result["uncached"]["cached_tokens"] == 0
    assert result["cached"]["cached_tokens"] >= 256
    assert result["cached"]["text"] == result["uncached"]["text"]


@pytest.mark.parametrize(
    ("name", "content", "options", "parts"),
    [
        ("p.xml", f'<?xml version="1.0"?>\n<!-- a prompt -->\n{PROMPT}', (), ["--schema", "p.xml is a PML prompt"]),
        ("q.txt", " \n", (), ["q.txt", "the prompt is empty"]),
        ("m.json", "[", (), ["m.json", "not JSON"]),
        ("m.json", '{"role": "user"}', (), ["m.json", "list of messages"]),
        ("m.json", '[{"role": "user"}]', (), ["role", "content"]),
        ("m.json", "[]", ("--raw",), ["--raw"]),
        ("prompt.xml", PROMPT, ("--raw", "-s", "schema.xml"), ["--raw and --schema"]),
    ],
)
def test_what_is_neither_text_nor_messages_is_refused(
    model: Path, folder: Path, name: str, content: str, options: tuple[str, ...], parts: list[str]
) -> None:
    (folder / name).write_text(content)

    done = cpucache("run", name, "-m", model, *options)

    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    for part in parts:
        assert part in done.err


def test_an_example_is_answered_by_the_real_model(smollm2: Path) -> None:
    lesson = resource("schemas") / "lesson"
    prompt, schema = lesson / "fractions-for-tom.xml", lesson / "schema.xml"

    answer = json.loads(invoke("run", prompt, "-s", schema, "-m", smollm2, "-n", "2", "--json"))

    assert answer["text"]
    assert answer["encoded_tokens"] > 100


# -- encode ------------------------------------------------------------------------------------------------------------
def test_encode_saves_every_slice_once(model: Path, store_home: Path) -> None:
    first = invoke("encode", "schema.xml", "-m", model, "--threads", "1")
    saved = slices(store_home)
    second = invoke("encode", "schema.xml", "-m", model, "--threads", "1")

    line = re.fullmatch(r"shop: (\d+) slices, (\d+) tokens in \S+ s \(\d+ tok/s\), \S+ kB\n", first)
    assert line
    assert int(line[1]) == len(saved)
    assert second == "shop: all its slices are in the store already\n"
    assert slices(store_home) == saved
    assert run(model)["encoded_tokens"] == 0


def test_encode_saves_what_a_prompt_has_not_encoded(model: Path, store_home: Path) -> None:
    run(model)
    before = slices(store_home)

    line = invoke("encode", "schema.xml", "-m", model, "--threads", "1")

    new = slices(store_home) - before
    assert line.startswith(f"shop: {len(new)} slices, ")
    assert new


def test_encode_takes_several_schemas(model: Path, folder: Path) -> None:
    (folder / "other.xml").write_text('<schema name="other"><module name="m">Something else.</module></schema>')

    lines = invoke("encode", "schema.xml", "other.xml", "-m", model, "--threads", "1").splitlines()

    assert [line.partition(":")[0] for line in lines] == ["shop", "other"]


# -- schema ------------------------------------------------------------------------------------------------------------
def test_check_passes_over_what_is_fine(model: Path) -> None:
    assert invoke("schema", "check", "schema.xml") == "schema.xml: schema 'shop' is fine\n"
    under = invoke("schema", "check", "-", "-m", model, stdin=SCHEMA)
    assert re.fullmatch(rf"-: schema 'shop' is fine under {model.stem}: \d+ reserved positions, \d+ tokens\n", under)


def test_check_goes_through_all_files(folder: Path) -> None:
    (folder / "bad.xml").write_text('<schema name="s">\n<modul name="x">y</modul></schema>')
    (folder / "last.xml").write_text('<schema name="last"><module name="x">y</module></schema>')

    done = cpucache("schema", "check", "bad.xml", "schema.xml", "missing.xml", "last.xml")

    assert done.status == 2
    assert done.out == "schema.xml: schema 'shop' is fine\nlast.xml: schema 'last' is fine\n"
    bad, missing = done.err.splitlines()
    assert re.match(r"cpucache: bad\.xml:2: .*<module>", bad)
    assert missing.startswith("cpucache: missing.xml: ")


def test_check_under_a_model_finds_what_only_its_tokenizer_can_tell(model: Path, folder: Path) -> None:
    parameter = '<parameter name="p" length="2" scaffold="much too long"/>'
    (folder / "long.xml").write_text(f'<schema name="s">\n<module name="m">{parameter}</module></schema>')
    assert invoke("schema", "check", "long.xml")

    done = cpucache("schema", "check", "long.xml", "-m", model)

    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r"cpucache: long\.xml:2: .*'p'.*\n", done.err)


ROW = re.compile(r"(?P<label>.{18}) +(?P<own>[\d,]+)? +(?P<start>[\d,]+)-(?P<end>[\d,]+) +[^·█]*[·█]+ *")


@pytest.mark.parametrize("columns", [60, 120])
def test_show_draws_every_module_on_a_line_of_its_own(model: Path, columns: int) -> None:
    done = cpucache("schema", "show", "schema.xml", "-m", model, COLUMNS=str(columns))

    assert done.status == 0, done.err
    header, *lines, last = done.out.splitlines()
    assert header.split()[:2] == ["tokens", "positions"]
    rows = [ROW.fullmatch(line) for line in lines]
    assert all(rows), "\n".join(lines)
    labels = [row["label"].strip("│├└─ ") for row in rows if row]
    assert labels == ["shop", "hours", "{opens}", "one of 2", "summer", "winter", "news not cached"]
    # What stands for an argument is no segment.
    total = sum(_number(row["own"]) for row, label in zip(rows, labels, strict=True) if row and label != "{opens}")
    assert re.fullmatch(rf"{total:,} tokens in \d+ segments, [\d.]+ MiB, reserved positions", last)
    assert all(len(line) <= columns for line in lines)
    starts = {label: _number(row["start"]) for label, row in zip(labels, rows, strict=True) if row}
    assert starts["summer"] == starts["winter"] > starts["hours"]


def test_show_names_scaffolds(model: Path, folder: Path) -> None:
    modules = "".join(f'<module name="{name}">{name} is a day of the week. </module>' for name in ("monday", "friday"))
    content = f'<scaffold modules="friday monday"/>Root. {modules}'
    (folder / "week.xml").write_text(f'<schema name="week" anchor="none">{content}</schema>')

    *_, whole, scaffold = cpucache("schema", "show", "week.xml", "-m", model, COLUMNS="100").out.splitlines()

    size = re.search(r", ([\d.]+) MiB, reserved positions, anchor none", whole)
    assert size and float(size[1]) > 0
    assert scaffold == "scaffold: monday + friday"


def _number(text: str | None) -> int:
    return int((text or "0").replace(",", ""))

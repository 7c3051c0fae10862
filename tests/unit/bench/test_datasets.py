"""Questions with passages: what is read from files, and in which words and ways it is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cpucache.bench.datasets import Example, Passage, read_examples, selected
from cpucache.bench.tasks import ALL_VARIANTS, TASKS, Variant, parse_variants
from cpucache.errors import InputError
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.tree import Reference, Role, Text, Turn, Union, modules_of, parameters_of, parts
from cpucache.reuse import Fidelity
from tests.support.questions import MULTI_NEWS, MUSIQUE, ORACLE, TREC, write_data


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of examples, or of lines as they are."""
    return partial(write_data, tmp_path)


# ---- reading -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("zipped", [False, True])
def test_longbench_is_read(data: Callable[..., Path], zipped: bool) -> None:
    examples = sorted(read_examples(data(MULTI_NEWS, zipped=zipped)), key=lambda example: example.line)

    assert examples[2] == Example(
        line=3,
        question="",
        passages=(
            Passage("", "The river rose on day 3.\n\nNobody was hurt."),
            Passage("", "A bridge in Passage 3: of the town was closed."),
        ),
        answers=("After 3 days of rain a bridge was closed.",),
    )


def test_longbench_with_classes_is_read(data: Callable[..., Path]) -> None:
    (example,) = read_examples(data(TREC))

    assert example.choices == ("a person", "a place")
    assert example.passages == (Passage("", "Examples of questions."),)


@pytest.mark.parametrize("zipped", [False, True])
def test_musique_is_read(data: Callable[..., Path], zipped: bool) -> None:
    # Whether a file is zipped shows in it, not in its name; blank lines are none.
    path = data([*MUSIQUE[:1], "", *MUSIQUE[1:]], name="anything", zipped=zipped)
    examples = sorted(read_examples(path), key=lambda example: example.line)

    assert [example.line for example in examples] == [1, 3, 4, 5, 6, 7]
    assert examples[1].question == "Who wrote book 1?"
    assert examples[1].answers == ("Ann & Bob", "Bob")
    assert [passage.title for passage in examples[1].passages] == ["", "Paris"]


@pytest.mark.parametrize("zipped", [False, True])
def test_gold_passages_stand_among_those_of_other_questions(data: Callable[..., Path], zipped: bool) -> None:
    path = data(ORACLE, zipped=zipped)
    examples = read_examples(path, passages=4, seed=3)

    indexes = set()
    for example in examples:
        number = example.line - 1
        own = Passage(f"T{number // 2}", f"No. {number}.")
        assert len(set(example.passages)) == len(example.passages) == 4
        assert example.passages.count(own) == 1
        indexes.add(example.passages.index(own))
        # The other passage of the same article may hold the answer as well.
        assert sum(passage.title == own.title for passage in example.passages) == 1
    assert indexes == {0, 1, 2, 3}
    assert {len(example.passages) for example in read_examples(path)} == {5}
    assert {len(example.passages) for example in read_examples(path, passages=1)} == {1}


def test_the_seed_draws(data: Callable[..., Path]) -> None:
    path = data(ORACLE)
    one, again, other = (read_examples(path, seed=seed) for seed in (1, 1, 2))

    assert one == again
    assert [example.line for example in one] != [example.line for example in other]
    assert {example.line for example in one} == {example.line for example in other} == set(range(1, 21))
    assert {example.line: example for example in one} != {example.line: example for example in other}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "data.jsonl: the file has no examples"),
        ([MUSIQUE[0], "{'"], r"data.jsonl:2: not JSON \(.*one object is expected on each line"),
        (["[]"], "data.jsonl:1: an object is expected on each line, not list"),
        ([{"question": "?", "text": "t"}], "data.jsonl:1: no 'answers'"),
        ([{"question": "?", "text": "t", "answers": []}], "data.jsonl:1: 'answers' is empty"),
        ([{"question": "?", "text": "t", "answers": ["a", 1]}], "data.jsonl:1: 'answers' is not a list of texts"),
        ([{"question": "?", "answers": ["a"]}], "data.jsonl:1: no passages: one of 'context', 'ctxs' and 'text'"),
        ([{"text": "?", "answers": ["a"]}], "data.jsonl:1: no 'question'"),
        ([{"question": 3, "text": "t", "answers": ["a"]}], "data.jsonl:1: 'question' is not text"),
        ([{"question": "?", "ctxs": "t", "answers": ["a"]}], "data.jsonl:1: 'ctxs' must be a list of objects"),
        ([{"question": "?", "ctxs": [{"title": "t"}], "answers": ["a"]}], "data.jsonl:1: no 'text'"),
        ([{"context": "t", "answers": ["a"]}], "data.jsonl:1: no 'input'"),
        ([{"context": "Passage 1:\n", "input": "", "answers": ["a"]}], "data.jsonl:1: 'context' is empty"),
        (ORACLE[:5], "data.jsonl:1: the file has 3 passages of other questions, too few for --passages 5"),
    ],
)
def test_a_bad_file_is_told_with_its_line(data: Callable[..., Path], lines: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_examples(data(lines))


def test_a_file_that_can_not_be_read_is_told(data: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing: can't be read: No such file"):
        read_examples(tmp_path / "nothing")
    path = data(ORACLE, zipped=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="the gzip file is damaged"):
        read_examples(path)
    path.write_bytes(b"{}\n\xff\n")
    with pytest.raises(InputError, match=r"data.jsonl:2: not UTF-8"):
        read_examples(path)
    with pytest.raises(InputError, match="the file has several passages for each question; leave out --passages"):
        read_examples(data(MUSIQUE), passages=3)


# ---- asking --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "records"), [("qa", MUSIQUE), ("qa", ORACLE), ("summary", MULTI_NEWS), ("choice", TREC)]
)
def test_every_passage_becomes_a_module(data: Callable[..., Path], task: str, records: list[Any]) -> None:
    for example in read_examples(data(records)):
        asked = TASKS[task]
        schema = parse_schema(asked.schema(example, Variant("fast")))
        prompt = parse_prompt(asked.prompt(example))

        resolve(prompt, schema)
        (system,) = schema.children
        assert isinstance(system, Role)
        assert isinstance(system.children[0], Text)
        modules = modules_of(schema)
        assert list(modules) == [f"p{number}" for number in range(1, len(example.passages) + 1)]
        for module, passage in zip(modules.values(), example.passages, strict=True):
            (text,) = module.children
            assert isinstance(text, Text)
            assert passage.title in text.text
            # XML has no way to write a null character.
            assert passage.text.replace("\x00", " ").strip() in text.text
        assert all(choice in system.children[0].text for choice in example.choices)
        *references, turn = prompt.children
        assert len(references) == len(modules)
        assert isinstance(turn, Text | Turn) and example.question in turn.text


def test_a_choice_needs_choices(data: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="line 1 of the data has no choices"):
        TASKS["choice"].check(read_examples(data(MUSIQUE[:1]))[0])


def test_variants_are_what_their_names_say(data: Callable[..., Path]) -> None:
    (example,) = read_examples(data(MUSIQUE[:1]))
    names = f"{ALL_VARIANTS},high,isolate,recompute:0.2,standalone+recompute:0.1"
    variants = {variant.name: variant for variant in parse_variants(names)}
    schemas = {name: ElementTree.fromstring(TASKS["qa"].schema(example, variant)) for name, variant in variants.items()}

    assert [name for name, variant in variants.items() if not variant.cached] == ["full"]
    assert [name for name, variant in variants.items() if variant.refined] == ["refined"]
    given = {name: variant.fidelity for name, variant in variants.items() if variant.fidelity != Fidelity()}
    assert given == {
        "balanced": Fidelity(0.1),
        "high": Fidelity(exact=True),
        "recompute:0.2": Fidelity(0.2),
        "standalone+recompute:0.1": Fidelity(0.1),
    }
    unanchored = {name for name, schema in schemas.items() if schema.get("anchor") == "none"}
    assert unanchored == {"standalone", "standalone+recompute:0.1"}
    isolated = {name for name, schema in schemas.items() if any(each.get("isolate") for each in schema.iter("module"))}
    assert isolated == {"isolate"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("full,links:3", "unknown variant 'links:3': known are full, standalone, isolate, refined, fast"),
        ("", "unknown variant ''"),
        ("recompute:1.5", "recompute=1.5: must be a share"),
        ("recompute:nan", "recompute=nan: must be a share"),
        ("recompute:much", "variant 'recompute:much'"),
        ("full+recompute:0.1", "unknown variant 'full+recompute:0.1'"),
        ("full,fast,fast", "variant 'fast' is given twice"),
    ],
)
def test_a_variant_that_is_none_is_told(names: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_variants(names)
    assert message in str(raised.value)


# ---- selecting -----------------------------------------------------------------------------------------------------
def test_picked_passages_are_those_of_questions_asked_together(data: Callable[..., Path]) -> None:
    examples = read_examples(data(ORACLE), seed=3)

    picked = selected(examples, seed=3, pick=3, of=6)

    # Twenty questions make three groups of six; what is left over has no schema.
    assert [example.line for example in picked] == [example.line for example in examples[:18]]
    for begin in range(0, 18, 6):
        group = picked[begin : begin + 6]
        assert len({example.passages for example in group}) == 1
        assert group[0].passages == tuple(Passage(f"T{(e.line - 1) // 2}", f"No. {e.line - 1}.") for e in group)
        for number, example in enumerate(group):
            assert example.chosen is not None
            assert len(set(example.chosen)) == len(example.chosen) == 3
            assert number in example.chosen, "the passage with the answer"
    assert len({example.chosen for example in picked}) > 10
    assert {example.chosen.index(at % 6) for at, example in enumerate(picked) if example.chosen} == {0, 1, 2}
    assert picked == selected(examples, seed=3, pick=3, of=6)
    assert picked != selected(examples, seed=4, pick=3, of=6)


def test_a_prompt_names_what_is_chosen_in_its_order(data: Callable[..., Path]) -> None:
    (example, *_) = selected(read_examples(data(ORACLE)), seed=0, pick=3, of=6)
    prompt = parse_prompt(TASKS["qa"].prompt(example))

    assert example.chosen is not None
    assert [each.name for each in prompt.children[:-1] if isinstance(each, Reference)] == [
        f"p{number + 1}" for number in example.chosen
    ]


def test_dropped_passages_hold_no_answer(data: Callable[..., Path]) -> None:
    texts = ["It is HERE, Bob says.", "Nothing.", "More of nothing.", "bob again"]
    record = {"question": "?", "ctxs": [{"title": "", "text": text} for text in texts], "answers": ["Bob"]}
    examples = read_examples(data([record] * 40))

    everything = selected(examples, seed=0, drop=1.0)
    half = selected(examples, seed=0, drop=0.5)
    shuffled = selected(examples, seed=0, shuffle=True)

    assert selected(examples, seed=0) == examples
    assert {example.chosen for example in everything} == {(0, 3)}
    assert {example.chosen for example in half} == {(0, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2, 3)}
    assert {tuple(sorted(example.chosen or ())) for example in shuffled} == {(0, 1, 2, 3)}
    assert len({example.chosen for example in shuffled}) > 10


def test_the_gold_passage_is_never_dropped(data: Callable[..., Path]) -> None:
    # None of the passages has the words of the answer.
    examples = read_examples(data(ORACLE), passages=4)

    dropped = selected(examples, seed=0, drop=1.0)

    assert all(example.chosen == (example.gold,) for example in dropped)


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        (ORACLE, {"pick": 3}, "--pick K needs --of M, where M is at least K"),
        (ORACLE, {"pick": 3, "of": 2}, "--pick K needs --of M, where M is at least K"),
        (ORACLE, {"pick": 3, "of": 21}, "--of 21 needs at least 21 questions; the file has 20"),
        (
            MUSIQUE,
            {"pick": 1, "of": 2},
            "--pick needs a file that has one passage, the one with the answer, for each question",
        ),
    ],
)
def test_a_selection_that_is_impossible_is_told(
    data: Callable[..., Path], records: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        selected(read_examples(data(records)), seed=0, **settings)


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_member_of_each_union_is_named(data: Callable[..., Path], shuffle: bool) -> None:
    examples = selected(read_examples(data(ORACLE)), seed=1, of=7, unions=3, shuffle=shuffle)

    assert len(examples) == 14
    assert examples[0].slots == [range(2), range(2, 4), range(4, 7)]
    ordered = []
    for example in examples:
        assert example.chosen is not None
        assert all(sum(index in slot for index in example.chosen) == 1 for slot in example.slots)
        assert example.gold in example.chosen
        ordered.append(list(example.chosen) == sorted(example.chosen))
        schema = parse_schema(TASKS["qa"].schema(example, Variant("fast")))
        unions = [node for node in parts(schema) if isinstance(node, Union)]
        assert [len(union.members) for union in unions] == [2, 2, 3]
        resolve(parse_prompt(TASKS["qa"].prompt(example)), schema)
    assert all(ordered) != shuffle


def test_every_question_has_an_argument_of_its_own(data: Callable[..., Path]) -> None:
    examples = selected(read_examples(data(ORACLE)), seed=1, pick=2, of=4, argument=True)

    assert len({example.asker for example in examples}) > 10
    for example in examples:
        schema = parse_schema(TASKS["qa"].schema(example, Variant("fast")))
        assert list(parameters_of(schema)) == ["asker"]
        prompt = parse_prompt(TASKS["qa"].prompt(example))
        assert prompt.arguments == {"asker": example.asker}
        resolve(prompt, schema)

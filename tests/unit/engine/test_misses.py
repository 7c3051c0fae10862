"""Why tokens were evaluated again: causes and costs, for prompts put together at random."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.engine.misses import (
    RUN,
    Asked,
    Miss,
    difference_of_answers,
    explain,
    nearest,
    one_line,
    same_answer,
    tools_of,
    turn,
)
from cpucache.layout import RoleRun, Tokens
from tests.support.tries import tries

Message = tuple[str, str]

START, END = "\x01", "\x02"
"""Control tokens."""
SYSTEM = ("system", "You help with a program.\nIt is 10:31.\nThe folder is /home/a/shop.\nBe brief, and say why.")
USER = ("user", "Why does the tower fall over, although it was built by the plan that we made last week?")
SAID = ("assistant", "It falls since the plan has a mistake on page twelve, where two numbers have changed places.")
AGAIN = ("user", "And what can be done about that, with the tools that are in the shed behind the old house?")
TOOLS = [("tools", json.dumps({"name": name, "description": f"does {name} to what it is given"})) for name in "abc"]


def read(tokens: Tokens) -> str:
    return "".join(map(chr, tokens))


def asked(
    *messages: Message, answer: str = "", evaluated: tuple[int, int] | None = None, held: bool = True, **more: Any
) -> Asked:
    """A conversation, a token for each character, of which everything or one run of tokens was evaluated.

    ``held``: there are slices of it.
    """
    text, roles = "", []
    for role, said in messages:
        text += "" if role == "tools" else f"{START}{role}\n"
        roles.append(RoleRun(role, len(text), len(text) + len(said)))
        text += f"{said}\n" if role == "tools" else f"{said}{END}\n"
    text += f"{START}assistant\n"
    tokens = np.array([ord(each) for each in text + answer], np.int32)
    ends = tuple(range(16, len(tokens) + 1, 16)) if held else ()
    runs = ((0, len(text)) if evaluated is None else evaluated,)
    return Asked(tokens, len(text), tuple(roles), ends, runs, **more)


def missed(sent: Asked, *known: Asked, exact: int | None = None) -> Miss | None:
    """Why a prompt was evaluated from where it differs from the nearest known one, or from ``exact`` on."""
    if exact is None:
        found = nearest(sent.prompt, known)
        exact = 0 if found is None else found[1] // 16 * 16
    again = Asked(sent.tokens, sent.size, sent.roles, sent.ends, ((exact, sent.size),), sent.use_cache)
    return explain(again, known, read)


def cause(sent: Asked, *known: Asked) -> str | None:
    found = missed(sent, *known)
    return None if found is None else found.cause


# ---- causes ----------------------------------------------------------------------------------------------------------
def test_nothing_is_lost_where_all_that_was_evaluated_is_new() -> None:
    first = asked(SYSTEM, USER, answer=SAID[1])
    assert cause(asked(SYSTEM, USER, SAID, AGAIN), first) is None
    assert cause(asked(SYSTEM, AGAIN), first) is None
    assert explain(asked(SYSTEM, USER, evaluated=(0, RUN)), [], read) is None


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([("system", SYSTEM[1].replace("10:31", "10:32")), USER, SAID, AGAIN], "line-changed"),
        ([("system", SYSTEM[1].replace("/home/a/shop", "/tmp")), USER, SAID, AGAIN], "line-changed"),
        ([("system", "Be so kind as to answer everything in verse."), USER, SAID, AGAIN], "system-changed"),
        ([USER, SAID, AGAIN], "system-changed"),
        ([SYSTEM, ("user", "What?"), SAID, AGAIN], "message-changed"),
        ([SYSTEM, ("user", "Look."), USER, SAID, AGAIN], "message-changed"),
        ([SYSTEM, USER, ("assistant", "No idea."), AGAIN], "message-changed"),
        ([SYSTEM, USER, AGAIN], "message-changed"),
        ([("system", "Name it."), ("user", "A title?")], "another-text"),
    ],
)
def test_what_has_changed(sent: Sequence[Message], expected: str) -> None:
    known = asked(SYSTEM, USER, SAID, AGAIN, answer="Mend the plan, and build it again.")
    found = missed(asked(*sent), known)
    assert found is not None and found.cause == expected
    assert found.nearest is known
    assert 0 < found.evaluated <= asked(*sent).size


def test_a_reminder_that_moved() -> None:
    reminded = ("user", USER[1] + "\n<system-reminder>The list is empty.</system-reminder>")
    assert cause(asked(SYSTEM, USER, SAID, AGAIN), asked(SYSTEM, reminded, answer=SAID[1])) == "line-changed"
    later = ("user", reminded[1].replace("empty", "long"))
    assert cause(asked(SYSTEM, later, SAID, AGAIN), asked(SYSTEM, reminded, answer=SAID[1])) == "line-changed"


def test_tools() -> None:
    known = asked(SYSTEM, *TOOLS, USER)
    assert cause(asked(SYSTEM, *TOOLS[::-1], USER), known) == "tools-reordered"
    assert cause(asked(SYSTEM, *TOOLS[1:], USER), known) == "tools-changed"
    assert cause(asked(SYSTEM, USER), known) == "tools-changed"
    assert cause(asked(SYSTEM, *TOOLS, USER), asked(SYSTEM, USER)) == "tools-changed"
    # What stands before them counts, not what they are.
    assert cause(asked(("system", SYSTEM[1].replace("10:31", "11:04")), *TOOLS, USER), known) == "line-changed"
    words = [
        ("system", "Call:\n<tools>\n" + "\n".join(text for _, text in order) + "\n</tools>\nBe brief.")
        for order in (TOOLS, TOOLS[::-1])
    ]
    assert cause(asked(words[0], USER), asked(words[1], USER)) == "tools-reordered"
    assert tools_of(asked(words[0], USER), read).texts == [text for _, text in TOOLS]


CALL = {"name": "look", "arguments": {"path": "ä.txt", "line": [1, 2]}}


@pytest.mark.parametrize(
    ("said", "sent", "expected"),
    [
        (SAID[1], SAID[1], "answer-rewritten"),
        (SAID[1], SAID[1].replace(" ", "\n"), "answer-rewritten"),
        (f"Wait.{json.dumps(CALL)}", f"Wait.\n{json.dumps(CALL, ensure_ascii=False, indent=1)}\n", "answer-rewritten"),
        (
            json.dumps(CALL),
            json.dumps({"arguments": json.dumps(CALL["arguments"]), "name": "look"}),
            "answer-rewritten",
        ),
        (f"<think>\nHm.\n</think>\n\n{SAID[1]}", SAID[1], "reasoning-left-out"),
        (f"<think>\nHm.\n</think>\n\n{SAID[1]}", f"<think>\n\n</think>\n\n{SAID[1]}", "reasoning-left-out"),
        (f"<think>\nHm.\n</think>\n\n{SAID[1]}", "No.", "message-changed"),
        (SAID[1], "No.", "message-changed"),
    ],
)
def test_answers_sent_back(said: str, sent: str, expected: str) -> None:
    assert (
        difference_of_answers(f"<|im_start|>assistant\n{said}", f"<|im_start|>assistant\n{sent}<|im_end|>") == expected
    )
    if said != sent:
        known = asked(SYSTEM, USER, answer=said)
        assert (
            cause(asked(SYSTEM, USER, ("assistant", sent), AGAIN), known)
            == (expected if len(sent) > RUN else "message-changed")
            or sent == "No."
        )


def test_what_is_gone_from_the_store() -> None:
    known = asked(SYSTEM, USER, answer=SAID[1])
    sent = asked(SYSTEM, USER, SAID, AGAIN)
    found = missed(sent, known, exact=32)
    assert found is not None and found.cause == "evicted"
    assert found.position == len(known.tokens)
    assert explain(sent, [known], read, points=True).cause == "resume-points"  # type: ignore[union-attr]
    # Where there were no slices none can be gone.
    never = asked(SYSTEM, USER, answer=SAID[1], held=False)
    assert missed(sent, never, exact=32) is None
    # The clock costs more than what is gone.
    other = asked(("system", SYSTEM[1].replace("10:31", "10:32")), USER, SAID, AGAIN)
    assert missed(other, known, exact=16).cause == "line-changed"  # type: ignore[union-attr]


def test_what_was_not_to_be_reused() -> None:
    sent = asked(SYSTEM, USER, use_cache=False)
    assert explain(sent, [asked(SYSTEM, USER)], read) == Miss("cache-off", 0, sent.size)
    assert explain(asked(SYSTEM, USER), [], read) == Miss("nothing-known", 0, sent.size)


def test_the_nearest_prompt_shares_most_wherever_it_stands() -> None:
    conversation = asked(("system", SYSTEM[1].replace("10:31", "10:32")), USER, SAID, AGAIN)
    title = asked(SYSTEM, ("user", "A title for this?"))
    found = nearest(asked(SYSTEM, USER, SAID, AGAIN).prompt, [conversation, title])
    assert found is not None and found[0] is conversation
    # Of equals, the last.
    assert nearest(title.prompt, [asked(SYSTEM, AGAIN), same := asked(SYSTEM, AGAIN)])[0] is same  # type: ignore[index]


# ---- properties ------------------------------------------------------------------------------------------------------
words = st.text("abcdef ", min_size=30, max_size=120)
talks = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), words), min_size=1, max_size=6)


@tries(100)
@given(talk=talks, more=talks, exact=st.integers(0, 400))
def test_numbers_are_within_bounds(talk: list[Message], more: list[Message], exact: int) -> None:
    sent, known = asked(SYSTEM, *talk), asked(SYSTEM, *more)
    found = missed(sent, known, exact=min(exact, sent.size - 1))
    if found is not None:
        assert RUN < found.evaluated <= sent.size - min(exact, sent.size - 1)
        assert 0 <= found.position <= min(sent.size, len(known.tokens))
        assert np.array_equal(sent.tokens[: found.position], known.tokens[: found.position])


@tries(100)
@given(talk=talks, more=talks)
def test_a_conversation_that_goes_on_loses_nothing(talk: list[Message], more: list[Message]) -> None:
    known = asked(SYSTEM, *talk)
    sent = asked(SYSTEM, *talk, *more)
    size = next(iter(np.flatnonzero(sent.tokens[: known.size] != known.tokens)), known.size)
    assert explain(Asked(sent.tokens, sent.size, sent.roles, (), ((int(size), sent.size),)), [known], read) is None or (
        # Unless what is new repeats what was there: a run of ``RUN`` tokens, which counts as shared text.
        any(said in text for _, said in more for text in (read(known.tokens),))
        or nearest(sent.prompt, [known])[2][int(size) :].sum() >= RUN  # type: ignore[index]
    )


@tries(100)
@given(talk=talks)
def test_every_token_is_in_one_turn(talk: list[Message]) -> None:
    prompt = asked(SYSTEM, *talk)
    for run in prompt.roles:
        for position in (run.begin, run.end - 1):
            found = turn(prompt.roles, position, prompt.size)
            assert found.role == run.role
            assert found.begin <= position < found.end
    assert turn(prompt.roles, prompt.size - 1, prompt.size).role == "assistant"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@tries(100)
@given(
    arguments=st.dictionaries(st.text(max_size=5), json_values, min_size=1, max_size=4),
    before=st.sampled_from(["", "One moment. ", "a { b"]),
    indent=st.sampled_from([None, 0, 2]),
    plain=st.booleans(),
)
def test_however_json_is_written_it_is_the_same_answer(
    arguments: dict[str, Any], before: str, indent: int | None, plain: bool
) -> None:
    call = {"name": "look", "arguments": arguments}
    other = {"arguments": dict(reversed(arguments.items())), "name": "look"}
    one = f"{before}<tool_call>\n{json.dumps(call)}\n</tool_call>"
    two = f"{before}\n<tool_call>{json.dumps(other, indent=indent, ensure_ascii=plain)}</tool_call><|im_end|>"
    assert same_answer(one, two) and same_answer(two, one)
    changed = {"name": "look", "arguments": {**arguments, "more": 1}}
    assert not same_answer(one, f"{before}<tool_call>\n{json.dumps(changed)}\n</tool_call>") or "more" in arguments


@tries(100)
@given(lines=st.lists(words, min_size=4, max_size=12, unique=True), at=st.integers(0, 3), new=words)
def test_a_line_that_changed(lines: list[str], at: int, new: str) -> None:
    changed = [*lines[:at], new, *lines[at + 1 :]]
    assert one_line("\n".join(lines), "\n".join(changed))
    assert not one_line("\n".join(lines), "\n".join(f"{number}{line}" for number, line in enumerate(lines))) or (
        len(lines) < 8 and len("\n".join(lines).split()) < 96
    )

"""``ask``, through a pseudo-terminal: modules picked from the list, and questions typed, corrected and pasted."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from cpucache.engine import Engine, Sampling
from cpucache.pml import load_prompt, parse_prompt
from cpucache.pml.canonical import meaning
from tests.support.command import SCHEMA, cpucache
from tests.support.sessions import plain_spoken
from tests.support.terminal import BACKSPACE, CTRL_C, CTRL_D, DOWN, UP, Terminal, pasted, terminal

Tiny = Callable[..., Path]

LENGTH = 8
PICKED = '<prompt schema="shop"><hours opens="nine or ten"/><winter/><user>{}</user></prompt>'
QUESTION = "What is there to eat and to drink for somebody who comes from far away, is hungry, and has little time?"


@pytest.fixture
def speaker(tiny: Tiny) -> Path:
    """A model that only says capital letters, so that its answers are known from what is around them."""
    return plain_spoken(tiny("llama"))


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.xml"
    path.write_text(SCHEMA)
    return path


@contextmanager
def asking(model: Path, schema: Path, *more: str | Path) -> Iterator[Terminal]:
    options = ("-s", schema, "-m", model, "-n", str(LENGTH), "--temp", "0", "--threads", "1", "--plain")
    with terminal("ask", *more, *options) as there:
        there.until("Enter asks")
        yield there


def pick(there: Terminal) -> None:
    """Picks the modules and the argument of ``PICKED``."""
    there.type(" ")
    there.shows("[x] hours")
    there.type(DOWN)
    there.shows("opens, 8 tokens at most:")
    there.type(" or ten")
    there.shows("opens = nine or ten")
    there.type(f"{DOWN} ")
    there.shows("(•) summer")
    there.type(f"{DOWN} ")
    there.shows("(•) winter")
    there.type("\r")
    assert "hours, winter; " in there.until("/help lists the commands")
    there.until("1>")


def answer(there: Terminal) -> tuple[str, int]:
    """The answer that is shown next, and how many tokens of its prompt were evaluated after Enter."""
    shown = there.until(" evaluated ·")
    said = re.findall(rf"[A-Z]{{{LENGTH}}}", shown)
    evaluated = re.search(r"([\d,]+) evaluated ·", shown)
    assert len(said) == 1, shown
    assert evaluated
    return said[0], int(evaluated[1].replace(",", ""))


def expected(model: Path, schema: Path, *questions: str) -> list[str]:
    """The answers of the model to the questions, each asked at once after the picked modules."""
    with Engine(model, threads=1, store=None) as engine:
        engine.add_schema(schema)
        greedy = Sampling(temperature=0)
        return [
            engine.generate(PICKED.format(question), max_tokens=LENGTH, sampling=greedy).text for question in questions
        ]


def test_modules_are_picked_and_asked_about(speaker: Path, schema: Path) -> None:
    with asking(speaker, schema) as there:
        pick(there)
        there.type("What is there?\r")
        first, _ = answer(there)
        there.until("2>")
        there.type("/hlep\r")
        there.until("did you mean /help?")
        there.type("/help\r")
        there.until("pick modules again")
        # The list begins with what was picked before.
        there.type("/modules\r")
        there.shows("opens = nine or ten")
        there.shows("(•) winter")
        there.type("\r")
        there.until("1>")
        there.type("And when?\r")
        second, _ = answer(there)
        there.until("2>")
        there.type(CTRL_D)
        assert there.closed() == 0
    assert [first, second] == expected(speaker, schema, "What is there?", "And when?")


def test_a_selection_is_saved_as_a_prompt_that_gives_the_same_answer(
    speaker: Path, schema: Path, tmp_path: Path
) -> None:
    saved, question = tmp_path / "my prompt.xml", 'Is 3 < 4 & "5" > 1?'
    with asking(speaker, schema) as there:
        pick(there)
        # Before there is a question, only the modules.
        there.type(f"/save {saved}\r")
        there.until("asks the same")
        without_question = load_prompt(saved)
        there.until("1>")
        there.type(f"{question}\r")
        said, _ = answer(there)
        there.until("2>")
        there.type(f"/save {saved}\r")
        there.until("asks the same")
        # Nothing else is replaced.
        for typed, told in (
            (f"/save {schema}", "is not a PML prompt"),
            ("/save", "name the file"),
            (f"/save {tmp_path / 'none' / 'x.xml'}", "No such file"),
            ("/save ~nobody-at-all/x.xml", "No such file"),
        ):
            there.until("2>")
            there.type(f"{typed}\r")
            there.until(told)
        there.until("2>")
        there.type(CTRL_D)
        assert there.closed() == 0
    wanted = parse_prompt(PICKED.format(escape(question)))
    assert meaning(load_prompt(saved)) == meaning(wanted)
    assert meaning(without_question.children) == meaning(wanted.children[:-1])
    assert schema.read_text() == SCHEMA
    options = ("-m", speaker, "-n", str(LENGTH), "--temp", "0", "--threads", "1", "--json")
    done = cpucache("run", saved, "-s", schema, *options)
    assert json.loads(done.out)["text"] == said


def test_what_is_typed_is_evaluated_meanwhile_and_changes_no_answer(speaker: Path, schema: Path) -> None:
    corrected = QUESTION.replace("far away", "nearby")
    with asking(speaker, schema) as there:
        pick(there)
        for word in QUESTION.split(" "):
            there.type(f"{word} ")
            time.sleep(0.05)
        there.type(BACKSPACE)
        time.sleep(1)
        there.type("\r")
        typed, evaluated = answer(there)
        # After the last blank: a word, and the end of the template. Tokens of this model are bytes.
        assert evaluated < 60 < len(QUESTION)

        # A correction in the middle of what has been evaluated already.
        there.until("2>")
        there.type(f"{QUESTION} ")
        time.sleep(1)
        back = len(QUESTION) + 1 - QUESTION.index("far away") - len("far away")
        there.type("\x1b[D" * back + BACKSPACE * len("far away"))
        time.sleep(0.3)
        there.type("nearby")
        time.sleep(0.5)
        there.type("\r")
        mended, _ = answer(there)

        there.until("3>")
        there.type(f"{pasted(QUESTION)}\r")
        at_once, _ = answer(there)
        there.until("4>")
        there.type(CTRL_D)
        assert there.closed() == 0
    assert [typed, mended, at_once] == expected(speaker, schema, QUESTION, corrected, QUESTION)


def test_a_prompt_begins_with_its_modules_and_its_question(speaker: Path, schema: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.xml"
    prompt.write_text(PICKED.format("What is it?"))
    with asking(speaker, schema, prompt) as there:
        there.type("\r")
        there.until("1> What is it?")
        there.type("\r")
        said, _ = answer(there)
        there.until("2>")
        # Ctrl-C clears the line; on an empty line it leaves.
        there.type(f"never asked{CTRL_C}")
        time.sleep(0.2)
        there.type(CTRL_C)
        assert there.closed() == 0
    assert [said] == expected(speaker, schema, "What is it?")


def test_the_list_is_left_without_a_question(speaker: Path, schema: Path) -> None:
    with asking(speaker, schema) as there:
        there.type(f"{UP}{DOWN} ")
        there.type(CTRL_C)
        assert there.closed() == 0


def test_an_argument_that_is_too_long_is_told_in_the_list(speaker: Path, schema: Path) -> None:
    with asking(speaker, schema) as there:
        there.type(f" {DOWN}")
        there.shows("opens, 8 tokens at most:")
        there.type(" o'clock in the morning")
        there.shows("9 more than the 8")
        # Enter does not ask what can't be asked.
        there.type("\r")
        there.type(BACKSPACE * len(" o'clock in the morning"))
        there.shows("to be evaluated\n↑↓ move")
        there.type("\r")
        there.until("1>")
        there.type(CTRL_D)
        assert there.closed() == 0


def test_without_a_terminal_it_names_the_command_that_needs_none(speaker: Path, schema: Path) -> None:
    done = cpucache("ask", "-s", schema, "-m", speaker, stdin="What is there?\n")
    assert done.status == 2
    assert "cpucache run PROMPT" in done.err

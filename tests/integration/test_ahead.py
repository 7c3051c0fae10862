"""What is evaluated ahead, while a prompt is being written: nothing twice, and never another answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpucache.engine import Engine, Preparation, TypingAhead
from cpucache.engine.writing import written
from cpucache.errors import CpucacheError
from cpucache.pml import parse_schema
from tests.support.command import SCHEMA
from tests.support.sessions import SYSTEM, engine, logits, message, plain_spoken
from tests.support.workbench import distance

Tiny = Callable[..., Path]
QUESTION = "What is there to eat, and is it ice cream\nof 11 kinds, or soup? Tell me."
# After Enter: the last word, and the template's text after it. Of the tiny models a byte is a token.
LEFT = len(["Tell", "me."][-1]) + len("<|im_end|>\n<|im_start|>assistant\n")


def pml(text: str) -> dict[str, Any]:
    return {"prompt": f'<prompt schema="shop"><hours opens="ten"/><summer/><user>{text}</user></prompt>'}


def chat(text: str) -> dict[str, Any]:
    return {"prompt": [{"role": "system", "content": message(1, 30)}, {"role": "user", "content": text}]}


def plain(text: str) -> dict[str, Any]:
    return {"text": message(1, 30) + text}


FORMS = pytest.mark.parametrize("form", [pml, chat, plain])


@pytest.fixture
def running(tiny: Tiny, tmp_path: Path) -> Iterator[Engine]:
    with engine(plain_spoken(tiny("llama")), tmp_path) as opened:
        opened.add_schema(parse_schema(SCHEMA))
        yield opened


def typed(ahead: TypingAhead, *texts: str) -> None:
    """Types texts, each instead of the one before, and lets each character be evaluated."""
    before = ""
    for text in texts:
        shared = next((at for at, (one, two) in enumerate(zip(before, text, strict=False)) if one != two), 0)
        for end in range(shared, len(text) + 1):
            ahead.typed(text[:end])
            for _, each in ahead._under_way:
                each.result()
        before = text
    ahead.stop()


def until_ended(*preparations: Preparation) -> None:
    limit = time.monotonic() + 30
    while not all(each.ended for each in preparations):
        assert time.monotonic() < limit
        time.sleep(0.01)


@FORMS
def test_only_the_last_word_is_left(form: Callable[[str], dict[str, Any]], running: Engine) -> None:
    at_once = running.generate(**form(QUESTION), max_tokens=8)
    running.forget()
    # A corrected text is evaluated anew, and nothing remains of the text before the correction.
    other = QUESTION.replace("soup", "tea").replace("11", "12")
    typed(TypingAhead(lambda text: running.prepare(**form(text), unfinished=True)), other, QUESTION)

    answer = running.generate(**form(QUESTION), max_tokens=8)

    assert answer.text == at_once.text
    assert answer.metrics.prompt_tokens == at_once.metrics.prompt_tokens
    assert 0 < answer.metrics.fresh_tokens <= LEFT
    assert answer.metrics.cached_tokens == answer.metrics.prompt_tokens - answer.metrics.fresh_tokens


@FORMS
def test_the_state_is_that_of_the_prompt_at_once(form: Callable[[str], dict[str, Any]], running: Engine) -> None:
    running.generate(**form(QUESTION), max_tokens=1)
    running.forget()
    at_once = logits(running, running.plan(**form(QUESTION)))
    running.forget()
    typed(TypingAhead(lambda text: running.prepare(**form(text), unfinished=True)), QUESTION)

    assert distance(logits(running, running.plan(**form(QUESTION))), at_once) < 1e-3


def test_a_conversation_goes_on_from_what_was_typed(running: Engine) -> None:
    texts = {}
    for name in ("typed", "at once"):
        with running.session(name, system=SYSTEM) as session:
            session.send(message(1), max_tokens=8)
            if name == "typed":
                typed(TypingAhead(session.prepare), message(2, 80) + " And?", QUESTION)
            said = session.send(QUESTION, max_tokens=8)
            texts[name] = said.text
            if name == "typed":
                assert said.metrics.fresh_tokens <= LEFT
            # What was evaluated ahead is saved like any other turn.
            running.forget()
            assert session.send(message(3), max_tokens=8).metrics.fresh_tokens < 120
            assert [entry.text for entry in session.entries if entry.role == "user"][1] == QUESTION
    assert texts["typed"] == texts["at once"]


def test_a_long_paste_is_evaluated_once(running: Engine) -> None:
    """Its segments are saved from what was evaluated ahead."""
    text = message(5, 60) + "\n\n" + message(6, 60) + " So?"
    size = running.plan(**chat(text)).n_tokens
    typed_at = TypingAhead(lambda so_far: running.prepare(**chat(so_far), unfinished=True))
    typed_at.typed(text)
    took = [each.result() for _, each in typed_at._under_way]
    typed_at.stop()

    answer = running.generate(**chat(text), max_tokens=1)

    assert took[-1].evaluated_tokens > size - LEFT
    assert answer.metrics.fresh_tokens <= LEFT
    running.forget()
    assert running.generate(**chat(text), max_tokens=1).metrics.cached_tokens == size - 1


def test_a_new_text_replaces_another(running: Engine) -> None:
    began: list[Preparation] = []

    def prepare(text: str) -> Preparation:
        began.append(running.prepare(**plain(text), unfinished=True))
        return began[-1]

    ahead = TypingAhead(prepare)
    for text in ("one", "one ", "one two", "uno ", "uno due "):
        ahead.typed(text)
    ahead.stop()
    # A change after the last blank starts no preparation.
    assert len(began) == 4
    cancelled = running.prepare(**plain(message(9, 200)), unfinished=True)
    cancelled.cancel()
    with pytest.raises(CpucacheError):
        cancelled.result()
    until_ended(*began)


def test_an_answer_ends_what_is_being_written(running: Engine) -> None:
    unfinished = running.prepare(text=message(7, 120), unfinished=True)
    answer = running.generate(text="Hello", max_tokens=2)
    until_ended(unfinished)

    assert answer.metrics.completion_tokens == 2


def test_a_closed_engine_ends_it(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        unfinished = running.prepare(text=message(8, 150), unfinished=True)
    assert unfinished.ended


@pytest.mark.parametrize(
    ("text", "head"),
    [("", ""), ("word", ""), ("two words", "two "), ("two ", "two "), ("a\nb", "a\n"), ("a \n ", "a \n ")],
)
def test_words_after_the_last_blank_are_held_back(text: str, head: str) -> None:
    assert written(text) == head

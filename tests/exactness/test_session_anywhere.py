"""Conversations with ``reuse="anywhere"``: a document that another prompt holds is not evaluated again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpucache.engine import Engine
from cpucache.engine.session import Session
from cpucache.errors import InputError
from tests.support.oracle import Oracle
from tests.support.reference import ReferenceLlama
from tests.support.sessions import SYSTEM, Said, engine, greedy, message, said
from tests.support.workbench import distance, tolerance

Tiny = Callable[..., Path]

DOCUMENT = "\n\n".join(message(number, 20) for number in range(6))
SEGMENTS = (16, 64)


def asked(running: Engine, session: Session, text: str) -> Said:
    return said(running, session.stream(text, max_tokens=4, sampling=greedy()))


def test_a_document_from_another_prompt_is_spliced(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path, segment_tokens=SEGMENTS) as running:
        oracle = Oracle(ReferenceLlama.of(model), running.kv_cache)
        running.generate(f"{DOCUMENT}\n\nWhat is it?", max_tokens=1)
        with running.session("exact", system=SYSTEM) as session:
            session.send(message(1), max_tokens=4)
            exact = asked(running, session, f"{DOCUMENT}\n\nAnd who?")
        with running.session("anywhere", system=SYSTEM, reuse="anywhere", fidelity="fast") as session:
            session.send(message(2), max_tokens=4)
            answer = asked(running, session, f"{DOCUMENT}\n\nAnd who?")
            after = asked(running, session, message(3))
    for each in (answer, after):
        wanted = oracle.logits(each.stream.plan)
        assert distance(each.rows[0], wanted.astype(np.float32)) < tolerance("llama", "f32")
    assert exact.stream.metrics.foreign_tokens == 0
    size = len(exact.stream.plan.tokens)
    assert exact.fresh > size / 2
    assert answer.stream.metrics.foreign_tokens > size / 2
    assert answer.fresh < exact.fresh / 3


@pytest.mark.parametrize("recompute", ["fast", "balanced"])
def test_a_spliced_message_is_resumed_after_a_restart(recompute: str, tiny: Tiny, tmp_path: Path) -> None:
    """Closed or kept open, the next answer is the same, and no token before its message is evaluated again."""
    answers = []
    for kept_open in (True, False):
        folder = tmp_path / str(kept_open)
        model = tiny("llama")
        with engine(model, folder, segment_tokens=SEGMENTS) as running:
            running.generate(f"{DOCUMENT}\n\nWhat is it?", max_tokens=1)
            with running.session("s", system=SYSTEM, reuse="anywhere", fidelity=recompute) as session:  # type: ignore[arg-type]
                first = asked(running, session, f"{DOCUMENT}\n\nAnd who?")
                assert not first.stream.plan.exact
                if kept_open:
                    answers.append(asked(running, session, message(3)))
        if not kept_open:
            with engine(model, folder, segment_tokens=SEGMENTS) as running, running.session("s") as session:
                answers.append(asked(running, session, message(3)))
    one, other = answers
    assert one.tokens.tolist() == other.tokens.tolist()
    for row, again in zip(one.rows, other.rows, strict=True):
        assert distance(row, again) < tolerance("llama", "f32")
    assert one.fresh <= other.fresh < 100 < len(other.stream.plan.tokens)


def test_slices_that_are_gone_are_evaluated_again(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path, segment_tokens=SEGMENTS) as running:
        running.generate(f"{DOCUMENT}\n\nWhat is it?", max_tokens=1)
        with running.session("s", system=SYSTEM, reuse="anywhere", fidelity="fast") as session:
            asked(running, session, f"{DOCUMENT}\n\nAnd who?")
            texts = [entry.text for entry in session.entries]
    for path in (tmp_path / "slices" / "slices").glob("??/*"):
        path.unlink()
    with engine(model, tmp_path, segment_tokens=SEGMENTS) as running, running.session("s") as session:
        assert [entry.text for entry in session.entries] == texts
        again = asked(running, session, message(3))
        assert again.stream.plan.exact
        assert again.fresh == len(again.stream.plan.tokens)


def test_typing_ahead_leaves_the_answer_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    answers = []
    for ahead in (False, True):
        with engine(tiny("llama"), tmp_path / str(ahead), segment_tokens=SEGMENTS) as running:
            running.generate(f"{DOCUMENT}\n\nWhat is it?", max_tokens=1)
            with running.session("s", system=SYSTEM, reuse="anywhere", fidelity="fast") as session:
                if ahead:
                    session.prepare(f"{DOCUMENT}\n\nAnd who").result()
                answers.append(asked(running, session, f"{DOCUMENT}\n\nAnd who?"))
    assert answers[0].stream.text == answers[1].stream.text
    assert answers[1].fresh <= answers[0].fresh


def test_what_reuse_may_be(tiny: Tiny, tmp_path: Path) -> None:
    with (
        engine(tiny("llama"), tmp_path) as running,
        pytest.raises(InputError, match="reuse='near': must be one of"),
    ):
        running.session("s", reuse="near")  # type: ignore[arg-type]

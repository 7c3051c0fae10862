"""Conversations across processes: one turn each, two at once, and killed at any moment.

The same at full size: ``python bench/session_stress.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpucache import Sampling
from cpucache.errors import CpucacheError
from tests.support import sessions
from tests.support.sessions import SYSTEM, engine, message, rendered, said, truth
from tests.support.workbench import distance, tolerance

Tiny = Callable[..., Path]


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_one_turn_in_each_process(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    endings: list[dict[str, Any]] = [
        {"max_tokens": 9},
        {"max_tokens": 50, "sampling": Sampling(stop=tuple("abcdefghijklmnopqrstuvwxyz"))},
        {"max_tokens": 1},
        {"max_tokens": 6},
    ]
    unsaved = 0
    with truth(tiny(arch)) as true:
        for number, ending in enumerate(endings):
            told = sessions.elsewhere(sessions.take_turn, tiny(arch), tmp_path, "s", message(number), ending)
            new = len(told.prompt) - true.known(told.prompt)
            assert new <= told.fresh <= new + (unsaved if arch == "mamba" else 0)
            unsaved = len(told.tokens) - len(told.prompt) + new
            for row, expected in zip(told.rows, true.rows(told.tokens, len(told.rows)), strict=True):
                assert distance(row, expected) < tolerance(arch, "f32")
    with engine(tiny(arch), tmp_path) as running, running.session("s") as session:
        assert [entry.text for entry in session.entries[1::2]] == [message(number) for number in range(4)]


def test_two_processes_on_one_session(tiny: Tiny, tmp_path: Path) -> None:
    """One has it, the other is told so; and gets it, whole, when the first is dead."""
    model = tiny("llama")
    holder = sessions.Holder(model, tmp_path, "s")
    try:
        with engine(model, tmp_path) as running:
            for _ in range(2):
                with pytest.raises(CpucacheError, match="'s' is open in another window or program"):
                    running.session("s")
            # Others are open to anyone, and so is the engine.
            with running.session("other") as other:
                other.send(message(1), max_tokens=2)
                with pytest.raises(CpucacheError, match="is open in another"):
                    running.session("other")
            holder.kill()
            with running.session("s") as session, truth(model) as true:
                assert [entry.role for entry in session.entries] == ["system", "user", "assistant"]
                answer = said(running, session.stream(message(2), max_tokens=4))
                assert answer.fresh == len(answer.stream.plan.tokens) - sum(sessions.sizes(session)[:3])
                true.check("llama", answer)
    finally:
        holder.kill()


def test_a_process_on_one_session_while_another_has_one_of_the_same_folder(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    holder = sessions.Holder(model, tmp_path, "s")
    try:
        told = sessions.elsewhere(sessions.take_turn, model, tmp_path, "t", message(1), {"max_tokens": 4})
        # The system text is what both begin with.
        with engine(model, tmp_path) as running, running.session("t") as session:
            assert told.fresh == len(told.prompt) - sessions.sizes(session)[0]
            assert session.entries[0].text == SYSTEM
        with pytest.raises(CpucacheError, match="'s' is open in another"):
            sessions.elsewhere(sessions.take_turn, model, tmp_path, "s", message(1), {"max_tokens": 4})
    finally:
        holder.kill()


@pytest.mark.parametrize("arch", ["llama", "mamba"])
@pytest.mark.parametrize("killed_in", ["prefill", "decode"])
def test_the_message_that_was_being_answered_is_kept(killed_in: str, arch: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(arch)
    sessions.Holder(model, tmp_path, "s", answering=killed_in).kill()
    with engine(model, tmp_path) as running, truth(model) as true, running.session("s") as session:
        assert [entry.role for entry in session.entries] == ["system", "user", "assistant", "user"]
        assert session.entries[-1].text == message(2)
        assert session.unanswered
        answer = said(running, session.stream(max_tokens=4))
        assert rendered(running, answer.stream.plan.tokens).count(message(2)) == 1
        true.check(arch, answer)
        assert not session.unanswered
        true.check(arch, said(running, session.stream(message(3), max_tokens=4)))
        assert [entry.role for entry in session.entries[3:]] == ["user", "assistant"] * 2


def test_an_unanswered_message_may_be_left_so(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    sessions.Holder(model, tmp_path, "s", answering="prefill").kill()
    with engine(model, tmp_path) as running, running.session("s") as session, truth(model) as true:
        true.check("llama", said(running, session.stream(message(3), max_tokens=4)))
        assert [entry.role for entry in session.entries[3:]] == ["user", "user", "assistant"]
        true.check("llama", said(running, session.regenerate(max_tokens=4)))
    with engine(model, tmp_path) as running, running.session("s") as session, truth(model) as true:
        true.check("llama", said(running, session.stream(message(4), max_tokens=4)))


def test_killed_a_hundred_times(tiny: Tiny, tmp_path: Path) -> None:
    """At most the turn under way is lost, what is there opens, and goes on exactly."""
    seen = sessions.crash(tiny("llama"), tmp_path, 100)
    assert seen.bad == []
    assert (seen.kills, seen.checked) == (100, 10)
    # A message that is not answered yet is kept, too.
    assert seen.turns + seen.unanswered > 100
    assert seen.unanswered < 100

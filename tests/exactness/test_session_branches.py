"""Conversations that go back, fork, and begin with a PML prompt."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cpucache.engine import Engine, Sampling
from cpucache.errors import CpucacheError, InputError
from cpucache.pml import parse_schema
from cpucache.reuse import Plan, Slice, Span, reading
from cpucache.runtime import Run
from tests.support import sessions
from tests.support.command import PROMPT, SCHEMA
from tests.support.sessions import SYSTEM, engine, message, rendered, said, shared, sizes, truth
from tests.support.tiny import ARCHS, ATTENTION_ARCHS, RECURRENT_ARCHS
from tests.support.workbench import Bench, Logits, Tokens, distance, opened, tolerance

Tiny = Callable[..., Path]

archs = pytest.mark.parametrize("arch", ATTENTION_ARCHS)
resumed = pytest.mark.parametrize("reopened", [False, True], ids=["in the context", "reopened"])


# ---- answering again -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ARCHS)
def test_answering_again(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """One token is evaluated: the last one before the answer, whose logits it begins with."""
    model = tiny(arch)
    with truth(model) as true, engine(model, tmp_path) as running, running.session("s", system=SYSTEM) as session:
        session.send(message(1), max_tokens=5)
        first = said(running, session.stream(message(2), max_tokens=9))
        before = session.entries
        again = said(running, session.regenerate(max_tokens=12, sampling=Sampling(temperature=3.0, seed=7)))
        assert arch in RECURRENT_ARCHS or again.fresh == 1
        assert again.stream.plan.tokens.tolist() == first.stream.plan.tokens.tolist()
        assert distance(again.rows[0], first.rows[0]) < tolerance(arch, "f32")
        assert again.stream.text != first.stream.text
        assert [entry.text for entry in session.entries[:-1]] == [entry.text for entry in before[:-1]]
        assert session.entries[-1].text == again.stream.text
        true.check(arch, again)
        true.check(arch, said(running, session.stream(message(3), max_tokens=5)))
    with truth(model) as true, engine(model, tmp_path) as running, running.session("s") as session:
        again = said(running, session.regenerate(max_tokens=3))
        assert arch in RECURRENT_ARCHS or again.fresh == 1
        true.check(arch, again)
        # And as often as one likes.
        assert said(running, session.regenerate(max_tokens=3)).stream.text == again.stream.text
        assert len(session.entries) == 7


@archs
def test_answering_the_first_message_again(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(arch)
    with truth(model) as true, engine(model, tmp_path) as running, running.session("s") as session:
        session.send(message(1), max_tokens=5)
        again = said(running, session.regenerate(max_tokens=5))
        assert again.fresh == 1
        true.check(arch, again)


# ---- another message instead of one ----------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("number", [1, 2, 4])
@resumed
def test_editing_a_message(arch: str, number: int, reopened: bool, tiny: Tiny, tmp_path: Path) -> None:
    """Only the new message is evaluated, and the new message does not attend to what followed the old one."""
    model = tiny(arch)
    with engine(model, tmp_path) as running, running.session("s", system=SYSTEM) as session:
        for each in range(1, 5):
            last = said(running, session.stream(message(each), max_tokens=5))
        before = [entry.text for entry in session.entries]
        if not reopened:
            edited = said(running, session.edit(number, "Something else?", max_tokens=4))
    with engine(model, tmp_path) as running, running.session("s") as session, truth(model) as true:
        if reopened:
            edited = said(running, session.edit(number, "Something else?", max_tokens=4))
        kept = 1 + 2 * (number - 1)
        assert [entry.text for entry in session.entries] == [*before[:kept], "Something else?", edited.stream.text]
        prompt = edited.stream.plan.tokens
        known = sum(sizes(session)[:kept])
        if not reopened and arch not in RECURRENT_ARCHS:
            # What the context still holds of the old message: how it begins.
            assert shared(prompt, last.tokens) >= known
            known = shared(prompt, last.tokens)
        assert edited.fresh == len(prompt) - known
        true.check(arch, edited)
        answer = said(running, session.stream(message(9), max_tokens=4))
        assert true.known(answer.stream.plan.tokens) == len(true.held)
        true.check(arch, answer)


@archs
@resumed
def test_editing_a_message_that_has_left_the_context(arch: str, reopened: bool, tiny: Tiny, tmp_path: Path) -> None:
    """The new message attends to the turns that the old one attended to; none of these turns is evaluated."""
    model = tiny(arch)
    with truth(model) as true:
        with engine(model, tmp_path, n_ctx=512) as running, running.session("s", system=SYSTEM) as session:
            left: list[int] = []
            while len(left) < 8 or left[-1] < 6:
                session.send(message(len(left), 14), max_tokens=5)
                left.append(session.left_out)
            session.fork("middle")
            if not reopened:
                edited = said(running, session.edit(3, "Something else?", max_tokens=4))
        with engine(model, tmp_path, n_ctx=512) as running, running.session("s") as session:
            if reopened:
                edited = said(running, session.edit(3, "Something else?", max_tokens=4))
            assert session.left_out == 0
            assert len(session.entries) == 1 + 2 * 3
            assert message(0, 14) in rendered(running, edited.stream.plan.tokens)
            assert edited.fresh == len(edited.stream.plan.tokens) - sum(sizes(session)[:-2])
            true.check(arch, edited)
        # Between two truncations: the new message does not attend to the turns that had left by then.
        with engine(model, tmp_path, n_ctx=512) as running, running.session("middle") as session:
            number = next(index for index, count in enumerate(left) if count) + 2
            edited = said(running, session.edit(number, "Something else?", max_tokens=4))
            assert left[number - 2] <= session.left_out <= left[number - 1] < left[-1]
            seen = session.entries[1 + session.left_out : -2]
            assert edited.fresh == len(edited.stream.plan.tokens) - session.n_tokens + sum(sizes(session)[-2:])
            assert all(entry.text in rendered(running, edited.tokens) for entry in seen if entry.role == "user")
            true.check_replayed(arch, session, edited)


# ---- forks -----------------------------------------------------------------------------------------------------------
@archs
def test_forks_go_on_separately(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(arch)
    with engine(model, tmp_path) as running, truth(model) as one, truth(model) as two:
        session = running.session("s", system=SYSTEM)
        for number in range(3):
            last = said(running, session.stream(message(number), max_tokens=5))
        running.store.flush()
        before = sessions.files(tmp_path)
        session.fork("other")
        other = running.session("other")
        assert [entry.text for entry in other.entries] == [entry.text for entry in session.entries]
        for true in (one, two):
            true.rows(last.tokens, 1)
        for number in range(3, 6):
            for name, true, each in (("this", one, session), ("that", two, other)):
                answer = said(running, each.stream(f"{name} {message(number)}", max_tokens=5))
                prompt, known = answer.stream.plan.tokens, len(true.held)
                if arch not in RECURRENT_ARCHS:
                    # The other fork's message begins alike, and is in the context.
                    known = max(known, shared(prompt, last.tokens))
                assert answer.fresh == len(prompt) - known
                true.check(arch, answer)
                last = answer
        assert [entry.text[:4] for entry in session.entries[7::2]] == ["this"] * 3
        assert [entry.text[:4] for entry in other.entries[7::2]] == ["that"] * 3
        running.store.flush()
        # What both share is there once.
        assert (before, sessions.files(tmp_path)) == (1 + 3 * 2, 1 + 3 * 2 + 2 * 3 * 2)


def test_a_fork_needs_nothing_evaluated_in_another_engine(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path) as running, running.session("s", system=SYSTEM) as session:
        for number in range(3):
            session.send(message(number), max_tokens=5)
        session.fork("whole")
        session.fork("part", 3)
        with pytest.raises(InputError, match="there is a conversation 'part' already"):
            session.fork("part")
    before = sessions.files(tmp_path)
    for name, messages in (("whole", 7), ("part", 3)):
        with engine(model, tmp_path) as running, running.session(name, system=SYSTEM) as session, truth(model) as true:
            assert len(session.entries) == messages
            answer = said(running, session.stream(message(3), max_tokens=5))
            assert answer.fresh == len(answer.stream.plan.tokens) - sum(sizes(session)[:messages])
            true.check("llama", answer)
    assert sessions.files(tmp_path) == before + 4


def test_forks_that_say_the_same_share_that_too(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running, running.session("s", system=SYSTEM) as session:
        session.send(message(1), max_tokens=5)
        session.fork("other")
        with running.session("other") as other:
            assert session.send(message(2), max_tokens=5).text == other.send(message(2), max_tokens=5).text
        running.store.flush()
        assert sessions.files(tmp_path) == 5


# ---- beginning with a PML prompt -------------------------------------------------------------------------------------
def defined(bench: Bench, plan: Plan, modules: Iterable[Slice], answer: Tokens) -> Logits:
    """The logits that a plan with an answer ends with by its definition.

    Each slice of ``modules`` was evaluated after its own context; every other token was evaluated after all tokens
    before it.
    """
    known = {slice_.key: slice_ for slice_ in modules}
    assert known.keys() & {slice_.key for slice_ in plan.slices}
    spans = [Span(each.start, each.tokens, known.get(each.slice.key) if each.slice else None) for each in plan.spans]
    if len(answer):
        spans.append(Span(plan.end, answer))
    return bench.expected(Plan(tuple(spans)))


@archs
def test_a_session_that_begins_with_a_prompt(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """Its modules come from the store, and nobody needs the schema afterwards."""
    model = tiny(arch)
    with opened(model) as context:
        with engine(model, tmp_path) as running:
            layout = running.add_schema(parse_schema(SCHEMA))
            running.encode("shop")
            modules = reading(layout, running.slices, running.context.n_ctx - 1)
            direct = said(running, running.stream(PROMPT, max_tokens=4))
            bench = Bench(running.kv_cache, context)  # type: ignore[arg-type]
            # What the first answer left in the context would be taken, too.
            running.forget()
            with running.session("s", prompt=PROMPT) as session:
                assert session.unanswered
                answer = said(running, session.stream(max_tokens=4))
                assert answer.stream.plan.tokens.tolist() == direct.stream.plan.tokens.tolist()
                assert answer.stream.metrics.cached_tokens == direct.stream.plan.n_cached
                # What is new in the prompt is a slice as well, but for the last token.
                assert distance(answer.rows[0], direct.rows[0]) < tolerance(arch, "f32")
                plan = answer.stream.plan
                ends = defined(bench, plan, modules, answer.tokens[plan.n_tokens :])
                assert distance(answer.rows[-1], ends) < tolerance(arch, "f32")
                assert not session.unanswered
                assert session.entries[0].role == "prompt"
            with pytest.raises(InputError, match="another prompt"):
                running.session("s", prompt=PROMPT.replace("<summer/>", "<winter/>"))
            running.session("s", prompt=PROMPT).close()
        evaluated = plan.n_tokens + answer.stream.evaluated
        for number in range(3):
            with engine(model, tmp_path) as running, running.session("s") as session:
                bench = Bench(running.kv_cache, context)
                answer = said(running, session.stream(message(number), max_tokens=4))
                plan = answer.stream.plan
                assert answer.fresh == plan.n_tokens - evaluated
                begins = defined(bench, plan, modules, answer.tokens[:0])
                ends = defined(bench, plan, modules, answer.tokens[plan.n_tokens :])
                assert distance(answer.rows[0], begins) < tolerance(arch, "f32")
                assert distance(answer.rows[-1], ends) < tolerance(arch, "f32")
                evaluated = plan.n_tokens + answer.stream.evaluated


@pytest.mark.parametrize("encoded", [False, True])
def test_a_beginning_is_evaluated_once_and_keeps_its_keys(encoded: bool, tiny: Tiny, tmp_path: Path) -> None:
    """Whatever the product is set to by itself, in another process, and when better slices have come meanwhile."""

    def opened() -> Engine:
        running = Engine(tiny("llama"), store=tmp_path / "slices", sessions=tmp_path / "sessions", threads=1)
        running.add_schema(parse_schema(SCHEMA))
        return running

    # Its modules follow other modules than those in the contexts of their slices.
    picked = '<prompt schema="shop"><winter/><hours opens="ten"/><user>What is there to eat?</user></prompt>'
    with opened() as running:
        if encoded:
            running.encode("shop")
        with running.session("s", prompt=picked) as session:
            session.send(max_tokens=4)
            keys, first = session.keys, session.n_tokens
        assert keys
        running.encode("shop")
        running.encode_for(picked, fidelity="high")
    for _ in range(3):
        with opened() as running, running.session("s", prompt=picked) as session:
            assert session.keys == keys
            metrics = session.send("And to drink?", max_tokens=4).metrics
            assert metrics.encoded_tokens == 0
            assert metrics.cached_tokens == first
            assert session.keys[: len(keys)] == keys
            keys, first = session.keys, session.n_tokens


@pytest.mark.parametrize("arch", ["llama", "mpt", "gemma3"])
@resumed
def test_a_session_that_begins_with_a_prompt_is_truncated(
    arch: str, reopened: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """Modules stay, turns leave, and the turns after these move to lower positions."""
    model = tiny(arch)
    with opened(model) as context, engine(model, tmp_path, n_ctx=512) as running:
        running.add_schema(parse_schema(SCHEMA))
        direct = running.plan(PROMPT)
        session = running.session("s", prompt=PROMPT)
        answer = said(running, session.stream(max_tokens=4))
        held, plan = answer.tokens, answer.stream.plan
        truth = Bench(running.kv_cache, context)  # type: ignore[arg-type]
        defined(truth, plan, direct.slices, held[plan.n_tokens :])
        end = context.last_position(0) + 1
        # The position after the prompt, wherever the prompt begins here.
        begin = end - len(held) + sizes(session)[0]
        gone = 0
        for number in range(12):
            if reopened:
                session.close()
                running.store.flush()
                running.forget()
                running.store.ram.clear()
                session = running.session("s")
            counts = sizes(session)
            answer = said(running, session.stream(message(number, 14), max_tokens=4))
            if session.left_out > gone:
                count = sum(counts[1 + gone : 1 + session.left_out])
                first = sum(counts[:1])
                context.remove(0, begin, begin + count)
                context.shift(0, -count, begin + count)
                held = np.delete(held, slice(first, first + count))
                end, gone = end - count, session.left_out
            prompt = answer.stream.plan.tokens
            assert prompt[: len(held)].tolist() == held.tolist()
            assert answer.fresh == len(prompt) - len(held)
            new = answer.tokens[len(held) :]
            rows = context.decode([Run(0, end, new)], logits="all")
            assert rows is not None
            for row, expected in zip(answer.rows, rows[-len(answer.rows) :], strict=True):
                assert distance(row, expected) < tolerance(arch, "f32")
            held, end = answer.tokens, end + len(new)
        assert gone > 2
        session.close()


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *(("key", 3), ("key", "xy"), ("context", None), ("attends_to", ["abc"]), ("attends_to", "abcd"), ("start", -1)),
        *(("at", "0"), ("count", None), ("tokens", [-1]), ("module", None), ("attended_tokens", 1.5)),
    ],
    ids=str,
)
def test_a_damaged_beginning_is_named(member: str, value: object, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(parse_schema(SCHEMA))
        with running.session("s", prompt=PROMPT) as session:
            pieces = session.entries[0].pieces
    pieces["spans"][-1][member] = value
    (path,) = (tmp_path / "sessions").glob("*.sqlite")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE entries SET pieces = ?", [json.dumps(pieces)])
    with engine(tiny("llama"), tmp_path) as running:
        with pytest.raises(CpucacheError, match=r"conversation 's' is damaged .* no valid tokens"):
            running.session("s")
        running.session("other").close()


def test_a_prompt_and_a_system_text_exclude_each_other(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(parse_schema(SCHEMA))
        with pytest.raises(InputError, match="a system text or a prompt, not both"):
            running.session("s", system=SYSTEM, prompt=PROMPT)
        # Nobody was left waiting at the door.
        running.session("s").close()

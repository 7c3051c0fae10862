"""When the context overflows, old turns leave, and the cells of the other turns move to lower positions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cpucache.engine import Engine
from cpucache.engine.session import Session
from cpucache.errors import ContextFull
from tests.support.sessions import SYSTEM, Said, Truth, engine, message, patience, rendered, said, sizes, truth
from tests.support.tiny import ARCHS, ATTENTION_ARCHS
from tests.support.workbench import distance, tolerance

Tiny = Callable[..., Path]

N_CTX = 512
ROOM = 6  # tokens of an answer
TURNS = 12


class Talk:
    """A conversation in a small context, and the truth that follows it."""

    def __init__(self, arch: str, model: Path, folder: Path, true: Truth, when_full: str, *, reopened: bool) -> None:
        self.arch, self.true = arch, true
        self._model, self._folder, self._when_full, self._reopened = model, folder, when_full, reopened
        self._opened = ExitStack()
        self.running: Engine
        self.session: Session
        self.number = 0

    def open(self) -> None:
        """Anew, as if in another process."""
        self._opened.close()
        self.running = self._opened.enter_context(engine(self._model, self._folder, n_ctx=N_CTX))
        self.session = self._opened.enter_context(
            self.running.session("s", system=SYSTEM, when_full=self._when_full)  # type: ignore[arg-type]
        )

    def close(self) -> None:
        self._opened.close()

    def turn(self) -> Said:
        """The next turn. The truth lets the same tokens leave."""
        if self._reopened or not self.number:
            self.open()
        counts, gone = (sizes(self.session), self.session.left_out) if self.number else ([], 0)
        answer = said(self.running, self.session.stream(message(self.number, words=14), max_tokens=ROOM))
        self.number += 1
        if self.session.left_out > gone:
            first = 1 + gone
            begin = counts[0]
            end = begin + sum(counts[first : 1 + self.session.left_out])
            assert answer.stream.metrics.left_out_tokens == end - begin
            if self.arch != "mamba":
                self.true.leave_out(begin, end)
        else:
            assert answer.stream.metrics.left_out_tokens == 0
        return answer


@contextmanager
def talk(arch: str, tiny: Tiny, folder: Path, when_full: str = "oldest", *, reopened: bool = False) -> Iterator[Talk]:
    with truth(tiny(arch), n_ctx=2048) as true:
        talking = Talk(arch, tiny(arch), folder, true, when_full, reopened=reopened)
        try:
            yield talking
        finally:
            talking.close()


archs = pytest.mark.parametrize("arch", ATTENTION_ARCHS)
resumed = pytest.mark.parametrize("reopened", [False, True], ids=["in the context", "reopened"])
policies = pytest.mark.parametrize("when_full", ["oldest", "half"])


@archs
@policies
@resumed
def test_the_state_after_truncation_is_the_same_cells_shifted(
    arch: str, when_full: str, reopened: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """Several times in a row. No token is evaluated twice, and the system text stays."""
    left: list[int] = []
    with talk(arch, tiny, tmp_path, when_full, reopened=reopened) as talking:
        for _ in range(TURNS):
            answer = talking.turn()
            prompt = answer.stream.plan.tokens
            assert talking.true.known(prompt) == len(talking.true.held), "another conversation"
            assert answer.fresh == len(prompt) - len(talking.true.held)
            talking.true.check(arch, answer)
            assert rendered(talking.running, prompt).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
            assert len(prompt) + ROOM <= N_CTX
            left.append(talking.session.left_out)
        # Whole turns, and more and more of them.
        assert all(count % 2 == 0 for count in left)
        assert left == sorted(left)
        assert len(set(left)) > 2
        # What stays knows of what has left: evaluated without that it is something else.
        expected = answer.rows[-1]
        talking.true.context.clear()
        talking.true.held = talking.true.held[:0]
        assert distance(talking.true.rows(answer.tokens, 1)[0], expected) > 5 * tolerance(arch, "f32")


@policies
def test_how_many_turns_leave(when_full: str, tiny: Tiny, tmp_path: Path) -> None:
    """As many of the oldest as must, or half of those that are there, again and again."""
    with talk("llama", tiny, tmp_path, when_full) as talking:
        for number in range(TURNS):
            before, gone = (sizes(talking.session), talking.session.left_out) if number else ([0], 0)
            answer = talking.turn()
            there = before[0] + sum(before[1 + gone :])
            new = len(answer.stream.plan.tokens) - (there - answer.stream.metrics.left_out_tokens)
            expected = gone
            while before[0] + sum(before[1 + expected :]) + new + ROOM > N_CTX:
                turns = (len(before) - 1 - expected) // 2
                expected += 2 if when_full == "oldest" else 2 * -(-turns // 2)
            assert talking.session.left_out == expected
        assert expected > 2


@pytest.mark.parametrize("arch", ["llama", "mpt", "falcon"])
def test_in_the_context_nothing_is_loaded(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    with talk(arch, tiny, tmp_path) as talking:
        talking.turn()
        context = talking.running.context
        load = context.load
        loads: list[object] = []
        context.load = lambda *rest: loads.append(rest) or load(*rest)  # type: ignore[method-assign, func-returns-value]
        for _ in range(1, TURNS):
            talking.turn()
        assert talking.session.left_out > 2
        assert loads == []


@pytest.mark.parametrize("reopened", [False, True], ids=["in the context", "reopened"])
@policies
def test_a_model_that_cannot_shift_evaluates_what_stays_again(
    reopened: bool, when_full: str, tiny: Tiny, tmp_path: Path
) -> None:
    with talk("mamba", tiny, tmp_path, when_full, reopened=reopened) as talking:
        for _ in range(TURNS):
            answer = talking.turn()
            talking.true.check("mamba", answer)
            assert rendered(talking.running, answer.tokens).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
            assert len(answer.stream.plan.tokens) + ROOM <= N_CTX
        assert talking.session.left_out > 2


def test_a_model_that_cannot_shift_evaluates_what_stays_seldom(tiny: Tiny, tmp_path: Path) -> None:
    """It leaves out half of its turns at once, so that most turns cost what they do before the context is full."""
    with talk("mamba", tiny, tmp_path) as talking:
        fresh, cuts = [], 0
        for _ in range(3 * TURNS):
            gone = talking.session.left_out if talking.number else 0
            answer = talking.turn()
            cuts += talking.session.left_out > gone
            fresh.append(answer.fresh)
        assert cuts >= 3
        longest = max(sizes(talking.session))
        assert sum(count > 2 * longest for count in fresh) == cuts < TURNS


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_slices_that_are_gone_are_evaluated_again_after_the_turns_that_left(
    arch: str, tiny: Tiny, tmp_path: Path
) -> None:
    with talk(arch, tiny, tmp_path, reopened=True) as talking:
        for number in range(TURNS):
            if number == TURNS - 1:
                talking.close()
                shutil.rmtree(tmp_path / "slices")
            with patience(5):
                answer = talking.turn()
            talking.true.check(arch, answer)
        assert talking.session.left_out > 2


def test_the_cost_of_the_alternative_is_told(tiny: Tiny, tmp_path: Path) -> None:
    with talk("llama", tiny, tmp_path) as talking:
        costs = []
        for _ in range(TURNS):
            metrics = talking.turn().stream.metrics
            assert (metrics.left_out_tokens > 0) == (metrics.recompute_ms > 0)
            costs.append(metrics.recompute_ms)
        assert any(costs)


@pytest.mark.parametrize("arch", ARCHS)
def test_refusing(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """A clear error, and the session is what it was."""
    with talk(arch, tiny, tmp_path, "refuse") as talking:
        with pytest.raises(ContextFull) as refused:
            for _ in range(TURNS):
                talking.true.check(arch, talking.turn())
        assert talking.number > 2
        error = str(refused.value)
        assert "session 's': " in error
        assert f"leave no room for an answer in a context of {N_CTX}" in error
        assert "raise --ctx (n_ctx=…)" in error
        assert "let old turns leave (when_full='oldest')" in error
        session = talking.session
        entries = session.entries
        assert len(entries) == 1 + 2 * talking.number
        assert session.left_out == 0
        # Going back frees cells.
        answer = said(talking.running, session.edit(talking.number, "!", max_tokens=2))
        talking.true.check(arch, answer)
        assert session.entries[:-2] == entries[:-2]
        talking.true.check(arch, said(talking.running, session.stream("?", max_tokens=1)))
        assert session.left_out == 0


def test_a_session_that_refused_goes_on_with_another_policy(tiny: Tiny, tmp_path: Path) -> None:
    with talk("llama", tiny, tmp_path, "refuse") as talking:
        with pytest.raises(ContextFull):
            for _ in range(TURNS):
                talking.true.check("llama", talking.turn())
        talking._when_full = "half"
        talking.open()
        answer = talking.turn()
        assert talking.session.left_out > 0
        assert answer.fresh == len(answer.stream.plan.tokens) - len(talking.true.held)
        talking.true.check("llama", answer)


@pytest.mark.parametrize("when_full", ["oldest", "half", "refuse"])
@pytest.mark.parametrize("turns", [0, 2, 8])
def test_a_message_that_no_context_takes(when_full: str, turns: int, tiny: Tiny, tmp_path: Path) -> None:
    if when_full == "refuse" and turns == 8:
        pytest.skip("full already")
    with talk("llama", tiny, tmp_path, when_full) as talking:
        talking.open()
        for _ in range(turns):
            talking.true.check("llama", talking.turn())
        if not turns:
            talking.number = 1  # do not open it again
        session = talking.session
        entries, gone = session.entries, session.left_out
        for words in (N_CTX, 10 * N_CTX):
            with pytest.raises(ContextFull, match=f"in a context of {N_CTX}|does not fit a context of {N_CTX}"):
                session.send(message(99, words), max_tokens=ROOM)
        assert (session.entries, session.left_out) == (entries, gone)
        answer = talking.turn()
        assert answer.fresh == len(answer.stream.plan.tokens) - len(talking.true.held)
        talking.true.check("llama", answer)


def test_an_answer_may_fill_what_is_left(tiny: Tiny, tmp_path: Path) -> None:
    """At most a quarter of the context is freed for an answer, but an answer may use every cell that is free."""
    with engine(tiny("llama"), tmp_path, n_ctx=256) as running, running.session("s", system=SYSTEM) as session:
        context_full = []
        for number in range(6):
            answer = said(running, session.stream(message(number), max_tokens=10_000))
            length = len(answer.stream.plan.tokens) + len(answer.stream.tokens)
            assert length <= running.context.n_ctx
            context_full.append(length == running.context.n_ctx)
            assert answer.stream.metrics.finish in ("length", "stop")
        assert any(context_full)
        assert session.left_out > 0


def test_rows_differ_when_the_wrong_turn_leaves(tiny: Tiny, tmp_path: Path) -> None:
    """The tests above show something: a token that leaves instead of another is seen."""
    with talk("llama", tiny, tmp_path) as talking:
        while not talking.number or not talking.session.left_out:
            before = talking.true.held
            answer = talking.turn()
            if not talking.session.left_out:
                talking.true.check("llama", answer)
        gone = answer.stream.metrics.left_out_tokens
        begin = sizes(talking.session)[0]
        talking.true.rows(before, 1)
        talking.true.leave_out(begin + 1, begin + 1 + gone)
        talking.true.held = answer.stream.plan.tokens[: len(talking.true.held)]
        off = talking.true.rows(answer.tokens, 1)
        assert distance(off[0], answer.rows[-1]) > 5 * tolerance("llama", "f32")

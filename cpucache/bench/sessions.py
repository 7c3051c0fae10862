"""Sessions benchmark: time to first token of each turn, by full prefill, in the context, from RAM, and from disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cpucache.bench.conversation import MESSAGES
from cpucache.bench.series import Series
from cpucache.engine import Engine, Session
from cpucache.engine.answer import Answer
from cpucache.engine.stream import Stream
from cpucache.reuse import Plan
from cpucache.runtime import Sampling

Say = Callable[[str], None]
Open = Callable[..., Engine]
_NAME = "bench"


@dataclass
class Turn:
    """One turn. The series are times to first token.

    ``tokens``: tokens of the whole prompt. ``new``: tokens evaluated for the turn, which are its message and the end of
    the answer before it.
    """

    tokens: int
    new: int
    in_context: Series = field(default_factory=Series)
    ram: Series = field(default_factory=Series)
    disk: Series = field(default_factory=Series)
    recompute: Series = field(default_factory=Series)
    answer_ms: float = 0.0
    """Time from the first token of the answer to the last."""
    save_ms: float = 0.0
    """Time of the turn in which its state is read from the llama.cpp context."""
    bytes: int = 0
    """Bytes written for the turn, in the background."""

    @property
    def prefill_rate(self) -> float:
        """Tokens a second of full prefill."""
        return self.tokens / self.recompute.median * 1000

    def as_dict(self) -> dict[str, Any]:
        """Returns the turn for ``--json``."""
        series = {name: getattr(self, name) for name in ("in_context", "ram", "disk", "recompute")}
        return {
            "tokens": self.tokens,
            "new_tokens": self.new,
            **{name: each.as_dict() for name, each in series.items() if each.values},
            "save_ms": round(self.save_ms, 3),
            "answer_ms": round(self.answer_ms, 3),
            "bytes": self.bytes,
        }


@dataclass
class Truncation:
    """A turn for which old turns had to be removed from the context.

    ``left_out``: tokens of the removed turns. ``moved``: tokens kept, at new positions. ``new``: tokens added.
    """

    left_out: int
    moved: int
    new: int
    evaluated: int
    ttft_ms: float
    recompute_ms: float


@dataclass
class SessionsReport:
    """Measurements of one conversation."""

    model: str
    turns: list[Turn] = field(default_factory=list)
    saving: Series = field(default_factory=Series)
    """Time of the whole last turn, which is saved while another turn is being written."""
    not_saving: Series = field(default_factory=Series)
    """Time of the whole last turn without saving."""
    truncations: list[Truncation] = field(default_factory=list)

    @property
    def ratios(self) -> dict[str, float]:
        """Main figures: ratios between medians of times, and milliseconds more for 1,000 tokens more."""
        ratios = {
            "disk_to_in_context": median(turn.disk.median / turn.in_context.median for turn in self.turns),
            "disk_to_in_context_worst": max(turn.disk.median / turn.in_context.median for turn in self.turns),
            "ram_to_in_context": median(turn.ram.median / turn.in_context.median for turn in self.turns),
            "save_of_turn": max(turn.save_ms / (turn.answer_ms + turn.in_context.median) for turn in self.turns),
            "saving_to_not_saving": self.saving.median / self.not_saving.median,
            "growth_in_context_ms_per_1000": self._growth("in_context"),
            "growth_disk_ms_per_1000": self._growth("disk"),
        }
        if self.turns[0].recompute.values:
            for number in (10, 20):
                if number <= len(self.turns):
                    turn = self.turns[number - 1]
                    ratios[f"below_recompute_turn_{number}"] = 1 - turn.disk.median / turn.recompute.median
        return ratios

    def _growth(self, name: str) -> float:
        """Milliseconds more for 1,000 tokens more of conversation, by a least-squares fit that also has new tokens."""
        if len(self.turns) < 3:
            return 0.0
        columns = [[turn.tokens / 1000, turn.new, 1.0] for turn in self.turns]
        return float(np.linalg.lstsq(columns, [getattr(turn, name).median for turn in self.turns])[0][0])

    def as_dict(self) -> dict[str, Any]:
        """Returns all measurements for ``--json``."""
        return {
            "model": self.model,
            "turns": [turn.as_dict() for turn in self.turns],
            "saving": self.saving.as_dict(),
            "not_saving": self.not_saving.as_dict(),
            "truncations": [vars(each) for each in self.truncations],
            "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
        }


def measure_sessions(
    open_engine: Open, *, turns: int, answer: int, repeat: int, recompute: bool, say: Say
) -> SessionsReport:
    """Measures a conversation turn by turn.

    Each turn is asked in each way on a fork of the conversation, before it is asked in the conversation itself. "From
    disk" is a new engine with nothing in RAM (its files are in the page cache), asked as soon as the session is loaded.

    Args:
        open_engine: Returns an engine with these options, on a store and sessions of the benchmark's own.
        turns: Number of turns.
        answer: Most tokens of an answer.
        repeat: Number of measurements of each turn in each way, except for full prefill, which is measured once.
        recompute: Whether full prefill is measured.
        say: Called with a description of each step before it begins.

    Returns:
        The measurements.
    """
    with open_engine() as engine:
        report = SessionsReport(engine.model.path.stem)
        engine.warm_up()
        with engine.session(_NAME) as session:
            for number, message in enumerate(MESSAGES[:turns], 1):
                say(f"turn {number} of {turns}, {session.n_tokens:,} tokens so far")
                session.fork(f"{_NAME} {number}")
                turn, plan = _ask(engine, number, message, repeat)
                engine.store.flush()
                for _ in range(repeat):
                    turn.disk.values.append(_resumed(open_engine, number, message))
                if recompute:
                    turn.recompute.values.append(_recomputed(engine, plan))
                known = set(session.keys)
                metrics = session.send(message, max_tokens=answer).metrics
                turn.answer_ms, turn.save_ms = metrics.total_ms - metrics.ttft_ms, metrics.save_ms
                engine.store.flush()
                turn.bytes = _bytes(engine, set(session.keys) - known)
                report.turns.append(turn)
            say("the last turn with and without saving")
            for seed in range(repeat):
                for saving in (True, False):
                    # The answer just before is being written while the next one is measured.
                    _last_turn(engine, session, plan, turns, message, answer, 100 + seed, saving=saving)
                    series = report.saving if saving else report.not_saving
                    series.values.append(_last_turn(engine, session, plan, turns, message, answer, seed, saving=saving))
                    engine.store.flush()
            tokens = session.n_tokens
    say("conversations that exceed the context")
    with open_engine(n_ctx=max(256, tokens * 2 // 3)) as engine:
        engine.warm_up()
        with engine.session(_NAME) as session:
            for message in MESSAGES[:2]:
                report.truncations.append(_truncated(engine, session, message, recompute=recompute))
    return report


def _ask(engine: Engine, number: int, message: str, repeat: int) -> tuple[Turn, Plan]:
    with engine.session(f"{_NAME} {number}") as fork:
        stream = fork.stream(message, max_tokens=1)
        metrics = stream.reply().metrics
        turn = Turn(metrics.prompt_tokens, metrics.fresh_tokens)
        for _ in range(repeat):
            turn.in_context.values.append(fork.edit(number, message, max_tokens=1).reply().metrics.ttft_ms)
            engine.forget()
            turn.ram.values.append(fork.edit(number, message, max_tokens=1).reply().metrics.ttft_ms)
    return turn, stream.plan


def _resumed(open_engine: Open, number: int, message: str) -> float:
    with open_engine() as engine:
        engine.warm_up()
        with engine.session(f"{_NAME} {number}") as fork:
            return fork.edit(number, message, max_tokens=1).reply().metrics.ttft_ms


def _last_turn(
    engine: Engine, session: Session, plan: Plan, number: int, message: str, answer: int, seed: int, *, saving: bool
) -> float:
    """Milliseconds from the question to the end of the answer, from RAM."""
    engine.forget()
    started = time.perf_counter()
    if saving:
        stream = session.edit(number, message, max_tokens=answer, sampling=Sampling(temperature=1.0, seed=seed))
    else:
        sampling = Sampling(temperature=1.0, seed=seed)
        given = Answer(engine.kv_cache, lambda: plan, sampling, max_tokens=answer, started=started, label=_NAME)
        stream = Stream(engine.host, given, plan.n_tokens)
    stream.reply()
    return (time.perf_counter() - started) * 1000


def _recomputed(engine: Engine, plan: Plan) -> float:
    started = time.perf_counter()
    answer = Answer(
        engine.kv_cache, lambda: plan, Sampling(), max_tokens=1, started=started, label=_NAME, use_cache=False
    )
    return Stream(engine.host, answer, plan.n_tokens).reply().metrics.ttft_ms


def _bytes(engine: Engine, keys: set[str]) -> int:
    index = engine.store.index
    return sum(row.bytes for row in index.rows() if row.key in keys) if index else 0


def _truncated(engine: Engine, session: Session, message: str, *, recompute: bool) -> Truncation:
    before = session.n_tokens
    stream = session.stream(message, max_tokens=1)
    metrics = stream.reply().metrics
    kept = before - metrics.left_out_tokens
    return Truncation(
        left_out=metrics.left_out_tokens,
        moved=kept,
        new=metrics.prompt_tokens - kept,
        evaluated=metrics.fresh_tokens,
        ttft_ms=metrics.ttft_ms,
        recompute_ms=_recomputed(engine, stream.plan) if recompute else 0.0,
    )


def folder_options(folder: Path) -> dict[str, Any]:
    """Returns options of an engine that keeps everything in ``folder``, with budgets that are never reached."""
    return {"store": folder / "store", "sessions": folder / "sessions", "ram_budget": 1 << 40, "disk_budget": 1 << 40}

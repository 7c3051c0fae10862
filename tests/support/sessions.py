"""Conversations on tiny models: engines that hold them, the logits of every token said, and the truth about these.

The truth is a context of its own in which a conversation is evaluated once, from its first token to its last: nothing
is saved or loaded there.
"""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cpucache.engine import Engine
from cpucache.engine.session import Session
from cpucache.engine.stream import Stream
from cpucache.reuse import OnProgress, Plan
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import answer, nothing
from cpucache.reuse.work import Task
from cpucache.runtime import Context, Run, Sampling
from tests.support.tiny import BYTES
from tests.support.workbench import Logits, Tokens, distance, opened, tolerance

PLENTY = 1 << 30
"""A budget that nothing here exceeds."""
SYSTEM = "Answer in a few words."
_KILLS_PER_FOLDER = 20  # kills until a crash test begins anew, so that its conversation stays short
_PATIENCE = 60.0  # seconds until a child counts as hanging

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


@contextmanager
def engine(model: Path, folder: Path, **settings: Any) -> Iterator[Engine]:
    """An engine with its slices and its conversations below ``folder``.

    Its keys are f32, so that rounding hides nothing. Everything else that decides an answer is the default.
    """
    chosen = {"n_ctx": 1024, "threads": 1, "kv_type": "f32", "ram_budget": PLENTY, "disk_budget": PLENTY}
    with Engine(model, store=folder / "slices", sessions=folder / "sessions", **{**chosen, **settings}) as opened:
        yield opened


@contextmanager
def truth(model: Path, *, n_ctx: int = 1024) -> Iterator[Truth]:
    """The truth about a model."""
    with opened(model, "f32", n_ctx=n_ctx) as context:
        yield Truth(context)


@dataclass
class Said:
    """An answer, and how it came about."""

    stream: Stream
    rows: list[Logits]
    """What each of its tokens was chosen from."""

    @property
    def tokens(self) -> Tokens:
        """Everything that was evaluated: the prompt, and the answer but for what is still to be."""
        answer = np.array(self.stream.tokens[: self.stream.evaluated], np.int32)
        return np.concatenate([self.stream.plan.tokens, answer])

    @property
    def fresh(self) -> int:
        """Tokens of the prompt that were evaluated."""
        return self.stream.metrics.fresh_tokens


def logits(running: Engine, plan: Plan, *, fresh: bool = False) -> Logits:
    """Those of the last token of a plan."""

    def task(slot: Slot, _: OnProgress) -> Task[Logits]:
        yield from answer(running.kv_cache, lambda: plan, nothing, slot=slot, fresh=fresh)
        return running.context.logits(slot.index)

    return running.host.do(task)


def said(running: Engine, stream: Stream, *, tokens: int | None = None) -> Said:
    """Have an answer said; ``tokens``: stop it after so many."""
    context = running.context
    sample, rows = context.sample, []

    def noting(sampler: Any, index: int) -> int:
        rows.append(context.logits(index))
        if len(rows) == tokens:
            stream.stop()
        return sample(sampler, index)

    context.sample = noting  # type: ignore[method-assign, assignment]
    try:
        stream.reply()
    finally:
        del context.sample
    return Said(stream, rows)


def shared(one: Tokens, other: Tokens) -> int:
    """The number of first tokens that two texts have in common."""
    count = min(len(one), len(other))
    differing = np.flatnonzero(one[:count] != other[:count])
    return int(differing[0]) if len(differing) else count


class Truth:
    """A context that follows a conversation."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.held: Tokens = np.empty(0, np.int32)

    def known(self, tokens: Tokens) -> int:
        """How many of ``tokens`` it holds, from the first on."""
        return shared(self.held, tokens)

    def rows(self, tokens: Tokens, count: int) -> Logits:
        """Evaluate what is new of ``tokens``; gives the logits of the last ``count``."""
        begin = min(self.known(tokens), len(tokens) - count)
        if begin < len(self.held) and not self.context.remove(0, begin):
            self.context.clear()
            begin = 0
        rows = self.context.decode([Run(0, begin, tokens[begin:])], logits="all")
        assert rows is not None
        self.held = tokens
        return rows[-count:]

    def leave_out(self, begin: int, end: int) -> None:
        """Removes positions, and moves the cells after them down by as many."""
        assert self.context.remove(0, begin, end)
        self.context.shift(0, begin - end, end)
        self.held = np.delete(self.held, slice(begin, end))

    def replayed(self, session: Session, answer: Said) -> Logits:
        """The logits of the last turn of a conversation, which is evaluated from its first token on.

        Turns are left out as in the conversation, and those after them have attended to them.
        """
        entries, counts = session.entries, sizes(session)
        fixed = int(entries[0].role == "system")
        self.context.clear()
        self.held = self.held[:0]
        gone = 0
        for index, entry in enumerate(entries):
            if entry.left_out > gone:
                begin = sum(counts[:fixed])
                self.leave_out(begin, begin + sum(counts[fixed + gone : fixed + entry.left_out]))
                gone = entry.left_out
            if index < len(entries) - 2:
                self.rows(np.concatenate([self.held, *(np.array(p, np.int32) for p in entry.pieces["parts"])]), 1)
        assert self.known(answer.tokens) == len(self.held)
        return self.rows(answer.tokens, len(answer.rows))

    def check_replayed(self, arch: str, session: Session, answer: Said) -> None:
        """Like ``check``, whatever this context has followed so far."""
        for row, expected in zip(answer.rows, self.replayed(session, answer), strict=True):
            assert distance(row, expected) < tolerance(arch, "f32")

    def check(self, arch: str, answer: Said) -> None:
        """Every token of an answer was chosen from the logits of plain evaluation."""
        assert len(answer.rows) == answer.stream.evaluated + 1
        for row, expected in zip(answer.rows, self.rows(answer.tokens, len(answer.rows)), strict=True):
            assert distance(row, expected) < tolerance(arch, "f32")


def rendered(running: Engine, tokens: Tokens) -> str:
    """The text of a prompt, with what the template puts around its messages."""
    return running.model.text(tokens, special=True)


def chatml(*messages: tuple[str, str]) -> str:
    """Messages as the tiny models' template has them, up to where the answer begins."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages) + "<|im_start|>assistant\n"


def sizes(session: Session) -> list[int]:
    """Tokens of each entry that are evaluated and saved."""
    return [
        sum(len(part) for part in entry.pieces["parts"]) if "parts" in entry.pieces else entry.metrics["tokens"]
        for entry in session.entries
    ]


class Stuck(Exception):
    """Something goes round in circles."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise ``Stuck`` where something takes longer than that."""

    def ring(*_: object) -> None:
        raise Stuck(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def greedy() -> Sampling:
    """Always the likeliest token."""
    return Sampling(temperature=0.0)


def files(folder: Path) -> int:
    """How many slices are on disk."""
    return sum(1 for _ in (folder / "slices" / "slices").glob("??/*.safetensors"))


def message(number: int, words: int = 6) -> str:
    """A message like no other."""
    rng = random.Random(number)
    return f"{number}: " + " ".join(
        rng.choice(("rain", "and the", "fields", "of", "a mill", "Q")) for _ in range(words)
    )


def plain_spoken(model: Path) -> Path:
    """The same model, that only says capital letters: what it says are the same tokens when it is read again."""
    path = model.with_name(f"plain-{model.name}")
    if not path.exists():
        copy = path.with_suffix(".part")
        shutil.copy(model, copy)
        reader = gguf.GGUFReader(copy, "r+")
        rows: Any = next(tensor for tensor in reader.tensors if tensor.name == "output.weight").data
        letters = [BYTES + byte for byte in range(ord("A"), ord("Z") + 1)]
        rows[np.setdiff1d(np.arange(len(rows)), letters)] = 0
        rows.flush()
        copy.rename(path)
    return path


# ---- in processes of their own ---------------------------------------------------------------------------------------


@dataclass
class Told:
    """What a process tells of an answer that it gave."""

    prompt: Tokens
    tokens: Tokens
    """The prompt, and what was evaluated of the answer."""
    rows: list[Logits]
    fresh: int
    text: str


def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` gives, done in a process of its own."""
    here, there = _processes.Pipe(duplex=False)
    child = _processes.Process(target=_tell, args=(there, work, arguments))
    child.start()
    there.close()
    try:
        assert here.poll(_PATIENCE), "no answer"
        outcome = here.recv()
    finally:
        child.join(_PATIENCE)
        here.close()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _tell(reports: Connection, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    _silent()
    try:
        reports.send(work(*arguments))
    except Exception as error:
        reports.send(error)


def take_turn(model: Path, folder: Path, name: str, text: str, settings: dict[str, Any]) -> Told:
    """One turn of a conversation."""
    with engine(model, folder) as running, running.session(name, system=SYSTEM) as session:
        return _told(said(running, session.stream(text, **settings)))


def ask(model: Path, folder: Path, request: dict[str, Any], settings: dict[str, Any]) -> Told:
    """A prompt without a conversation."""
    with engine(model, folder, **settings) as running:
        return _told(said(running, running.stream(**request)))


def _told(answer: Said) -> Told:
    return Told(answer.stream.plan.tokens, answer.tokens, answer.rows, answer.fresh, answer.stream.text)


class Holder:
    """A process that has a conversation open, until it is killed.

    ``answering``: it is about to answer a second message (``"prefill"``), or has begun to (``"decode"``).
    """

    def __init__(self, model: Path, folder: Path, name: str, answering: str = "") -> None:
        here, there = _processes.Pipe(duplex=False)
        self._child = _processes.Process(target=_hold, args=(model, folder, name, answering, there))
        self._child.start()
        there.close()
        assert here.poll(_PATIENCE)
        assert here.recv() == "open"
        here.close()

    def kill(self) -> None:
        """End it without warning."""
        self._child.kill()
        self._child.join()


def _hold(model: Path, folder: Path, name: str, answering: str, reports: Connection) -> None:
    def wait(*_: object) -> None:
        reports.send("open")
        while True:
            time.sleep(60)

    _silent()
    with engine(model, folder) as running, running.session(name, system=SYSTEM) as session:
        session.send(message(1), max_tokens=4)
        running.store.flush()
        if not answering:
            wait()
        stream = session.stream(message(2))
        evaluate = running.context.evaluate

        def evaluate_or_wait(*arguments: Any) -> None:
            if answering == "prefill" or stream.tokens:
                wait()
            evaluate(*arguments)

        running.context.evaluate = evaluate_or_wait  # type: ignore[method-assign, assignment]
        stream.reply()


def _silent() -> None:
    """Keep a child's standard error for tracebacks."""
    logging.getLogger("cpucache").addHandler(logging.NullHandler())


# ---- killed ----------------------------------------------------------------------------------------------------------


@dataclass
class Crashes:
    """What was left of conversations whose processes were killed."""

    kills: int = 0
    turns: int = 0
    """Turns reported as done."""
    unanswered: int = 0
    """Processes killed before they had finished a turn."""
    under_way: int = 0
    """Turns that were found though nobody had reported them yet."""
    checked: int = 0
    """Conversations whose next turn was held against the truth."""
    bad: list[str] = field(default_factory=list)
    """What was lost, changed or wrong."""


def crash(
    model: Path, folder: Path, kills: int, *, longest: float = 0.15, check_every: int = 10, seed: int = 0
) -> Crashes:
    """Let processes talk, kill each at a random moment of up to ``longest`` seconds, and have the next go on."""
    report = Crashes()
    rng = random.Random(seed)
    texts: list[str] = []
    for kill in range(kills):
        subfolder = folder / str(kill // _KILLS_PER_FOLDER)
        if kill % _KILLS_PER_FOLDER == 0:
            texts = []
        here, there = _processes.Pipe(duplex=False)
        child = _processes.Process(target=_talk_for_ever, args=(model, subfolder, there))
        child.start()
        there.close()
        assert here.poll(_PATIENCE)
        found = here.recv()
        time.sleep(rng.uniform(0, longest))
        child.kill()
        reported = list(_received(here))
        child.join()
        here.close()
        if child.exitcode != -signal.SIGKILL:
            report.bad.append(f"process {kill} ended by itself: {child.exitcode}")
        if found[: len(texts)] != texts or len(found) > len(texts) + 2:
            report.bad.append(f"process {kill} found {len(found)} messages; {len(texts)} had been reported")
        report.under_way += len(found) > len(texts)
        texts = found + [text for turn in reported for text in turn]
        report.kills += 1
        report.turns += len(reported)
        report.unanswered += not reported
        if (kill + 1) % check_every == 0:
            report.checked += 1
            report.bad += [f"after {kill + 1}: {fault}" for fault in _faults(model, subfolder, texts)]
            texts = _texts(model, subfolder)
    return report


def _talk_for_ever(model: Path, folder: Path, reports: Connection) -> None:
    _silent()
    with engine(model, folder, n_ctx=512) as running, running.session("talk", system=SYSTEM) as session:
        reports.send([entry.text for entry in session.entries[1:]])
        if session.unanswered:
            session.send(max_tokens=6)
            reports.send([session.entries[-1].text])
        while True:
            session.send(message(len(session.entries)), max_tokens=6)
            reports.send([entry.text for entry in session.entries[-2:]])


def _received(reports: Connection) -> Iterator[list[str]]:
    while True:
        try:
            yield reports.recv()
        except EOFError:
            return


def _texts(model: Path, folder: Path) -> list[str]:
    with engine(model, folder, n_ctx=512) as running, running.session("talk") as session:
        return [entry.text for entry in session.entries[1:]]


def _faults(model: Path, folder: Path, texts: list[str]) -> Iterator[str]:
    """Go on with a conversation: what is wrong with its next turn."""
    with engine(model, folder, n_ctx=512) as running, running.session("talk") as session:
        if [entry.text for entry in session.entries[1:]][: len(texts)] != texts:
            yield "other messages"
        with patience(_PATIENCE):
            answer = said(running, session.stream(message(0), max_tokens=4))
    with truth(model) as true:
        for row, expected in zip(answer.rows, true.replayed(session, answer), strict=True):
            if distance(row, expected) >= tolerance("llama", "f32"):
                yield f"logits are {distance(row, expected):.3f} off"

"""Sessions: conversations whose KV state outlives the llama.cpp context and the process (CachedAttention, section 3).

Each message becomes slices whose context is the whole conversation before it. The slices are saved while the user reads
and types. The next turn, in this process or a later one, evaluates only new tokens.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np

from cpucache.engine.ahead import Preparation
from cpucache.engine.answer import Answer
from cpucache.engine.first_prompt import FirstPrompt, dump_spans, load_spans, tokens_of
from cpucache.engine.host import Host
from cpucache.engine.reply import Reply
from cpucache.engine.request import Request
from cpucache.engine.stream import Stream
from cpucache.engine.turn import Turn
from cpucache.engine.writing import certain, continued
from cpucache.errors import ContextFull, InputError
from cpucache.layout import Tokens, Turns
from cpucache.layout.vocabulary import empty, joined
from cpucache.reuse import History, OnProgress, Plan, PlanText, Slice, Span
from cpucache.runtime import Sampling
from cpucache.sessions import Entry, Transcripts
from cpucache.stages import stage

WhenFull: TypeAlias = Literal["oldest", "half", "refuse"]
WHEN_FULL: tuple[WhenFull, ...] = ("oldest", "half", "refuse")
MAX_TOKENS = 512
_log = logging.getLogger("cpucache.engine")


class Session:
    """A conversation, opened by ``Engine.session``. Nobody else can open it until it is closed.

    Use a session as a context manager, or call ``close``. While it is open, its slices are not evicted from memory, nor
    by this process from disk.

    The transcript on disk gets each message before the message is evaluated, and each answer when the answer ends:
    complete, cut off at ``max_tokens``, or interrupted. A message that replaces another one (``edit``) is written with
    the first token of its answer. A crash loses at most the current answer.

    Args:
        host: Model, store and core.
        transcripts: File of all conversations.
        name: Name of the conversation.
        system: System text of a new conversation.
        first_prompt: PML prompt that starts a new conversation, instead of ``system``.
        when_full: Reaction to a full llama.cpp context, see ``Engine.session``.
        plan_text: Plans messages that may take foreign slices (default: messages take exact slices only).

    Raises:
        InputError: An argument is not valid, or the conversation has another model, system text or prompt.
        CpucacheError: The conversation is open elsewhere, or can't be read.
    """

    def __init__(
        self,
        host: Host,
        transcripts: Transcripts,
        name: str,
        *,
        system: str | None = None,
        first_prompt: FirstPrompt | None = None,
        when_full: WhenFull = "oldest",
        plan_text: PlanText | None = None,
    ) -> None:
        if when_full not in WHEN_FULL:
            raise InputError(f"when_full={when_full!r}: must be one of {', '.join(WHEN_FULL)}")
        if system is not None and first_prompt is not None:
            raise InputError("a session begins with a system text or with a prompt, not with both")
        self.name = name
        self.when_full: WhenFull = when_full
        self._host = host
        self._kv_cache = host.kv_cache
        self._plan_text = plan_text
        self._lock = threading.RLock()
        self._closed = False
        self._held: list[str] = []
        self._first_prompt: list[Span] = (
            [] if first_prompt is None else host.slices.chained(first_prompt.plan, "first_prompt")
        )
        self._last: Request[None] | None = None
        self._ahead: Preparation | None = None
        self._transcript = transcripts.open(name, fingerprint=host.slices.fingerprint, model=host.model.path.stem)
        try:
            first = self._first_entry(system, first_prompt)
            if not self._transcript.entries and first is not None:
                self._transcript.put(0, [first])
            elif first is not None:
                self._check_same(first)
                self._first_prompt = []
            self._go_back(len(self.entries))
        except BaseException:
            self._transcript.close()
            raise
        self.prefetch()

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Ends the current answer, if there is one, and lets others open the conversation."""
        if not self._closed:
            self._closed = True
            # Another thread may hold the lock until its answer has ended.
            if (last := self._last) is not None:
                last.cancel()
            with self._lock:
                if self._ahead is not None:
                    self._ahead.cancel()
                if self._last is not None:
                    self._last.cancel()
                    self._last.wait()
                self._hold([])
                self._transcript.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- messages ----------------------------------------------------------------------------------------------------
    @property
    def entries(self) -> list[Entry]:
        """All messages in order, with those that have left the context: system text or prompt, questions, answers."""
        return self._transcript.entries

    @property
    def n_tokens(self) -> int:
        """Number of saved tokens that the next turn attends to."""
        return self._history.n_tokens

    @property
    def keys(self) -> list[str]:
        """Keys of the slices that the next turn needs."""
        return list(self._held)

    @property
    def left_out(self) -> int:
        """Number of messages that have left the context to make room for later ones."""
        return self._history.left_out

    @property
    def unanswered(self) -> bool:
        """Whether the last message, or the prompt that started the conversation, has no answer yet.

        ``send`` and ``stream`` without a text answer it.
        """
        return bool(self.entries) and (self.entries[-1].role == "user" or self._asks)

    # -- turns -------------------------------------------------------------------------------------------------------
    def send(
        self,
        text: str | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling | None = None,
        progress: OnProgress | None = None,
    ) -> Reply:
        """Answers a message, and returns when the answer is complete. Calls from several threads run one by one.

        Arguments and errors are those of ``stream``.

        Returns:
            The text of the answer, and its metrics.
        """
        with self._lock:
            return self.stream(text, max_tokens=max_tokens, sampling=sampling, progress=progress).reply()

    def stream(
        self,
        text: str | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling | None = None,
        progress: OnProgress | None = None,
    ) -> Stream:
        """Answers a message piece by piece.

        The message is evaluated when the first piece is requested. The next turn waits until this answer has ended;
        call ``Stream.stop`` first when the rest is not wanted. The next turn cancels a stream that was never read.

        Args:
            text: Message of the user (default: the message that is ``unanswered``).
            max_tokens: Maximum length of the answer, in tokens.
            sampling: Choice of tokens, such as ``Sampling(temperature=0.7, seed=1)`` (default: greedy).
            progress: Called as ``progress(done, total)``, in tokens evaluated before the first token of the answer.

        Returns:
            An iterator over pieces of the answer, with ``text`` and ``metrics`` so far.

        Raises:
            InputError: There is no message to answer, or the session has been closed.
            ContextFull: The message does not fit, even after all turns that may leave the context have left.
        """
        with self._lock:
            self._finish_last()
            return self._turn(text, len(self.entries), max_tokens, sampling, progress)

    def prepare(self, text: str, *, max_tokens: int = MAX_TOKENS) -> Preparation:
        """Starts to evaluate a message in the background while the user types it.

        The word after the last blank of ``text`` is not evaluated. ``max_tokens`` is the length of the answer to come,
        for which room is kept. The next turn cancels the preparation and continues after the tokens that it evaluated.
        ``TypingAhead`` calls ``prepare`` after each change of a text. Raises ``InputError`` when the session has been
        closed, and ``ContextFull`` like ``stream``.
        """
        with self._lock:
            self._finish_last()
            history, turns, pending, _ = self._before(len(self.entries))
            new, *others = (_message(copy.copy(turns), pending, each) for each in (text, *continued(text)))
            self._make_room(history, len(new), max_tokens)
            plan = self._plan(history.spans, new)
            ahead = plan.first(history.n_tokens + certain(new, others))
            self._ahead = self._host.prepare(lambda: ahead, self._label, n_tokens=plan.n_tokens, save=False, once=True)
            return self._ahead

    def regenerate(
        self,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling | None = None,
        progress: OnProgress | None = None,
    ) -> Stream:
        """Answers the last message again; the new answer replaces the old one when it ends.

        ``max_tokens``, ``sampling`` and ``progress`` are those of ``stream``. Raises ``InputError`` when there is no
        message to answer, and ``ContextFull``.
        """
        with self._lock:
            self._finish_last()
            answered = bool(self.entries) and self.entries[-1].role == "assistant"
            if not answered and not self.unanswered:
                raise InputError("there is no answer yet to be given again")
            return self._turn(None, len(self.entries) - answered, max_tokens, sampling, progress)

    def edit(
        self,
        number: int,
        text: str,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling | None = None,
        progress: OnProgress | None = None,
    ) -> Stream:
        """Replaces a message of the user, drops all messages after it, and answers the new message.

        Args:
            number: Number of the message among those of the user, from 1 on.
            text: New text of the message.
            max_tokens: Maximum length of the answer, in tokens.
            sampling: Choice of tokens, such as ``Sampling(temperature=0.7, seed=1)`` (default: greedy).
            progress: Called as ``progress(done, total)``, in tokens evaluated before the first token of the answer.

        Returns:
            An iterator over pieces of the answer. The transcript changes with the first token of the answer.

        Raises:
            InputError: There is no message of this number, or the session has been closed.
            ContextFull: The message does not fit, even after all turns that may leave the context have left.
        """
        with self._lock:
            self._finish_last()
            said = [index for index, entry in enumerate(self.entries) if entry.role == "user"]
            if not 1 <= number <= len(said):
                raise InputError(f"no message {number}: there are {len(said)} of yours")
            return self._turn(text, said[number - 1], max_tokens, sampling, progress)

    def fork(self, name: str, messages: int | None = None) -> None:
        """Copies the conversation, or its first ``messages`` entries, to another name, where it continues separately.

        ``messages`` counts all ``entries``, including a system text or prompt. Shared messages and slices are on disk
        only once. Raises ``InputError`` when a conversation of this name exists.
        """
        with self._lock:
            self._transcript.fork(name, messages)

    def prefetch(self) -> Future[None]:
        """Reads the slices that the next turn needs from disk into memory, in the background."""
        return self._host.store.prefetch(self._held)

    # -- internals ---------------------------------------------------------------------------------------------------
    def _turn(
        self, text: str | None, keep: int, max_tokens: int, sampling: Sampling | None, progress: OnProgress | None
    ) -> Stream:
        """Answers ``text`` after the first ``keep`` entries; without ``text``, the message that is last among them."""
        started = perf_counter()
        history, turns, pending, asks = self._before(keep)
        if text is None and not asks:
            raise InputError("there is no message to answer")
        if self._ahead is not None:
            self._ahead.cancel()
        new = _message(turns, pending, text)
        before = history.n_tokens
        self._make_room(history, len(new), max_tokens)
        number = sum(entry.role == "user" for entry in self.entries[:keep]) + (text is not None)
        with stage("plan"):
            plan = self._plan(history.spans, new, f"turn {number}")
        # The last token is always evaluated, since its logits start the answer; its state is saved with the answer.
        message: Sequence[Span] = []
        pending = new
        if text is not None:
            message, pending = self._message_spans(plan, history.spans, new, f"turn {number}"), new[-1:]
        turn = Turn(text, keep, history, turns, message, pending, number, len(history))
        answer = Answer(
            self._kv_cache,
            lambda: plan,
            sampling or Sampling(),
            max_tokens=max_tokens,
            started=started,
            label=self._label,
            at_start=lambda _answer: self._begin(turn) if keep == len(self.entries) else None,
            at_first=lambda answer: self._prefilled(turn, answer),
            at_end=lambda answer: self._save_answer(turn, answer),
        )
        stream = Stream(self._host, answer, plan.n_tokens, progress)
        stream.metrics.left_out_tokens = before - history.n_tokens
        self._last = stream.request
        if self._closed:  # by another thread, meanwhile
            self._last.cancel()
        return stream

    def _plan(self, before: Sequence[Span], new: Tokens, module: str = "") -> Plan:
        """The plan of ``new`` tokens after the spans ``before``."""
        return self._plan_text(before, new) if self._plan_text else self._host.slices.plan(before, new, module)

    def _message_spans(self, plan: Plan, before: Sequence[Span], new: Tokens, module: str) -> list[Span]:
        """Spans of slices for all ``new`` tokens of a plan but the last."""
        slices = self._host.slices
        if self._plan_text:
            return slices.chained(plan.first(plan.n_tokens - 1), module)[len(before) :]
        return [slice_.span for slice_ in slices.cut(before, new[:-1], module)]

    def _before(self, keep: int) -> tuple[History, Turns, Tokens, bool]:
        """The result of ``_replayed`` for ``keep`` entries, which callers may change. Raises ``InputError``."""
        if self._closed:
            raise InputError(f"session '{self.name}' has been closed")
        if keep < len(self.entries):
            return self._replayed(keep)
        return self._history.copy(), copy.copy(self._turns), self._pending, self._asks

    def _finish_last(self) -> None:
        """Waits until the previous answer has ended; cancels it when it has not started."""
        if self._last is not None:
            if not self._last.begun:
                self._last.cancel()
            self._last.wait()

    def _make_room(self, history: History, new: int, max_tokens: int) -> None:
        """Drops the oldest turns until the new one fits with room for its answer, or raises ``ContextFull``.

        Args:
            history: History before the turn, which is changed.
            new: Number of tokens of the new message.
            max_tokens: Maximum length of the answer; the room for it is at most a quarter of the context.
        """
        n_ctx, known = self._host.context.n_ctx, self._host.model.n_ctx_train
        room = min(max_tokens, min(n_ctx, known) // 4)

        def fits(room: int) -> bool:
            # Cells and trained positions are two limits: gaps of left-out modules take positions, but no cells.
            return history.n_tokens + new + room <= n_ctx and history.end + new + room <= known

        # A model whose state can't be moved evaluates the rest again, so drop half of the turns at once, rarely.
        oldest = self.when_full == "oldest" and self._host.context.memory.moves
        roles = [entry.role for entry in self.entries[: len(history)]]
        while not fits(room):
            # A question leaves together with its answer, so an end is where no answer follows.
            ends = [
                index - history.fixed
                for index in range(history.fixed + history.left_out + 1, len(history) + 1)
                if roles[index : index + 1] != ["assistant"]
            ]
            if self.when_full == "refuse" or not ends:
                break
            leaving = ends[0] if oldest else ends[(len(ends) - 1) // 2]
            _log.info("session %s: its first %d messages leave the context", self.name, leaving)
            history.leave_out(leaving)
        if fits(room if self.when_full == "refuse" else 1):
            return
        where = f"a context of {n_ctx}" if n_ctx <= known else f"the {known} positions that the model knows"
        more = "raise --ctx (n_ctx=…)" if n_ctx < known else ""
        if self.when_full == "refuse":
            advice = ", or ".join(filter(None, [more, "let old turns leave (when_full='oldest')"]))
            raise ContextFull(
                f"session '{self.name}': {history.n_tokens} tokens of conversation and {new} new ones leave no room "
                f"for an answer in {where}; {advice}"
            )
        raise ContextFull(
            f"session '{self.name}': a message of {new} tokens does not fit {where}, not even when every turn before "
            f"it leaves; {' or '.join(filter(None, [more, 'shorten it']))}"
        )

    def _begin(self, turn: Turn) -> None:
        """Adds the message to the history and the transcript, on the first call only."""
        if turn.text is None or turn.begun:
            return
        history, turn.begun = turn.history, True
        history.add(turn.message)
        self._transcript.put(turn.keep, [turn.entry(turn.text)])
        turn.keep += 1
        self._history, self._turns, self._pending, self._asks = history.copy(), turn.turns, turn.pending, True

    def _prefilled(self, turn: Turn, answer: Answer) -> None:
        """Saves new slices of the message; estimates the prefill time saved by moving slices after turns have left."""
        history, rate = turn.history, self._kv_cache.prefill_rate
        self._begin(turn)
        planned = set(answer.plan.slices)
        there = [span.slice for span in turn.message if span.slice]
        answer.capture([slice_ for slice_ in there if slice_ not in planned], self._label)
        if answer.metrics.left_out_tokens and rate and self._host.context.memory.moves:
            moved = sum(history.size(index) for index in range(history.fixed, turn.before))
            answer.metrics.recompute_ms = moved / rate * 1000

    def _save_answer(self, turn: Turn, answer: Answer) -> None:
        """Adds the answer to the history and the transcript, and saves its slice."""
        tokens, pending = self._answered(answer)
        said = joined([turn.pending, tokens])
        history = turn.history
        made = history.add_tokens([said], f"turn {turn.number}")
        pieces = {"parts": [said.tolist()], "pending": pending.tolist()}
        metrics = asdict(answer.metrics) | {"tokens": len(tokens) + len(pending)}
        self._transcript.put(turn.keep, [Entry("assistant", answer.text, pieces, history.left_out, metrics)])
        answer.capture(made, self._label)
        self._history, self._turns, self._pending, self._asks = history, turn.turns, pending, False
        self._hold(history.slices)

    def _answered(self, answer: Answer) -> tuple[Tokens, Tokens]:
        """Tokens of the answer as shown: those that the llama.cpp context holds, and those not yet evaluated."""
        model = self._host.model
        tokens, rest = list(answer.tokens), ""
        if answer.metrics.finish == "stop" and len(tokens) > answer.evaluated:
            # A stop string ended the answer. It was not shown, so later turns must not attend to its tokens.
            while tokens and not answer.text.startswith(model.text(tokens)):
                tokens.pop()
            rest = answer.text[len(model.text(tokens)) :]
        ids = np.array(tokens, np.int32)
        return ids[: answer.evaluated], joined([ids[answer.evaluated :], model.tokenize(rest)])

    @property
    def _label(self) -> str:
        """Label of the session's slices in the store, in place of a schema name."""
        return f"session {self.name}"

    def _hold(self, slices: Sequence[Slice]) -> None:
        """Protects these slices from eviction, instead of those held before."""
        keys = [slice_.key for slice_ in self._kv_cache.loaded(slices)]
        self._host.store.hold(keys)
        self._host.store.let_go(self._held)
        self._held = keys

    # -- replay of the transcript ------------------------------------------------------------------------------------
    def _go_back(self, keep: int) -> None:
        """Sets the state of the session to that after its first ``keep`` entries."""
        self._history, self._turns, self._pending, self._asks = self._replayed(keep)
        self._hold(self._history.slices)

    def _replayed(self, keep: int) -> tuple[History, Turns, Tokens, bool]:
        """The state of the conversation after its first ``keep`` entries.

        Returns the history, the turns, the tokens still to be evaluated, and whether an answer is due.
        """
        host = self._host
        history = History(host.slices, movable=host.context.memory.moves)
        turns = Turns(host.template, host.model)
        # An empty conversation begins with the BOS token.
        pending = empty() if host.model.bos is None else np.array([host.model.bos], np.int32)
        asks = False
        for index, entry in enumerate(self.entries[:keep]):
            pieces = entry.pieces
            if index == 0 and entry.role in ("system", "prompt"):
                history.fixed = 1
            history.leave_out(entry.left_out)
            turns.begun, asks = True, entry.role == "user"
            if entry.role == "prompt":
                self._first_prompt = self._first_prompt or self._reopened(pieces)
                history.add(self._first_prompt)
                turns.role, turns.open, asks = pieces["role"], pieces["open"], pieces["asks"]
                pending = empty()
                continue
            number = sum(other.role == "user" for other in self.entries[: index + 1])
            self._replay(history, pieces, f"turn {number}")
            pending = np.array(pieces["pending"], np.int32)
            turns.role = "system" if entry.role == "system" else "assistant"
            turns.open = entry.role != "system"
        return history, turns, pending, asks

    def _replay(self, history: History, pieces: Any, module: str) -> None:
        """Adds an entry of the transcript to a history; as exact slices of its tokens when a saved slice is gone."""
        if "parts" in pieces:
            history.add_tokens([np.array(part, np.int32) for part in pieces["parts"]], module)
        elif spans := self._saved(pieces):
            history.add_saved(spans)
        else:
            history.add(block.span for block in self._host.slices.cut(history.spans, tokens_of(pieces), module))

    def _saved(self, pieces: Any) -> list[Span] | None:
        """The spans of an entry from the transcript; ``None`` when the store lacks one of their slices."""
        spans = load_spans(pieces["spans"])
        loaded = self._kv_cache.loaded([span.slice for span in spans if span.slice])
        return spans if all(slice_.key in self._host.store for slice_ in loaded) else None

    def _reopened(self, pieces: Any) -> list[Span]:
        """The spans of the first prompt from the transcript; exact slices of its tokens when a saved slice is gone."""
        host = self._host
        if "segments" not in pieces and (spans := self._saved(pieces)):
            return spans
        return [block.span for block in host.slices.cut((), tokens_of(pieces), "first_prompt")]

    def _first_entry(self, system: str | None, first_prompt: FirstPrompt | None) -> Entry | None:
        """The entry that a new conversation begins with: its prompt or its system text, if it has one."""
        host = self._host
        bos = [] if host.model.bos is None else [host.model.bos]
        if first_prompt is not None:
            pieces = {
                "spans": dump_spans(self._first_prompt),
                "role": first_prompt.turns.role,
                "open": first_prompt.turns.open,
                "asks": first_prompt.asks,
            }
            return Entry("prompt", first_prompt.text, pieces, metrics={"tokens": first_prompt.plan.n_tokens})
        if system is not None:
            tokens = np.array([*bos, *Turns(host.template, host.model).turn("system", system).tolist()], np.int32)
            parts = [slice_.tokens.tolist() for slice_ in host.slices.cut((), tokens)]
            return Entry("system", system, {"parts": parts, "pending": []}, metrics={"tokens": len(tokens)})
        return None

    def _check_same(self, first: Entry) -> None:
        """Raises ``InputError`` unless the conversation began with this entry."""
        begun = self.entries[0]
        same = begun.role == first.role and (
            # Compares tokens, not slices: the store may have gained or lost slices since the conversation began.
            np.array_equal(tokens_of(begun.pieces), tokens_of(first.pieces))
        )
        if not same:
            what = "system text" if first.role == "system" else "prompt"
            raise InputError(f"session '{self.name}' has begun already, with another {what}; choose another name")


def _message(turns: Turns, pending: Tokens, text: str | None) -> Tokens:
    """The tokens to evaluate for a message: pending ones, the user's turn, and the header of the answer."""
    return joined([pending, empty() if text is None else turns.turn("user", text), turns.answer()])

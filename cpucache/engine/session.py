"""Sessions: conversations whose KV state outlives the llama.cpp context and the process (CachedAttention, section 3).

Each message becomes slices whose context is the whole conversation before it. The slices are saved while the user reads
and types. The next turn, in this process or a later one, evaluates only new tokens.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from time import perf_counter
from types import TracebackType

import numpy as np

from cpucache.engine.ahead import Preparation
from cpucache.engine.answer import Answer
from cpucache.engine.first_prompt import FirstPrompt
from cpucache.engine.host import Host
from cpucache.engine.leaving import WHEN_FULL, WhenFull, make_room
from cpucache.engine.replay import Replay, State, same_start
from cpucache.engine.reply import Reply
from cpucache.engine.request import Request
from cpucache.engine.stream import Stream
from cpucache.engine.turn import Turn
from cpucache.engine.writing import certain, continued
from cpucache.errors import InputError
from cpucache.layout import Tokens, Turns
from cpucache.layout.vocabulary import empty, joined
from cpucache.reuse import OnProgress, Plan, PlanText, Slice, Span
from cpucache.reuse.history import History
from cpucache.runtime import Sampling
from cpucache.sessions import Entry, Transcripts
from cpucache.stages import stage

MAX_TOKENS = 512


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
            raise InputError("give a system text or a prompt, not both")
        self.name = name
        self.when_full: WhenFull = when_full
        self._host = host
        self._kv_cache = host.kv_cache
        self._plan_text = plan_text
        self._lock = threading.RLock()
        self._closed = False
        self._held: list[str] = []
        self._last: Request[None] | None = None
        self._ahead: Preparation | None = None
        self._transcript = transcripts.open(name, fingerprint=host.slices.fingerprint, model=host.model.path.stem)
        try:
            self._replay = Replay(host, None if self.entries else first_prompt)
            first = self._first_entry(system, first_prompt)
            if first is not None and not self.entries:
                self._transcript.put(0, [first])
            elif first is not None and not same_start(self.entries[0], first):
                what = "system text" if first.role == "system" else "prompt"
                raise InputError(f"session '{name}' has begun already, with another {what}; choose another name")
            self._state = self._replay.state(self.entries)
            self._hold(self._state.history.slices)
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
        return self._state.history.n_tokens

    @property
    def keys(self) -> list[str]:
        """Keys of the slices that the next turn needs."""
        return list(self._held)

    @property
    def left_out(self) -> int:
        """Number of messages that have left the context to make room for later ones."""
        return self._state.history.left_out

    @property
    def unanswered(self) -> bool:
        """Whether the last message, or the prompt that started the conversation, has no answer yet.

        ``send`` and ``stream`` without a text answer it.
        """
        return bool(self.entries) and (self.entries[-1].role == "user" or self._state.asks)

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
            state = self._before(len(self.entries))
            history = state.history
            new, *others = (_message(copy.copy(state.turns), state.pending, each) for each in (text, *continued(text)))
            make_room(self._host, self.name, self.when_full, history, self.entries, len(new), max_tokens)
            plan = self._plan(history, new)
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
                raise InputError("there is no answer to replace yet")
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
    def _first_entry(self, system: str | None, first_prompt: FirstPrompt | None) -> Entry | None:
        """The entry that a new conversation begins with: its prompt or its system text, if it has one."""
        if first_prompt is not None:
            return first_prompt.entry
        return None if system is None else self._replay.system_entry(system)

    def _turn(
        self, text: str | None, keep: int, max_tokens: int, sampling: Sampling | None, progress: OnProgress | None
    ) -> Stream:
        """Answers ``text`` after the first ``keep`` entries; without ``text``, the message that is last among them."""
        started = perf_counter()
        state = self._before(keep)
        history, turns = state.history, state.turns
        if text is None and not state.asks:
            raise InputError("there is no message to answer")
        if self._ahead is not None:
            self._ahead.cancel()
        new = _message(turns, state.pending, text)
        before = history.n_tokens
        make_room(self._host, self.name, self.when_full, history, self.entries, len(new), max_tokens)
        number = sum(entry.role == "user" for entry in self.entries[:keep]) + (text is not None)
        with stage("plan"):
            plan = self._plan(history, new, f"turn {number}")
        # The last token is always evaluated, since its logits start the answer; its state is saved with the answer.
        message: Sequence[Span] = []
        pending = new
        if text is not None:
            message, pending = self._message_spans(plan, history, new, f"turn {number}"), new[-1:]
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

    def _plan(self, history: History, new: Tokens, module: str = "") -> Plan:
        """The plan of ``new`` tokens after a history."""
        if self._plan_text:
            return self._plan_text(history.spans, new)
        return self._host.slices.plan(history.spans, new, module, trail=history.trail)

    def _message_spans(self, plan: Plan, history: History, new: Tokens, module: str) -> list[Span]:
        """Spans of slices for all ``new`` tokens of a plan but the last."""
        slices = self._host.slices
        if self._plan_text:
            return slices.chained(plan.first(plan.n_tokens - 1), module)[len(history.spans) :]
        return [slice_.span for slice_ in slices.cut(history.spans, new[:-1], module, trail=history.trail)]

    def _before(self, keep: int) -> State:
        """The state after the first ``keep`` entries, which callers may change. Raises ``InputError``."""
        if self._closed:
            raise InputError(f"session '{self.name}' has been closed")
        return self._replay.state(self.entries[:keep]) if keep < len(self.entries) else self._state.copy()

    def _finish_last(self) -> None:
        """Waits until the previous answer has ended; cancels it when it has not started."""
        if self._last is not None:
            if not self._last.begun:
                self._last.cancel()
            self._last.wait()

    def _begin(self, turn: Turn) -> None:
        """Adds the message to the history and the transcript, on the first call only."""
        if turn.text is None or turn.begun:
            return
        history, turn.begun = turn.history, True
        history.add(turn.message)
        self._transcript.put(turn.keep, [turn.entry(turn.text)])
        turn.keep += 1
        self._state = State(history.copy(), turn.turns, turn.pending, asks=True)

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
        slices = history.add_tokens([said], f"turn {turn.number}")
        pieces = {"parts": [said.tolist()], "pending": pending.tolist()}
        metrics = asdict(answer.metrics) | {"tokens": len(tokens) + len(pending)}
        self._transcript.put(turn.keep, [Entry("assistant", answer.text, pieces, history.left_out, metrics)])
        answer.capture(slices, self._label)
        self._state = State(history, turn.turns, pending, asks=False)
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


def _message(turns: Turns, pending: Tokens, text: str | None) -> Tokens:
    """The tokens to evaluate for a message: pending ones, the user's turn, and the header of the answer."""
    return joined([pending, empty() if text is None else turns.turn("user", text), turns.answer()])

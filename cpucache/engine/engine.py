"""The engine: one model, one context, one store, and the schemas that prompts are written against."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

import numpy as np
import psutil

from cpucache.engine.advice import FidelityReport, OnTrial, examine
from cpucache.engine.planner import PREFIX, Message, Planner, parsed_prompt
from cpucache.engine.reply import Reply
from cpucache.engine.session import Session, WhenFull
from cpucache.engine.size import parse_size
from cpucache.engine.stream import Stream
from cpucache.engine.tuning import DEFAULT, Fidelity, Level
from cpucache.layout import BLOCK, Chains, ChatTemplate, Plan, Positions, SchemaLayout
from cpucache.models import default_model, resolve_model
from cpucache.pml.tree import Prompt, Schema
from cpucache.reuse import Encoded, OnProgress, Workspace
from cpucache.runtime import Context, KVType, Model, Sampling
from cpucache.sessions import Transcripts
from cpucache.store import Fingerprints, Store, default_home

DEFAULT_CTX = 8192
"""Cells of a context, unless the model was trained on fewer or the caller asks for more."""


class Engine:
    """Answers prompts of one model, reusing the state of whatever repeats in them.

    ``model``: a name of the catalogue (default: its first), or the path of a GGUF. ``n_ctx``: cells of the context,
    which a prompt and its answer must fit (default: what the model was trained on, at most 8192). ``store``: the folder
    for slices (default ``$CPUCACHE_HOME``, else the platform's cache folder). ``ram_budget``: bytes, or text such as
    ``"2GiB"``, that slices may take in memory (default: a quarter of what is free); ``disk_budget``: on disk (default:
    a quarter of what is free there, and in the store already). ``paranoid``: check the hash of every slice each time
    that it is read from disk, not only the first. ``kv_type``: type of the saved keys, ``"f16"`` or ``"q8_0"`` (values
    too with ``flash="on"``). ``flash``: ``"on"``, ``"off"`` or ``"auto"`` (default: off on a CPU). ``positions``: how
    schemas are laid out. ``block_size``: tokens of the blocks that plain text and messages are cached in. ``fidelity``:
    of prompts that do not say theirs (a level, or a ``Fidelity`` with the numbers of ``plan``). ``sessions``: the
    folder for conversations (default ``$CPUCACHE_SESSIONS``, else the platform's user data folder).

    Use it as a context manager, or ``close`` it. Calls from several threads take turns.

    Raises ``ModelError`` when the model can't be found, read or loaded, and ``InputError`` for settings that are none.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        n_ctx: int | None = None,
        store: str | Path | None = None,
        ram_budget: int | str | None = None,
        disk_budget: int | str | None = None,
        paranoid: bool = False,
        threads: int | None = None,
        gpu_layers: int | str = "auto",
        kv_type: KVType = "f16",
        flash: str | None = None,
        positions: Positions = "auto",
        block_size: int = BLOCK,
        fidelity: Level | Fidelity = DEFAULT,
        sessions: str | Path | None = None,
    ) -> None:
        wanted = fidelity if isinstance(fidelity, Fidelity) else Fidelity(fidelity)
        path = resolve_model(str(model or default_model()))
        home = Path(store) if store else default_home()
        ram, disk = (None if size is None else parse_size(size) for size in (ram_budget, disk_budget))
        self.model = Model(path, gpu_layers_=gpu_layers)
        try:
            self.context = Context(
                self.model,
                n_ctx=n_ctx or min(self.model.n_ctx_train, DEFAULT_CTX),
                n_threads=threads,
                kv_type=kv_type,
                flash=flash,
            )
        except BaseException:
            self.model.close()
            raise
        # What is free now that the weights and the context are there.
        free = psutil.virtual_memory().available
        self.store = Store(home, ram_budget=free // 4 if ram is None else ram, disk_budget=disk, paranoid=paranoid)
        self.fingerprint = Fingerprints(home / "index.sqlite").of(path)
        self.workspace = Workspace(self.context, self.store, self.fingerprint)
        self.chains = Chains(block_size)
        self.template = ChatTemplate(
            self.model.chat_template, bos=self.model.special_text("bos"), eos=self.model.special_text("eos")
        )
        self.planner = Planner(self.model, self.template, self.chains, positions, wanted)
        self._lock = threading.RLock()
        self._running: Stream | None = None
        self._opening = threading.Lock()
        self._folder = Path(sessions) if sessions else None
        self._transcripts: Transcripts | None = None
        self._sessions: WeakSet[Session] = WeakSet()

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Free the model and its context."""
        for session in list(self._sessions):
            session.close()
        if self._transcripts is not None:
            self._transcripts.close()
            self._transcripts = None
        self.store.close()
        self.context.close()
        self.model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- schemas -----------------------------------------------------------------------------------------------------
    def add_schema(self, schema: str | Path | Schema) -> SchemaLayout:
        """Read and lay out a schema (a file, or one parsed already); prompts then find it by its name.

        Raises ``PMLError``.
        """
        return self.planner.add_schema(schema)

    def encode(
        self,
        schema: str,
        progress: OnProgress | None = None,
        *,
        lead_tokens: int | None = None,
    ) -> Encoded:
        """Make every slice of a schema that is not in the store yet, as far as they are foreseeable.

        That is every module as it is apart, every scaffold set, and, unless ``lead_tokens`` is 0 (see ``plan``), every
        module as it is behind all that the schema has before it, which takes up to half as long again, and as much room
        again. Where prompts leave modules out, what stands behind those is made when it is first needed.
        ``progress(done, total)`` is told about tokens.
        """
        layout = self.planner.layout(schema)
        tuning = self.planner.tuning(layout, Fidelity(lead_tokens=lead_tokens))
        # Modules that are never cached have no slices of their own; as context of others they are found there.
        segments = [segment for segment in layout.segments if segment.cache and not segment.placeholder]
        # No prompt with these fits into the context if they do not.
        room = self.workspace.context.n_ctx
        segments += [each for each in layout.leads.segments(tuning.lead_tokens) if each.cells < room]
        with self.alone():
            return self.workspace.encode(segments, schema, progress)

    # -- prompts -----------------------------------------------------------------------------------------------------
    def plan(
        self,
        prompt: str | Path | Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
        fidelity: Level | None = None,
        lead_tokens: int | None = None,
        link_tokens: int | None = None,
        recompute: float | None = None,
    ) -> Plan:
        """What a prompt consists of: its spans, and where each token comes from.

        One of: ``prompt``, PML text, the path of a file, or a parsed prompt, whose schema must have been added;
        ``messages``, each with ``role`` (system, user, assistant) and ``content``; ``text``, to go on with as it is.
        The latter two are cached in blocks, each in the sight of all before it: exact, and found again by whatever
        begins with the same text.

        Modules have not seen one another. How much is done about that, ``fidelity`` says. ``"fast"`` (the default): a
        module that the prompt has behind the one that the schema has before it has been encoded in the sight of what
        stands before it there; those elsewhere are as they are apart. ``"balanced"``: besides, a tenth of the
        modules' tokens is evaluated afresh behind what stands before them. ``"high"``: each combination of modules,
        arguments and text before the last module is evaluated as a whole the first time it comes, which takes as long
        as full prefill, and reused as a whole from then on, with nothing approximated. Scaffold sets are used in any
        case.

        ``lead_tokens`` (how much of what stands before it a module is encoded in the sight of: that many tokens at
        least, three times as many at most; an eighth or less, where the prompt leaves out some of these), ``recompute``
        (what share; it goes to the modules that have the most words in common with the prompt's new text) and
        ``link_tokens`` (so many at the start of each module are evaluated afresh) change what a level does: the
        engine's own when none is given.

        Raises ``PMLError`` or ``InputError``.
        """
        wanted = Fidelity(fidelity, lead_tokens, link_tokens, recompute)
        return self.planner.request(prompt, messages, text, fidelity=wanted).plan

    def encode_for(
        self,
        prompt: str | Path | Prompt,
        progress: OnProgress | None = None,
        *,
        fidelity: Level | None = None,
        lead_tokens: int | None = None,
        link_tokens: int | None = None,
        recompute: float | None = None,
    ) -> Encoded:
        """Make the slices that one prompt needs and the store does not have. How exact it is to be is given as for
        ``plan``."""
        wanted = Fidelity(fidelity, lead_tokens, link_tokens, recompute)
        request = self.planner.request(prompt, fidelity=wanted)
        with self.alone():
            return self.workspace.encode(request.plan.segments, request.label, progress)

    def prefetch(
        self,
        prompt: str | Path | Prompt | Session | None = None,
        *,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
    ) -> Future[None]:
        """Read the slices that a session or a prompt is going to need into memory, in the background."""
        if isinstance(prompt, Session):
            return prompt.prefetch()
        return self.store.prefetch(self.workspace.keys(self.planner.request(prompt, messages, text).plan))

    def stream(
        self,
        prompt: str | Path | Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
        max_tokens: int = 256,
        use_cache: bool = True,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | tuple[str, ...] | list[str] = (),
        fidelity: Level | None = None,
        lead_tokens: int | None = None,
        link_tokens: int | None = None,
        recompute: float | None = None,
        progress: OnProgress | None = None,
    ) -> Stream:
        """The answer to a prompt, piece by piece. The prompt, and how exact it is to be, are given as for ``plan``.

        ``use_cache=False`` evaluates the same tokens from the first to the last, reusing nothing. ``temperature=0`` is
        greedy. Slices that are missing are made on the way. ``progress(done, total)`` is told about tokens evaluated
        before the first token of the answer. Raises ``PMLError``, ``InputError`` or ``ContextFull``.
        """
        started = time.perf_counter()
        sampling = Sampling(
            temperature, top_k, top_p, min_p, repeat_penalty, seed, (stop,) if isinstance(stop, str) else tuple(stop)
        )
        wanted = Fidelity(fidelity, lead_tokens, link_tokens, recompute)
        request = self.planner.request(prompt, messages, text, fidelity=wanted)
        if request.plan.n_tokens >= self.context.n_ctx:
            raise request.too_long(self.context.n_ctx)
        return self.answer(
            request.plan,
            sampling,
            max_tokens=max_tokens,
            started=started,
            label=request.label,
            use_cache=use_cache,
            progress=progress,
            at_end=self._keep_blocks if prompt is None and use_cache else None,
        )

    def answer(
        self,
        plan: Plan,
        sampling: Sampling,
        *,
        max_tokens: int,
        started: float,
        label: str,
        use_cache: bool = True,
        progress: OnProgress | None = None,
        at_start: Callable[[Stream], None] | None = None,
        at_first: Callable[[Stream], None] | None = None,
        at_end: Callable[[Stream], None] | None = None,
    ) -> Stream:
        """The answer to a plan.

        ``at_start``, ``at_first`` and ``at_end`` are called before anything is evaluated, when the first token has been
        handed over, and when the answer ends.
        """
        return Stream(
            self.workspace,
            plan,
            sampling,
            max_tokens=max_tokens,
            started=started,
            turn=partial(self._turn, self.workspace.keys(plan) if use_cache else []),
            schema=label,
            use_cache=use_cache,
            progress=progress,
            at_start=at_start,
            at_first=at_first,
            at_end=at_end,
        )

    def fidelity(
        self,
        prompt: str | Path | Prompt,
        *,
        max_tokens: int = 64,
        advise: bool = True,
        fidelity: Level | None = None,
        lead_tokens: int | None = None,
        link_tokens: int | None = None,
        recompute: float | None = None,
        progress: OnTrial | None = None,
    ) -> FidelityReport:
        """How far the cached answer to a prompt is from the uncached one, and (``advise``) what would bring it nearer.

        Takes as long as some full prefills. How exact the cached one is to be is given as for ``plan``; ``max_tokens``
        are those of the answer that are compared. Raises ``PMLError`` or ``ContextFull``.
        """
        parsed = parsed_prompt(prompt)
        wanted = Fidelity(fidelity, lead_tokens, link_tokens, recompute)
        request = self.planner.request(parsed, fidelity=wanted)
        if request.plan.n_tokens + max_tokens > self.context.n_ctx:
            raise request.too_long(self.context.n_ctx)
        tuning = self.planner.tuning(self.planner.layout(parsed.schema), wanted)
        with self._lock:
            return examine(self, parsed, request.plan, tuning, max_tokens=max_tokens, advise=advise, progress=progress)

    def generate(self, prompt: str | Path | Prompt | None = None, **settings: Any) -> Reply:
        """The whole answer. Settings are those of ``stream``."""
        return self.stream(prompt, **settings).reply()

    def session(
        self,
        name: str,
        *,
        system: str | None = None,
        prompt: str | Path | Prompt | None = None,
        when_full: WhenFull = "oldest",
    ) -> Session:
        """A conversation that is kept: opened where it stood, or begun.

        ``system`` is the system text of a new one, ``prompt`` a PML prompt (whose schema has been added) that a new one
        begins with. ``when_full`` says what happens when the context overflows: the ``"oldest"`` turns leave, as many
        as must, or ``"half"`` of them at once, and the rest moves down without being evaluated again; ``"refuse"``
        raises ``ContextFull``. Raises ``InputError`` when it is with another model, or has begun otherwise, and
        ``CpucacheError`` when it is open elsewhere.
        """
        opening = None if prompt is None else self.planner.opening(prompt)
        # Not the lock of the context: a session is opened, and read ahead, while another one's answer is on its way.
        with self._opening:
            if self._transcripts is None:
                self._transcripts = Transcripts(self._folder)
            session = Session(self, self._transcripts, name, system=system, opening=opening, when_full=when_full)
            self._sessions.add(session)
        return session

    def warm_up(self) -> None:
        """Evaluate one token, so that the first prompt does not pay for reading the weights in."""
        with self.alone():
            self.workspace.reset()
            self.workspace.append(np.array([self.model.filler], np.int32))
            self.workspace.reset()

    # -- inside ------------------------------------------------------------------------------------------------------
    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the context to oneself: other threads wait, and an unfinished stream of this thread ends."""
        with self._lock:
            if self._running is not None:
                running, self._running = self._running, None
                running.close()
            yield

    @contextmanager
    def _turn(self, keys: Sequence[str], stream: Stream) -> Iterator[None]:
        """The turn of a stream to have the context. What it needs is read into memory, and kept, while it waits."""
        with self.store.using(keys):
            if not self._lock.acquire(blocking=False):
                self.store.prefetch(keys)
                self._lock.acquire()
            try:
                with self.alone():
                    self._running = stream
                    yield
            finally:
                if self._running is stream:
                    self._running = None
                self._lock.release()

    def _keep_blocks(self, stream: Stream) -> None:
        """Save the blocks that the answer has filled: the next prompt may go on from there."""
        answer = np.array(stream.tokens[: stream.evaluated], np.int32)
        blocks = self.chains.blocks((), np.concatenate([stream.plan.tokens, answer]))
        self.workspace.capture(blocks[len(stream.plan.segments) :], PREFIX)

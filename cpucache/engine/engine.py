"""The engine: one model, one context, one store, and the schemas that prompts are written against."""

from __future__ import annotations

import copy
import re
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias

import psutil

from cpucache.engine.advice import FidelityReport, OnTrial, examine
from cpucache.engine.ahead import Preparation
from cpucache.engine.answer import Answer
from cpucache.engine.core import Core
from cpucache.engine.host import Host
from cpucache.engine.planner import AnyPrompt, Planner, PMLPrompt, Question, parsed_prompt
from cpucache.engine.reply import Reply
from cpucache.engine.request import Priority, Request
from cpucache.engine.saving import Saving
from cpucache.engine.session import Session, WhenFull
from cpucache.engine.size import parse_size
from cpucache.engine.stream import Stream
from cpucache.errors import InputError
from cpucache.layout import ChatTemplate, Positions, SchemaLayout
from cpucache.layout.cuts import LEAST, MOST, Cuts, check_sizes
from cpucache.layout.schema import POSITIONS
from cpucache.models import default_model, resolve_model
from cpucache.pml.tree import Schema
from cpucache.reuse import (
    REUSES,
    Encoded,
    Fidelity,
    KVCache,
    Level,
    OnProgress,
    Plan,
    Reuse,
    Slice,
    Slices,
    asked,
    reading,
    refine,
    scaffolded,
)
from cpucache.reuse.refine import exact_slices
from cpucache.reuse.slot import Slot
from cpucache.reuse.splicer import SLOTS
from cpucache.reuse.work import Task
from cpucache.runtime import Context, KVType, Model, Sampling
from cpucache.runtime.hardware import on_mains
from cpucache.runtime.packing import AT_REST, AtRest, Packing
from cpucache.sessions import Transcripts, default_sessions
from cpucache.stages import stage
from cpucache.store import Fingerprints, Store, default_home

if TYPE_CHECKING:
    from cpucache.authoring import AnyPromptFunction

Refine: TypeAlias = Literal["off", "idle"]
REFINES: tuple[Refine, ...] = ("off", "idle")
DEFAULT_CTX = 8192
"""Cells of a context, unless the model was trained on fewer or the caller asks for more."""


class Engine:
    """Answers prompts of one model, reusing the state of whatever repeats in them.

    Args:
        model: A name of the catalogue (default: its first), or the path of a GGUF.
        n_ctx: Cells of the context, which a prompt and its answer must fit (default: what the model was trained on, at
            most 8192).
        store: The folder for slices (default ``$CPUCACHE_HOME``, else the platform's cache folder).
        ram_budget: Bytes, or text such as ``"2GiB"``, that slices may take in memory (default: a quarter of what is
            free).
        disk_budget: The same on disk (default: a quarter of what is free there, and in the store already).
        paranoid: Check the hash of every slice each time that it is read from disk, not only the first.
        threads: Threads that evaluate (default: one for each core).
        gpu_layers: Layers on a GPU: a number, or ``"auto"``.
        kv_type: Type of the saved keys, ``"f16"`` or ``"q8_0"`` (values too with ``flash="on"``).
        at_rest: How slices are kept on disk and in packs: as they are (``"f16"``), or in half or a quarter of the room
            (``"q8_0"``, ``"q4_0"``). What is read from disk is then near to what was saved, not equal. The slices of
            one way are not found by another.
        flash: ``"on"``, ``"off"`` or ``"auto"`` (default: off on a CPU).
        positions: How schemas are laid out.
        segment_tokens: Least and most tokens of the segments that plain text and messages are cut into.
        fidelity: Of prompts that do not say theirs: a level or a ``Fidelity``, see ``plan``.
        reuse: Likewise.
        refine: ``"idle"`` makes exact what was asked lately when nothing has been asked for a second, on mains power.
        sessions: The folder for conversations (default ``$CPUCACHE_SESSIONS``, else the platform's user data folder).
        parallel: Prompts that are answered at a time, 1 to 16, in the cells of one context. More of them wait, in
            order.

    Use it as a context manager, or ``close`` it. Any thread may call any method, ``close`` included: one thread of the
    engine's own uses the model, and the requests of all others wait for it in a queue.

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
        at_rest: AtRest = "f16",
        flash: str | None = None,
        positions: Positions = "auto",
        segment_tokens: tuple[int, int] = (LEAST, MOST),
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse = "schema",
        refine: Refine = "off",
        sessions: str | Path | None = None,
        parallel: int = 1,
    ) -> None:
        usual = None if fidelity is None else Fidelity.of(fidelity)
        ram, disk = (None if size is None else parse_size(size) for size in (ram_budget, disk_budget))
        _check(
            positions=(positions, POSITIONS),
            refine=(refine, REFINES),
            reuse=(reuse, REUSES),
            at_rest=(at_rest, AT_REST),
        )
        check_sizes(*segment_tokens)
        for setting, value in (("threads", threads), ("n_ctx", n_ctx)):
            if value is not None and value < 1:
                raise InputError(f"{setting}={value}: must be 1 or more")
        if not 1 <= parallel <= SLOTS:
            raise InputError(f"parallel={parallel}: must be from 1 to {SLOTS}")
        path = resolve_model(str(model or default_model()))
        home = Path(store) if store else default_home()
        # What was opened is closed again when something behind it fails.
        with ExitStack() as opened:
            self.model = loaded = Model(path, gpu_layers_=gpu_layers)
            opened.callback(loaded.close)
            cells = n_ctx or min(loaded.n_ctx_train, DEFAULT_CTX)
            self.context = Context(loaded, n_ctx=cells, n_threads=threads, kv_type=kv_type, flash=flash)
            opened.callback(self.context.close)
            # What is free now that the weights and the context are there.
            free = psutil.virtual_memory().available
            ram = free // 4 if ram is None else ram
            packing = None if at_rest == "f16" else Packing(at_rest, self.context.n_threads)
            kept = Store(home, ram_budget=ram, disk_budget=disk, paranoid=paranoid, packing=packing)
            opened.callback(lambda: self.store.close() if hasattr(self, "kv_cache") else kept.close())
            self.fingerprint = Fingerprints(home / "index.sqlite").of(path)
            form = self.context.state_format + ("" if packing is None else f"/at-rest-{packing.kind}")
            self.slices = Slices(self.fingerprint, form, Cuts(loaded, *segment_tokens))
            self.kv_cache = KVCache(self.context, kept, self.slices, parallel)
            self._spaces = {"": self.kv_cache}
            template = ChatTemplate(
                loaded.chat_template, bos=loaded.special_text("bos"), eos=loaded.special_text("eos")
            )
            # Gaps between positions come from moving, which not every model's state allows.
            positions = positions if self.context.memory.moves else "packed"
            self._planner_of = partial(Planner, template=template, positions=positions, fidelity=usual, reuse=reuse)
            self.planner = self._planner_of(self.kv_cache)
            idle = partial(_refining_when_idle, self._spaces) if refine == "idle" else None
            self.host = Host(loaded, template, self.kv_cache, self.planner, Core(self.context, parallel, idle))
            # Where nobody closes the engine, its thread ends with it.
            opened.callback(weakref.finalize(self, self.host.core.close))
            self._opened = opened.pop_all()
        self._opening = threading.Lock()
        self._folder = Path(sessions) if sessions else None
        self._transcripts: Transcripts | None = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._origin: Engine | None = None  # which lives as long as this one

    @property
    def store(self) -> Store:
        """Where slices are kept."""
        return self.kv_cache.store

    def within(self, namespace: str, *, isolate: bool = False) -> Engine:
        """This engine for one of several who share it, and are not to learn of one another.

        It has schemas and conversations of its own, and finds slices that are not exact only where the same namespace
        asked for them. Exact slices are shared, so that the time an answer takes tells whether its text was evaluated
        before; with ``isolate`` nothing is shared. Model, context and store are those of this engine, and closing
        either closes both.

        Args:
            namespace: A name that others can't choose. Letters, digits, ``-`` and ``_``.
            isolate: Share no slices at all.

        Raises ``InputError`` for another name.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", namespace):
            raise InputError(f"namespace={namespace!r:.80}: letters, digits, - and _, 64 at most")
        other = copy.copy(self)
        other.slices = self.slices.within(namespace, isolate=isolate)
        other.kv_cache = self.kv_cache.within(other.slices)
        other.planner = self._planner_of(other.kv_cache)
        other.host = replace(self.host, kv_cache=other.kv_cache, planner=other.planner)
        other._folder = (self._folder or default_sessions()) / "namespaces" / namespace
        other._transcripts = None
        other._origin = self
        with self._opening:
            self._spaces[other.slices.scope] = other.kv_cache
            self._opened.callback(other._close_transcripts)
        return other

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """End every answer under way, in whatever thread it is read, and free the model and its context.

        Answers that end so are ``"interrupted"``, and keep what there is of them. What waits for its turn ends, too.
        """
        self.host.core.close()
        for session in list(self._sessions):
            session.close()
        self._close_transcripts()
        self._opened.close()

    def _close_transcripts(self) -> None:
        if self._transcripts is not None:
            self._transcripts.close()
            self._transcripts = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- schemas -----------------------------------------------------------------------------------------------------
    def add_schema(self, schema: str | Path | Schema | AnyPromptFunction) -> SchemaLayout:
        """Read and lay out a schema; prompts then find it by its name.

        It is a file, a schema parsed already, or a function decorated with ``@cpucache.prompt``.

        Raises ``PMLError``.
        """
        return self.planner.add_schema(schema)

    def encode(self, schema: str, progress: OnProgress | None = None) -> Encoded:
        """Make the slices that let every selection and order of a schema's modules be answered at once.

        That is one evaluation of the schema, in reading order. Slices that are in the store are not made again.
        ``progress(done, total)`` is told about tokens.
        """
        return self._encode(self.reading(schema), schema, progress)

    def reading(self, schema: str) -> list[Slice]:
        """The slices that ``encode`` makes of a schema, whether they are there or not. Raises ``InputError``."""
        return reading(self.planner.layout(schema), self.slices, self._room)

    def encode_likely(
        self, schema: str, prompts: Sequence[AnyPrompt] = (), progress: OnProgress | None = None
    ) -> Encoded:
        """Make exact slices for likely prompts besides: of the schema's scaffold sets, and of these ``prompts``."""
        layout = self.planner.layout(schema)
        wanted: dict[Slice, None] = {}
        for scaffold in layout.schema.scaffolds:
            wanted.update(dict.fromkeys(scaffolded(layout, self.slices, scaffold.modules, self._room)))
        for prompt in prompts:
            question = self.planner.question(prompt)
            question.check_fits(self.context.n_ctx, self.model.n_ctx_train)
            if question.bound is not None:
                wanted.update(dict.fromkeys(exact_slices(asked(question.bound), self.slices)))
        return self._encode(wanted, schema, progress)

    def _encode(self, slices: Iterable[Slice], label: str, progress: OnProgress | None) -> Encoded:
        wanted, report = list(slices), Encoded()

        def task(slot: Slot, told: OnProgress) -> Task[Encoded]:
            return self.kv_cache.encode(slot, wanted, label, told, report=report)

        return self.host.do(task, Priority.ENCODE, progress)

    @property
    def _room(self) -> int:
        """Cells for a slice and its context: one stays free for the token that applies a shift."""
        return self.context.n_ctx - 1

    def refine(self, schema: str | None = None, progress: OnProgress | None = None) -> Encoded:
        """Make exact what was asked lately, the most used first; gives what was made.

        Answers come first: each interrupts it at once, and refining goes on behind it. What has been made stays when
        this is interrupted. ``schema`` limits it to prompts on one schema. ``progress(done, total)`` is told about
        tokens.
        """
        report = Encoded()

        def task(slot: Slot, told: OnProgress) -> Task[None]:
            return refine(self.kv_cache, slot, schema, report, told)

        self.host.do(task, Priority.REFINE, progress)
        return report

    # -- prompts -----------------------------------------------------------------------------------------------------
    def plan(
        self,
        prompt: AnyPrompt | None = None,
        *,
        text: str | None = None,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
    ) -> Plan:
        """What a prompt consists of: its spans, and where each token comes from, by the slices that there are now.

        Messages, text and tokens are cut into segments, which are cached each behind all before it, and found again by
        whatever begins with the same text.

        Args:
            prompt: Its type tells what it is. A ``str`` that begins with ``<prompt``, a ``Path`` and a parsed prompt
                are PML, on a schema that must have been added. Any other ``str`` is a message of the user. A list of
                mappings is messages, each with ``role`` (system, user, assistant) and ``content``. A list or array of
                numbers is ids of tokens to go on with as they are; so is a ``Text``, whose parts may be reused wherever
                they stand.
            text: Instead, text to go on with as it is, without the model's chat template.
            fidelity: What is done about slices that are not exact. ``"fast"``: nothing, but that the schema's
                closing text (16 tokens at most) is evaluated with the question. ``"balanced"``: a tenth of the spliced
                tokens is evaluated again besides, where the question points. ``"high"``: exact slices only; what has
                none is evaluated, and saved. Or a ``Fidelity``, such as ``Fidelity(recompute=0.2)``, which says the
                share of the spliced tokens that is evaluated again. The engine's when none is given.
            reuse: ``"schema"``: slices that attended to text of the prompt's schema alone; for prompts without one,
                those that are exact. ``"exact"``: no others. ``"anywhere"``: slices that attended to text of other
                prompts, too. So messages and text are answered at once when something before a known passage has
                changed. The engine's when none is given.

        Raises ``PMLError`` or ``InputError``.
        """
        return self.planner.question(prompt, text=text, fidelity=fidelity, reuse=reuse).plan()

    def encode_for(
        self,
        prompt: AnyPrompt,
        progress: OnProgress | None = None,
        *,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
    ) -> Encoded:
        """Make the slices that one prompt needs and the store does not have. The prompt is given as for ``plan``."""
        question = self.planner.question(prompt, fidelity=fidelity, reuse=reuse)
        return self._encode(question.plan().wanted, question.label, progress)

    def prepare(
        self,
        prompt: AnyPrompt | None = None,
        *,
        text: str | None = None,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
        unfinished: bool = False,
    ) -> Preparation:
        """Begin to evaluate a prompt ahead, in the background: what begins with it is answered at once then.

        Answers come first. What has been evaluated stays in the llama.cpp context, for the next prompt to go on from;
        slices of it are saved, but for what a PML prompt brings besides its modules. The last token is not evaluated,
        which every answer begins with. The prompt and its fidelity are given as for ``plan``.

        Args:
            unfinished: Its last text (message, turn) is still being written: what stands behind its last blank is not
                evaluated, and what is evaluated of it is not saved. Whatever else is asked ends it. ``TypingAhead``
                gives a text on after each change.

        Raises ``PMLError``, ``InputError`` or ``ContextFull``.
        """
        if isinstance(prompt, Path):
            prompt = parsed_prompt(prompt)  # which is read once
        question = self.planner.question(prompt, text=text, fidelity=fidelity, reuse=reuse)
        question.check_fits(self.context.n_ctx, self.model.n_ctx_train)
        size = self.planner.size_ahead(question, prompt, text) if unfinished else question.n_tokens - 1
        return self.host.prepare(
            lambda: question.plan().first(size),
            question.label,
            n_tokens=question.n_tokens,
            save=question.bound is None and not unfinished,
            once=unfinished,
        )

    def prefetch(
        self,
        prompt: AnyPrompt | Session | None = None,
        *,
        text: str | None = None,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
    ) -> Future[None]:
        """Read the slices that a session or a prompt is going to need into memory, in the background.

        The prompt is given as for ``plan``.
        """
        if isinstance(prompt, Session):
            return prompt.prefetch()
        plan = self.planner.question(prompt, text=text, fidelity=fidelity, reuse=reuse).plan()
        return self.store.prefetch(self.kv_cache.keys(plan))

    def stream(
        self,
        prompt: AnyPrompt | None = None,
        *,
        text: str | None = None,
        max_tokens: int = 256,
        use_cache: bool = True,
        sampling: Sampling | None = None,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
        progress: OnProgress | None = None,
    ) -> Stream:
        """The answer to a prompt, piece by piece. The prompt, and its fidelity, are given as for ``plan``.

        Slices that are missing are made on the way.

        Args:
            prompt: In any form that ``plan`` takes.
            text: Instead, text to go on with.
            max_tokens: Tokens of the answer at most.
            use_cache: ``False`` evaluates the same tokens from the first to the last, reusing nothing.
            sampling: How tokens are chosen, such as ``Sampling(temperature=0.7, seed=1)``; greedily if not given.
            fidelity: What is done about slices that are not exact.
            reuse: Which slices are taken.
            progress: ``progress(done, total)`` is told about tokens evaluated before the first token of the answer.

        Raises ``PMLError``, ``InputError`` or ``ContextFull``.
        """
        started = time.perf_counter()
        with stage("plan"):
            question = self.planner.question(prompt, text=text, fidelity=fidelity, reuse=reuse)
        question.check_fits(self.context.n_ctx, self.model.n_ctx_train)
        saving = Saving(self.kv_cache, question) if use_cache else None
        answer = Answer(
            self.kv_cache,
            question.plan,
            sampling or Sampling(),
            max_tokens=max_tokens,
            started=started,
            label=question.label,
            use_cache=use_cache,
            at_first=saving.save_prompt if saving else None,
            at_end=saving.save_answer if saving else None,
        )
        return Stream(self.host, answer, question.n_tokens, progress)

    def generate(
        self,
        prompt: AnyPrompt | None = None,
        *,
        text: str | None = None,
        max_tokens: int = 256,
        use_cache: bool = True,
        sampling: Sampling | None = None,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
        progress: OnProgress | None = None,
    ) -> Reply:
        """The whole answer to a prompt. Everything is given as for ``stream``."""
        stream = self.stream(
            prompt,
            text=text,
            max_tokens=max_tokens,
            use_cache=use_cache,
            sampling=sampling,
            fidelity=fidelity,
            reuse=reuse,
            progress=progress,
        )
        return stream.reply()

    def fidelity(
        self,
        prompt: AnyPrompt | None = None,
        *,
        text: str | None = None,
        max_tokens: int = 64,
        advise: bool = True,
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
        progress: OnTrial | None = None,
    ) -> FidelityReport:
        """How far the cached answer to a prompt is from the uncached one, and (``advise``) what would bring it nearer.

        Takes as long as some full prefills. The prompt and its fidelity are given as for ``plan``; ``max_tokens``
        are those of the answer that are compared. Raises ``PMLError`` or ``ContextFull``.
        """
        if isinstance(prompt, Path):
            prompt = parsed_prompt(prompt)  # which is read once

        def question(other: Fidelity | None) -> Question:
            return self.planner.question(prompt, text=text, fidelity=other or fidelity, reuse=reuse)

        return examine(self.host, question, max_tokens=max_tokens, advise=advise, progress=progress)

    def session(
        self,
        name: str,
        *,
        system: str | None = None,
        prompt: PMLPrompt | None = None,
        when_full: WhenFull = "oldest",
        fidelity: Level | Fidelity | None = None,
        reuse: Reuse | None = None,
    ) -> Session:
        """A conversation that is kept: opened where it stood, or begun.

        Args:
            name: What it is found by.
            system: The system text of a new one.
            prompt: Instead, a PML prompt that a new one begins with. Its schema must have been added.
            when_full: What happens when the context overflows. The ``"oldest"`` turns leave, as many as must, or
                ``"half"`` of them at once, and the rest moves down without being evaluated again; ``"refuse"`` raises
                ``ContextFull``.
            fidelity: Given as for ``plan``. Applies to ``prompt``, and to messages with ``reuse="anywhere"``.
            reuse: Given as for ``plan``. ``"anywhere"``: text of a message may come from slices that attended to other
                text, such as a document that another conversation holds. Otherwise messages use exact slices.

        Raises ``InputError`` when it is with another model, or has begun otherwise, and ``CpucacheError`` when it is
        open elsewhere.
        """
        first_prompt = None if prompt is None else self.planner.first_prompt(prompt, fidelity=fidelity, reuse=reuse)
        with self._opening:
            if self._transcripts is None:
                self._transcripts = Transcripts(self._folder)
            session = Session(
                self.host,
                self._transcripts,
                name,
                system=system,
                first_prompt=first_prompt,
                when_full=when_full,
                plan_text=self.planner.continuing(fidelity, reuse),
            )
            self._sessions.add(session)
        return session

    # -- the llama.cpp context ---------------------------------------------------------------------------------------
    def warm_up(self) -> None:
        """Evaluate one token, so that the first prompt does not pay for reading the weights in, and the like."""
        self.host.warm_up()

    def use_store(self, store: Store) -> Store:
        """Keep slices elsewhere from now on; gives the store that was used so far. ``close`` closes the last one."""
        before = self.kv_cache.store
        for space in self._spaces.values():
            space.store = store
        self.forget()
        return before

    def forget(self) -> None:
        """Empty the llama.cpp context, as it is after a restart. The store keeps its slices."""
        self.host.forget()


def _refining_when_idle(spaces: Mapping[str, KVCache]) -> Request[None] | None:
    if not on_mains():
        return None

    def task(_: Request[None]) -> Task[None]:
        for kv_cache in list(spaces.values()):
            with kv_cache.slot() as slot:
                yield from refine(kv_cache, slot, None, Encoded())

    return Request(task, priority=Priority.REFINE, once=True)


def _check(**settings: tuple[str, Sequence[str]]) -> None:
    for name, (value, known) in settings.items():
        if value not in known:
            raise InputError(f"{name}={value!r}: must be one of {', '.join(known)}")

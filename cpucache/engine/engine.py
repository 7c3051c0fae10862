"""The engine: one model, one llama.cpp context, one store, and the schemas that prompts refer to."""

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
"""Default size of the llama.cpp context in cells; the trained context of the model, if that is shorter."""


class Engine:
    """A loaded model that answers prompts and reuses the KV state of every part that it has evaluated before.

    Use an engine as a context manager, or call ``close``. Any thread may call any method, ``close`` included: one
    thread of the engine owns the llama.cpp context, and the requests of all other threads wait in its queue.

    Args:
        model: Name in the catalogue, or path of a GGUF file (default: the first model of the catalogue).
        n_ctx: Cells of the llama.cpp context; a prompt and its answer must fit (default: the context that the model was
            trained on, at most 8192).
        store: Folder of the slices (default: ``$CPUCACHE_HOME``, else the platform's cache folder).
        ram_budget: Memory for slices: bytes, or text such as ``"2GiB"`` (default: a quarter of the memory that is free
            once the model is loaded).
        disk_budget: Disk space for slices, in the same form (default: a quarter of the space that is free or that
            slices of this store take already).
        paranoid: Whether to check the hash of a slice each time that it is read from disk, not only the first time.
        threads: Threads that evaluate tokens (default: one for each physical core).
        gpu_layers: Layers on a GPU: a number, or ``"auto"``.
        kv_type: Type of the keys, ``"f16"`` or ``"q8_0"``; with ``flash="on"`` also that of the values.
        at_rest: Format of slices on disk and in packs: unchanged (``"f16"``), or packed into half (``"q8_0"``) or a
            quarter (``"q4_0"``) of the bytes. A packed slice, once read from disk, differs slightly from the state that
            was saved. An engine finds only slices of its own format.
        flash: Flash attention: ``"on"``, ``"off"`` or ``"auto"`` (default: off on a CPU).
        positions: Layout of schemas: ``"reserved"`` (each module at a fixed offset), ``"packed"`` (modules back to
            back), or ``"auto"`` (reserved while the schema fits the trained context).
        segment_tokens: Minimum and maximum length, in tokens, of segments of plain text and messages. Messages and
            paragraphs may be shorter.
        fidelity: Default for prompts without their own: a level or a ``Fidelity``, see ``plan``.
        reuse: Default for prompts without their own, see ``plan``.
        refine: ``"idle"`` encodes missing exact slices of recent prompts, on mains power, after a second without a
            request.
        sessions: Folder of the conversations (default: ``$CPUCACHE_SESSIONS``, else the platform's user data folder).
        parallel: Number of prompts answered at the same time, 1 to 16; they share the cells of the llama.cpp context.
            Further prompts wait in order.

    Raises:
        ModelError: The model can't be found, read or loaded.
        InputError: A setting has an unknown value or is out of range.
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
        # A later step that fails must close what the earlier ones opened.
        with ExitStack() as opened:
            self.model = loaded = Model(path, gpu_layers_=gpu_layers)
            opened.callback(loaded.close)
            cells = n_ctx or min(loaded.n_ctx_train, DEFAULT_CTX)
            self.context = Context(loaded, n_ctx=cells, n_threads=threads, kv_type=kv_type, flash=flash)
            opened.callback(self.context.close)
            # Measured only now: the weights and the llama.cpp context already take their memory.
            free = psutil.virtual_memory().available
            ram = free // 4 if ram is None else ram
            packing = None if at_rest == "f16" else Packing(at_rest, self.context.n_threads)
            kept = Store(home, ram_budget=ram, disk_budget=disk, paranoid=paranoid, packing=packing)
            opened.callback(lambda: self.store.close() if hasattr(self, "kv_cache") else kept.close())
            self.fingerprint = Fingerprints(home / "index.sqlite").of(path)
            form = self.context.state_format + ("" if packing is None else f"/at-rest-{packing.kind}")
            self.slices = Slices(self.fingerprint, form, Cuts(loaded, *segment_tokens))
            self.kv_cache = KVCache(self.context, kept, self.slices, parallel)
            self._spaces = {_space(self.slices): self.kv_cache}
            template = ChatTemplate(
                loaded.chat_template, bos=loaded.special_text("bos"), eos=loaded.special_text("eos")
            )
            # Reserved positions leave gaps, which need slices that can be moved: not every model's state can.
            positions = positions if self.context.memory.moves else "packed"
            self._planner_of = partial(Planner, template=template, positions=positions, fidelity=usual, reuse=reuse)
            self.planner = self._planner_of(self.kv_cache)
            idle = partial(_refining_when_idle, self._spaces) if refine == "idle" else None
            self.host = Host(loaded, template, self.kv_cache, self.planner, Core(self.context, parallel, idle))
            # An engine that is collected without ``close`` must not leave its thread running.
            opened.callback(weakref.finalize(self, self.host.core.close))
            self._opened = opened.pop_all()
        self._opening = threading.Lock()
        self._folder = Path(sessions) if sessions else None
        self._transcripts: Transcripts | None = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._origin: Engine | None = None  # kept alive: its finalizer closes the core

    @property
    def store(self) -> Store:
        """The store that holds the slices, in memory and on disk."""
        return self.kv_cache.store

    def within(self, namespace: str, *, isolate: bool = False) -> Engine:
        """Returns an engine for one tenant of several that share this engine.

        The new engine has its own schemas and conversations. It takes slices that are not exact only from prompts of
        the same namespace. Exact slices are shared, so a tenant can tell from the time of an answer whether another
        tenant evaluated the same text; ``isolate`` rules that out. Model, llama.cpp context and store are shared, and
        closing either engine closes both.

        Args:
            namespace: Name that other tenants can't choose: 1 to 64 letters, digits, ``-`` and ``_``.
            isolate: Whether to share no slices at all.

        Raises:
            InputError: The name has other characters, or is too long.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", namespace):
            raise InputError(f"namespace={namespace!r:.80}: letters, digits, - and _, 64 at most")
        other = copy.copy(self)
        slices = self.slices.within(namespace, isolate=isolate)
        with self._opening:
            other.kv_cache = self._spaces.setdefault(_space(slices), self.kv_cache.within(slices))
        other.slices = other.kv_cache.slices
        other.planner = self._planner_of(other.kv_cache)
        other.host = replace(self.host, kv_cache=other.kv_cache, planner=other.planner)
        other._folder = (self._folder or default_sessions()) / "namespaces" / namespace
        other._transcripts = None
        other._origin = self
        with self._opening:
            self._opened.callback(other._close_transcripts)
        return other

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Ends every request, running or waiting, in any thread, and frees the model and the llama.cpp context.

        Answers that end this way keep their text so far, and ``metrics.finish`` is ``"interrupted"``.
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
        """Reads and lays out a schema, which prompts then refer to by its name.

        ``schema`` is the path of a PML file, a parsed schema, or a function decorated with ``@cpucache.prompt``.
        Raises ``PMLError`` when the schema is not valid.
        """
        return self.planner.add_schema(schema)

    def encode(self, schema: str, progress: OnProgress | None = None) -> Encoded:
        """Encodes a schema ahead of time, so that prompts with any selection and order of its modules splice slices.

        One evaluation of the schema, in reading order, builds all slices. Slices in the store are not encoded again.
        ``progress(done, total)`` is called with numbers of tokens. Raises ``InputError`` for a schema not added before.
        """
        return self._encode(self.reading(schema), schema, progress)

    def reading(self, schema: str) -> list[Slice]:
        """The slices that ``encode`` builds for a schema, in the store or not. Raises ``InputError``."""
        return reading(self.planner.layout(schema), self.slices, self._room)

    def encode_likely(
        self, schema: str, prompts: Sequence[AnyPrompt] = (), progress: OnProgress | None = None
    ) -> Encoded:
        """Encodes exact slices for likely prompts: for the scaffold sets of a schema, and for ``prompts``.

        ``prompts`` are PML prompts, in the forms that ``plan`` takes; any other prompt has no effect.
        ``progress(done, total)`` is called with numbers of tokens. Raises what ``prepare`` raises.
        """
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
        """Cells for a slice and its context: all but one, which the token that applies a shift needs."""
        return self.context.n_ctx - 1

    def refine(self, schema: str | None = None, progress: OnProgress | None = None) -> Encoded:
        """Encodes the missing exact slices of recent prompts, those of the most frequent prompts first.

        A request for an answer interrupts refining at once; refining continues after it. Slices encoded before an
        interruption are kept. ``schema`` limits refining to prompts on the schema of this name.
        ``progress(done, total)`` is called with numbers of tokens.
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
        """The plan of a prompt: its spans in position order, and the slice that each would take from the store now.

        Messages, text and tokens are cut into segments. Each segment is saved as a slice whose context is everything
        before it, and serves every later prompt that begins with the same text.

        Args:
            prompt: The prompt; its type tells its form. A ``str`` that begins with ``<prompt``, a ``Path`` and a parsed
                prompt are PML, on a schema that must have been added. Any other ``str`` is a message of the user. A
                list of mappings is messages, each with ``role`` (system, user, assistant) and ``content``. A list or
                array of integers is token ids, which the model continues without a chat template. A ``Text`` is token
                ids too, with parts that may be reused at any position.
            text: Plain text instead of a prompt, which the model continues without a chat template.
            fidelity: Treatment of slices that are not exact. ``"fast"`` splices them as saved; only a closing text of
                the schema of at most 16 tokens is recomputed. ``"balanced"`` also recomputes a tenth of the spliced
                tokens, in the modules that the question points to. ``"high"`` takes exact slices only, and evaluates
                and saves every other segment. A ``Fidelity``, such as ``Fidelity(recompute=0.2)``, sets the recomputed
                share of the spliced tokens. Default: that of the engine.
            reuse: Slices that the prompt may take. ``"exact"``: exact ones. ``"schema"``: also clean and related ones
                of the prompt's schema; a prompt without a schema takes exact ones, and any for the parts of a ``Text``.
                ``"anywhere"``: also foreign ones, so that messages and text keep their slices when the text before them
                changes. Default: that of the engine.

        Returns:
            The plan, by the slices that exist now.

        Raises:
            InputError: The prompt is not valid (``PMLError`` for PML), or its schema has not been added.
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
        """Encodes the slices that a prompt needs and the store lacks, without answering the prompt.

        Args:
            prompt: Prompt in a form that ``plan`` takes.
            progress: Called as ``progress(done, total)``, in tokens.
            fidelity: Treatment of slices that are not exact, see ``plan``.
            reuse: Slices that the prompt may take, see ``plan``.

        Returns:
            Numbers of new slices, tokens and bytes, and the time in seconds.

        Raises:
            InputError: The prompt is not valid (``PMLError`` for PML), or its schema has not been added.
        """
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
        """Starts to evaluate a prompt in the background, ahead of the request for its answer.

        Answers have priority. The evaluated tokens stay in the llama.cpp context, and the next prompt that begins with
        them evaluates only the rest. New slices are saved, except for new text of a PML prompt. The last token is left
        to the answer, which needs its logits.

        Args:
            prompt: Prompt in a form that ``plan`` takes.
            text: Plain text instead of a prompt, see ``plan``.
            fidelity: Treatment of slices that are not exact, see ``plan``.
            reuse: Slices that the prompt may take, see ``plan``.
            unfinished: Whether the last message or turn is still being typed. Then the word after its last blank is not
                evaluated, tokens after the last complete segment are not saved, and a request of higher priority, such
                as an answer, ends the preparation. ``TypingAhead`` calls ``prepare`` after each change of a text.

        Returns:
            The preparation, to wait for or to cancel.

        Raises:
            InputError: The prompt is not valid (``PMLError`` for PML), or does not fit (``ContextFull``).
        """
        if isinstance(prompt, Path):
            prompt = parsed_prompt(prompt)  # reads the file once, although several questions are built from it
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
        """Reads the slices that a prompt or a session will need from disk into memory, in the background.

        Args:
            prompt: Session, or prompt in a form that ``plan`` takes.
            text: Plain text instead of a prompt, see ``plan``.
            fidelity: Treatment of slices that are not exact, see ``plan``; without effect for a session.
            reuse: Slices that the prompt may take, see ``plan``; without effect for a session.

        Returns:
            A future that is done once the slices have been read.

        Raises:
            InputError: The prompt is not valid (``PMLError`` for PML), or its schema has not been added.
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
        """Answers a prompt piece by piece.

        The prompt is evaluated when the first piece is requested. Missing slices are encoded and saved before the first
        token.

        Args:
            prompt: Prompt in a form that ``plan`` takes.
            text: Plain text instead of a prompt, see ``plan``.
            max_tokens: Maximum length of the answer, in tokens.
            use_cache: Whether to reuse and save slices; ``False`` evaluates every token of the prompt.
            sampling: Choice of tokens, such as ``Sampling(temperature=0.7, seed=1)`` (default: greedy).
            fidelity: Treatment of slices that are not exact, see ``plan``.
            reuse: Slices that the prompt may take, see ``plan``.
            progress: Called as ``progress(done, total)``, in tokens evaluated before the first token of the answer, by
                the thread that reads the stream.

        Returns:
            An iterator over pieces of the answer, with ``text`` and ``metrics`` so far.

        Raises:
            InputError: A prompt or setting is not valid (``PMLError`` for PML), or the answer has no room
                (``ContextFull``).
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
        """Answers a prompt, and returns when the answer is complete.

        Args:
            prompt: Prompt in a form that ``plan`` takes.
            text: Plain text instead of a prompt, see ``plan``.
            max_tokens: Maximum length of the answer, in tokens.
            use_cache: Whether to reuse and save slices; ``False`` evaluates every token of the prompt.
            sampling: Choice of tokens, such as ``Sampling(temperature=0.7, seed=1)`` (default: greedy).
            fidelity: Treatment of slices that are not exact, see ``plan``.
            reuse: Slices that the prompt may take, see ``plan``.
            progress: Called as ``progress(done, total)``, in tokens evaluated before the first token of the answer.

        Returns:
            The text of the answer, and its metrics.

        Raises:
            InputError: A prompt or setting is not valid (``PMLError`` for PML), or the answer has no room
                (``ContextFull``).
        """
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
        """Measures how much the answer with reuse differs from the answer of full prefill, and what would reduce that.

        The measurement takes as long as several full prefills.

        Args:
            prompt: Prompt in a form that ``plan`` takes.
            text: Plain text instead of a prompt, see ``plan``.
            max_tokens: Maximum length, in tokens, of the answer that is compared.
            advise: Whether to try other settings too: a larger recomputed share, and exact slices.
            fidelity: Treatment of slices that are not exact, see ``plan``.
            reuse: Slices that the prompt may take, see ``plan``.
            progress: Called as ``progress(done, total, next)``, in trials, with the name of the next trial.

        Returns:
            KL divergence and agreement for each token, and the trials, the most useful first.

        Raises:
            InputError: The prompt is not valid (``PMLError`` for PML), or does not fit (``ContextFull``).
        """
        if isinstance(prompt, Path):
            prompt = parsed_prompt(prompt)  # reads the file once, although several questions are built from it

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
        """Opens a conversation that outlives the process; starts it if there is none of this name.

        Args:
            name: Name of the conversation.
            system: System text of a new conversation.
            prompt: PML prompt that starts a new conversation, instead of ``system``. Its schema must have been added.
            when_full: Reaction to a full llama.cpp context. ``"oldest"`` drops as many of the oldest turns as it must,
                ``"half"`` drops half of the turns at once; the other turns move to lower positions without being
                evaluated again, where the model's state can be moved. ``"refuse"`` raises ``ContextFull``.
            fidelity: Treatment of slices that are not exact, see ``plan``: those of ``prompt``, and with
                ``reuse="anywhere"`` those of messages.
            reuse: Slices that ``prompt`` and messages may take, see ``plan``. With ``"anywhere"``, text of a message
                may come from foreign slices, such as a document of another conversation; otherwise messages take exact
                slices only.

        Returns:
            The conversation, which nobody else can open until it is closed.

        Raises:
            InputError: A name or prompt is not valid, or the conversation has another model, system text or prompt.
            CpucacheError: The conversation is open elsewhere, or can't be read.
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
        """Evaluates one token, so that the weights are in memory before the first prompt."""
        self.host.warm_up()

    def use_store(self, store: Store) -> Store:
        """Replaces the store; returns the previous one, which the caller then closes.

        The llama.cpp context is emptied. ``close`` closes the store that is in use at that time.
        """
        before = self.kv_cache.store
        for space in self._spaces.values():
            space.store = store
        self.forget()
        return before

    def forget(self) -> None:
        """Empties the llama.cpp context, as after a restart. The store keeps its slices."""
        self.host.forget()


def _space(slices: Slices) -> tuple[str, str]:
    """What tells the KV caches of one engine apart: which slices they share, and which they find by content."""
    return slices.state_format, slices.scope


def _refining_when_idle(spaces: Mapping[tuple[str, str], KVCache]) -> Request[None] | None:
    """A request that refines the prompts of all namespaces; ``None`` on battery power."""
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

"""The engine: one model, one llama.cpp context, one store, and the schemas that prompts refer to."""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cpucache.engine.advice import FidelityReport, OnTrial, examine
from cpucache.engine.ahead import Preparation
from cpucache.engine.answer import Answer
from cpucache.engine.encoding import encode, likely_slices, refine_recent, schema_slices
from cpucache.engine.host import Host
from cpucache.engine.leaving import WhenFull
from cpucache.engine.opening import Refine, Settings, open_host
from cpucache.engine.planner import AnyPrompt, PMLPrompt, Question, parsed_prompt
from cpucache.engine.reply import Reply
from cpucache.engine.saving import Saving
from cpucache.engine.session import Session
from cpucache.engine.size import parse_size
from cpucache.engine.stream import Stream
from cpucache.layout import Positions, SchemaLayout
from cpucache.layout.cuts import LEAST, MOST
from cpucache.pml.tree import Schema
from cpucache.reuse import Encoded, Fidelity, Level, OnProgress, Plan, Reuse, Slice
from cpucache.runtime import KVType, Sampling
from cpucache.runtime.packing import AtRest
from cpucache.sessions import Transcripts, default_sessions
from cpucache.stages import stage
from cpucache.store import Store

if TYPE_CHECKING:
    from cpucache.authoring import AnyPromptFunction


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
        settings = Settings(
            model=model,
            n_ctx=n_ctx,
            store=store,
            ram_budget=None if ram_budget is None else parse_size(ram_budget),
            disk_budget=None if disk_budget is None else parse_size(disk_budget),
            paranoid=paranoid,
            threads=threads,
            gpu_layers=gpu_layers,
            kv_type=kv_type,
            at_rest=at_rest,
            flash=flash,
            positions=positions,
            segment_tokens=segment_tokens,
            fidelity=Fidelity.of(fidelity),
            reuse=reuse,
            refine=refine,
            parallel=parallel,
        )
        host, self._opened = open_host(settings)
        self._share(host)
        self.model, self.context = host.model, host.context
        self.fingerprint = host.slices.fingerprint
        self._open_lock = threading.Lock()
        self._folder = Path(sessions) if sessions else None
        self._transcripts: Transcripts | None = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

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
        other = copy.copy(self)
        other._share(self.host.within(namespace, isolate=isolate))
        other._folder = (self._folder or default_sessions()) / "namespaces" / namespace
        other._transcripts = None
        with self._open_lock:
            self._opened.callback(other._close_transcripts)
        return other

    def _share(self, host: Host) -> None:
        """Sets what differs between the engines of different namespaces."""
        self.host = host
        self.kv_cache, self.slices, self.planner = host.kv_cache, host.slices, host.planner

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
        return encode(self.host, self.reading(schema), schema, progress)

    def reading(self, schema: str) -> list[Slice]:
        """The slices that ``encode`` builds for a schema, in the store or not. Raises ``InputError``."""
        return schema_slices(self.host, schema)

    def encode_likely(
        self, schema: str, prompts: Sequence[AnyPrompt] = (), progress: OnProgress | None = None
    ) -> Encoded:
        """Encodes exact slices for likely prompts: for the scaffold sets of a schema, and for ``prompts``.

        ``prompts`` are PML prompts, in the forms that ``plan`` takes; any other prompt has no effect.
        ``progress(done, total)`` is called with numbers of tokens. Raises what ``prepare`` raises.
        """
        return encode(self.host, likely_slices(self.host, schema, prompts), schema, progress)

    def refine(self, schema: str | None = None, progress: OnProgress | None = None) -> Encoded:
        """Encodes the missing exact slices of recent prompts, those of the most frequent prompts first.

        A request for an answer interrupts refining at once; refining continues after it. Slices encoded before an
        interruption are kept. ``schema`` limits refining to prompts on the schema of this name.
        ``progress(done, total)`` is called with numbers of tokens.
        """
        return refine_recent(self.host, schema, progress)

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
        return encode(self.host, question.plan().wanted, question.label, progress)

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
        with self._open_lock:
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
        before = self.store
        for kv_cache in self.host.namespaces:
            kv_cache.store = store
        self.forget()
        return before

    def forget(self) -> None:
        """Empties the llama.cpp context, as after a restart. The store keeps its slices."""
        self.host.forget()

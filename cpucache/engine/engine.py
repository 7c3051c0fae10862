"""The engine: one model, one context, one store, and the schemas that prompts are written against."""

from __future__ import annotations

import difflib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from cpucache.engine.reply import Reply
from cpucache.engine.stream import Stream
from cpucache.errors import ContextFull, InputError
from cpucache.layout import ChatTemplate, Plan, Positions, SchemaLayout, bind
from cpucache.models import default_model, resolve_model
from cpucache.pml import load_prompt, load_schema, parse_prompt, resolve
from cpucache.pml.tree import Prompt, Schema
from cpucache.reuse import Encoded, OnProgress, Workspace
from cpucache.runtime import Context, KVType, Model, Sampling
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
    schemas are laid out.

    Use it as a context manager, or ``close`` it. Calls from several threads take turns.

    Raises ``ModelError`` when the model can't be found, read or loaded.
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
    ) -> None:
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
        fingerprint = Fingerprints(home / "index.sqlite").of(path)
        self.workspace = Workspace(self.context, self.store, fingerprint)
        self.schemas: dict[str, SchemaLayout] = {}
        self._positions = positions
        self._template = ChatTemplate(
            self.model.chat_template, bos=self.model.special_text("bos"), eos=self.model.special_text("eos")
        )
        self._lock = threading.RLock()
        self._stream: Stream | None = None

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Free the model and its context."""
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
        parsed = schema if isinstance(schema, Schema) else load_schema(Path(schema))
        layout = SchemaLayout(parsed, self.model, self._template, self._positions)
        self.schemas[parsed.name] = layout
        return layout

    def encode(self, schema: str, progress: OnProgress | None = None) -> Encoded:
        """Make every slice of a schema that is not in the store yet.

        ``progress(done, total)`` is told about tokens.
        """
        layout = self._layout(schema)
        # Modules that are never cached have no slices of their own; as context of others they are found there.
        segments = [segment for segment in layout.segments if segment.cache and not segment.placeholder]
        with self._alone():
            return self.workspace.encode(segments, schema, progress)

    # -- prompts -----------------------------------------------------------------------------------------------------
    def plan(self, prompt: str | Path | Prompt) -> Plan:
        """What a prompt consists of: its spans, and where each token comes from.

        ``prompt``: PML text, the path of a file, or a parsed prompt. Its schema must have been added. Raises
        ``PMLError``.
        """
        parsed = _parsed(prompt)
        layout = self._layout(parsed.schema)
        return bind(layout, resolve(parsed, layout.schema), file=parsed.file)

    def encode_for(self, prompt: str | Path | Prompt, progress: OnProgress | None = None) -> Encoded:
        """Make the slices that one prompt needs and the store does not have."""
        parsed = _parsed(prompt)
        segments = self.plan(parsed).segments
        with self._alone():
            return self.workspace.encode(segments, parsed.schema, progress)

    def stream(
        self,
        prompt: str | Path | Prompt,
        *,
        max_tokens: int = 256,
        use_cache: bool = True,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | tuple[str, ...] | list[str] = (),
        progress: OnProgress | None = None,
    ) -> Stream:
        """The answer to a prompt, piece by piece.

        ``use_cache=False`` evaluates the same tokens from the first to the last, reusing nothing. ``temperature=0`` is
        greedy. Slices that are missing are made on the way. ``progress(done, total)`` is told about tokens evaluated
        before the first token of the answer. Raises ``PMLError``, ``InputError`` or ``ContextFull``.
        """
        started = time.perf_counter()
        sampling = Sampling(
            temperature, top_k, top_p, min_p, repeat_penalty, seed, (stop,) if isinstance(stop, str) else tuple(stop)
        )
        parsed = _parsed(prompt)
        plan = self.plan(parsed)
        if plan.n_tokens >= self.context.n_ctx:
            raise self._too_long(plan, parsed)
        with self._alone():
            self._stream = Stream(
                self.workspace,
                plan,
                sampling,
                max_tokens=max_tokens,
                started=started,
                lock=self._lock,
                schema=parsed.schema,
                use_cache=use_cache,
                progress=progress,
            )
            return self._stream

    def generate(self, prompt: str | Path | Prompt, **settings: Any) -> Reply:
        """The whole answer. Settings are those of ``stream``."""
        with self._lock:
            return self.stream(prompt, **settings).reply()

    def warm_up(self) -> None:
        """Evaluate one token, so that the first prompt does not pay for reading the weights in."""
        with self._alone():
            self.workspace.reset()
            self.workspace.append(np.array([self.model.filler], np.int32))
            self.workspace.reset()

    # -- inside ------------------------------------------------------------------------------------------------------
    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the context to oneself: other threads wait, and an unfinished stream of this thread ends."""
        with self._lock:
            if self._stream is not None:
                self._stream.close()
                self._stream = None
            yield

    def _layout(self, name: str) -> SchemaLayout:
        layout = self.schemas.get(name)
        if layout is None:
            near = difflib.get_close_matches(name, self.schemas, 1)
            known = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(self.schemas) or 'none'}"
            raise InputError(f"no schema '{name}' has been added ({known}); add it with add_schema()")
        return layout

    def _too_long(self, plan: Plan, prompt: Prompt) -> ContextFull:
        sizes: dict[str, int] = {}
        for span in plan.spans:
            name = span.segment.module or "text of the schema" if span.segment else "new text"
            sizes[name] = sizes.get(name, 0) + len(span.tokens)
        largest = ", ".join(f"{name} ({size})" for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:3])
        return ContextFull(
            f"{prompt.file}: the prompt is {plan.n_tokens} tokens long and leaves no room for an answer in a context "
            f"of {self.context.n_ctx}; its largest parts: {largest}; raise --ctx (n_ctx=…) or leave something out"
        )


def parse_size(text: int | str) -> int:
    """Bytes from a number or text such as ``512MiB``, ``2GiB``, ``1.5GB``. Raises ``InputError``."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise InputError(f"'{text}' is no size; write for example 512MiB or 2GiB")
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _parsed(prompt: str | Path | Prompt) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str) and prompt.lstrip().startswith("<"):
        return parse_prompt(prompt)
    return load_prompt(Path(prompt))

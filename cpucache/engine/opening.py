"""Opening of an engine: checks its settings, then loads the model and opens its llama.cpp context and store."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

from cpucache.engine.core import Core
from cpucache.engine.encoding import refining_when_idle
from cpucache.engine.host import Host
from cpucache.engine.namespaces import Namespaces
from cpucache.engine.planner import Planner
from cpucache.errors import InputError
from cpucache.layout import ChatTemplate, Positions
from cpucache.layout.cuts import Cuts, check_sizes
from cpucache.layout.schema import POSITIONS
from cpucache.models import default_model, resolve_model
from cpucache.reuse import REUSES, Fidelity, KVCache, Reuse, Slices
from cpucache.reuse.splicer import SLOTS
from cpucache.runtime import Context, KVType, Model
from cpucache.runtime.packing import AT_REST, AtRest, Packing
from cpucache.store import Fingerprints, Store, default_home

Refine: TypeAlias = Literal["off", "idle"]
REFINES: tuple[Refine, ...] = ("off", "idle")
DEFAULT_CTX = 8192
"""Default size of the llama.cpp context in cells; the trained context of the model, if that is shorter."""


@dataclass(frozen=True)
class Settings:
    """The settings of an engine, see ``Engine``. Raises ``InputError`` for one that is unknown or out of range."""

    model: str | Path | None
    n_ctx: int | None
    store: str | Path | None
    ram_budget: int | None
    disk_budget: int | None
    paranoid: bool
    threads: int | None
    gpu_layers: int | str
    kv_type: KVType
    at_rest: AtRest
    flash: str | None
    positions: Positions
    segment_tokens: tuple[int, int]
    fidelity: Fidelity
    reuse: Reuse
    refine: Refine
    parallel: int

    def __post_init__(self) -> None:
        for setting, known in (
            ("positions", POSITIONS),
            ("refine", REFINES),
            ("reuse", REUSES),
            ("at_rest", AT_REST),
        ):
            if (value := getattr(self, setting)) not in known:
                raise InputError(f"{setting}={value!r}: must be one of {', '.join(known)}")
        check_sizes(*self.segment_tokens)
        for setting in ("threads", "n_ctx"):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise InputError(f"{setting}={value}: must be 1 or more")
        if not 1 <= self.parallel <= SLOTS:
            raise InputError(f"parallel={self.parallel}: must be from 1 to {SLOTS}")


def open_host(settings: Settings) -> tuple[Host, ExitStack]:
    """Opens all parts of an engine. Returns them, and what closes them; a part that can't be opened leaves none open.

    The core also closes when the host is collected.
    """
    path = resolve_model(str(settings.model or default_model()))
    with ExitStack() as opened:
        model = Model(path, gpu_layers_=settings.gpu_layers)
        opened.callback(model.close)
        context = Context(
            model,
            n_ctx=settings.n_ctx or min(model.n_ctx_train, DEFAULT_CTX),
            n_threads=settings.threads,
            kv_type=settings.kv_type,
            flash=settings.flash,
        )
        opened.callback(context.close)
        kv_cache = _open_kv_cache(settings, context)
        # A lambda, because ``Engine.use_store`` may replace the store.
        opened.callback(lambda: kv_cache.store.close())  # noqa: PLW0108
        template = ChatTemplate(model.chat_template, bos=model.special_text("bos"), eos=model.special_text("eos"))
        # Reserved positions leave gaps, which need slices that can be moved: not every model's state can.
        positions: Positions = settings.positions if context.memory.moves else "packed"
        planner = Planner(kv_cache, template, positions, fidelity=settings.fidelity, reuse=settings.reuse)
        namespaces = Namespaces(kv_cache)
        idle = partial(refining_when_idle, namespaces) if settings.refine == "idle" else None
        host = Host(model, template, kv_cache, planner, Core(context, settings.parallel, idle), namespaces)
        # An engine that is collected without ``close`` must not leave its thread running.
        opened.callback(weakref.finalize(host, host.core.close))
        return host, opened.pop_all()


def _open_kv_cache(settings: Settings, context: Context) -> KVCache:
    """Opens the store, and creates the KV cache of its slices for the model of ``context``."""
    home = Path(settings.store) if settings.store else default_home()
    ram_budget = settings.ram_budget
    if ram_budget is None:
        # Measured only now: the weights and the llama.cpp context already take their memory.
        ram_budget = psutil.virtual_memory().available // 4
    packing = None if settings.at_rest == "f16" else Packing(settings.at_rest, context.n_threads)
    store = Store(
        home, ram_budget=ram_budget, disk_budget=settings.disk_budget, paranoid=settings.paranoid, packing=packing
    )
    try:
        fingerprint = Fingerprints(home / "index.sqlite").of(context.model.path)
        state_format = context.state_format + ("" if packing is None else f"/at-rest-{packing.kind}")
        slices = Slices(fingerprint, state_format, Cuts(context.model, *settings.segment_tokens))
        return KVCache(context, store, slices, settings.parallel)
    except BaseException:
        store.close()
        raise

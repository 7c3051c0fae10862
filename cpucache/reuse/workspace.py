"""The workspace: one context, one store, and the slices that go between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from cpucache.errors import CpucacheError, ModelError
from cpucache.layout import Plan, Segment
from cpucache.reuse.encoder import Encoder, Made, effort
from cpucache.reuse.progress import OnProgress, Step, counting
from cpucache.reuse.splicer import Refused, Spliced, Splicer
from cpucache.runtime import Context
from cpucache.runtime.context import Bytes, Logits
from cpucache.runtime.model import Tokens
from cpucache.store import SliceInfo, Store, context_key, slice_key

T = TypeVar("T")
_FUTILE = 20  # attempts to get at slices none of which got any further than the one before
_POLL = 0.05  # seconds between looks at what another process is making


@dataclass
class Prefill:
    """What it took to get a prompt into the context. Times in milliseconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens that were not evaluated: spliced, or in the context already."""
    fresh_tokens: int = 0
    encoded_tokens: int = 0
    """Tokens evaluated to make slices that were missing. In an exact plan these are among the fresh ones."""
    encode_ms: float = 0.0
    splice_ms: float = 0.0
    prefill_ms: float = 0.0


@dataclass
class Encoded:
    """What was encoded, and how long it took."""

    slices: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    made: set[Segment] = field(default_factory=set, repr=False)

    def add(self, made: Made) -> None:
        """Count a slice that was made."""
        self.slices += 1
        self.tokens += len(made.segment.tokens)
        self.bytes += made.state.nbytes
        self.made.add(made.segment)


class _Gone(Exception):
    """A slice that was there is not any more: found damaged, or evicted by another process."""


class Workspace:
    """Gets plans into a context, making on the way what slices are missing.

    ``fingerprint`` is the hash of the model's file. Raises ``ModelError`` for plans with slices when the model's state
    can't be spliced (recurrent models, absolute positions).
    """

    def __init__(self, context: Context, store: Store, fingerprint: str) -> None:
        self.context = context
        self.store = store
        self._fingerprint = fingerprint
        self._splicer = Splicer(context)
        self._encoder = Encoder(self._splicer)
        self._keys: WeakKeyDictionary[Segment, str] = WeakKeyDictionary()
        self.prefill_rate: float | None = None
        """Tokens evaluated in a second, as last measured over 32 tokens or more, or a few at first."""

    # -- slices ------------------------------------------------------------------------------------------------------
    def key(self, segment: Segment) -> str:
        """The key of a segment's slice under this model and context."""
        key = self._keys.get(segment)
        if key is None:
            context = self._context_key(segment)
            key = slice_key(self._fingerprint, self.context.state_format, context, segment.tokens, segment.home)
            self._keys[segment] = key
        return key

    def _context_key(self, segment: Segment) -> str:
        slices = (
            (self.key(span.segment), span.start, len(span.tokens), span.renewed)
            for span in segment.context
            if span.segment
        )
        return context_key(slices, segment.lead)

    def keys(self, plan: Plan) -> list[str]:
        """The keys of the slices that a plan is made of."""
        return [self.key(segment) for segment in self._loaded(plan.segments)]

    def _loaded(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """Those of consecutive segments whose slices are loaded: a recurrent state is that of all tokens before."""
        return segments[-1:] if self.context.model.recurrent else segments

    def missing(self, segments: Iterable[Segment], held: Collection[Segment] = ()) -> list[Segment]:
        """Those of ``segments`` that have no slice, and what of their contexts is needed to make them, in order.

        Those ``held`` count as had.
        """
        needed: dict[Segment, None] = {}
        had = set(held)

        def add(segment: Segment) -> None:
            if segment in needed or segment in had:
                return
            if self.key(segment) in self.store:
                had.add(segment)
                return
            for other in self._loaded(segment.sees):
                add(other)
            needed[segment] = None

        for segment in segments:
            add(segment)
        return list(needed)

    def encode(self, segments: Iterable[Segment], schema: str = "", progress: OnProgress | None = None) -> Encoded:
        """Make the slices that are missing among ``segments``."""
        segments = list(segments)
        report = Encoded()
        states: dict[Segment, Bytes] = {}

        def make() -> None:
            missing = self.missing(segments, states)
            self._make(missing, (), (), states, schema, report, counting(progress, effort(missing)))

        self._mending(make, states)
        return report

    def _make(
        self,
        missing: list[Segment],
        wanted: Collection[Segment],
        held: Collection[Segment],
        states: dict[Segment, Bytes],
        schema: str,
        report: Encoded,
        progress: Step | None,
    ) -> None:
        """Encode ``missing``; adds to ``states`` those ``wanted``, as far as they were made here.

        Those ``held`` lie in the context, where they will be found.
        What another process is making already is waited for, up to the store's patience.
        """
        if not missing:
            return
        self._check_can_be_made(missing)
        self.store.missed(len(missing))
        started = waiting = time.monotonic()
        # Kept at hand besides the wanted: contexts of what comes later. A small store may drop any of them for what is
        # made now.
        keep = {*wanted, *(other for segment in missing for other in self._loaded(segment.sees))}
        for segment in keep.difference(missing, held):
            self._held(states, segment)
        todo = missing
        while todo:
            mine = self._claimed(todo)
            if not mine and time.monotonic() - waiting > self.store.patience:
                mine = todo
            try:
                for made in self._encoder.encode(mine, partial(self._held, states), progress):
                    self._keep(made, schema)
                    report.add(made)
                    if made.segment in keep:
                        states[made.segment] = made.state
            finally:
                self.store.release(self.key(segment) for segment in mine)
            if not mine:
                time.sleep(_POLL)
            done = set(mine)
            left = [segment for segment in todo if segment not in done and self.key(segment) not in self.store]
            waiting = waiting if len(left) == len(todo) else time.monotonic()
            todo = left
        report.seconds += time.monotonic() - started

    def _claimed(self, segments: list[Segment]) -> list[Segment]:
        """Those of ``segments`` that this process is to make now: nobody else is at them, and their contexts exist."""
        mine: dict[Segment, None] = {}
        elsewhere: set[Segment] = set()
        for segment in segments:
            ready = elsewhere.isdisjoint(self._loaded(segment.sees))
            if ready and self.store.claim(self.key(segment)):
                mine[segment] = None
            elif self.key(segment) not in self.store:
                elsewhere.add(segment)
        return list(mine)

    def _keep(self, made: Made, schema: str) -> None:
        segment = made.segment
        info = SliceInfo(
            fingerprint=self._fingerprint,
            model=self.context.model.path.stem,
            schema=schema,
            module=segment.module,
            tokens=len(segment.tokens),
            start=segment.home,
            state_format=self.context.state_format,
            context=self._context_key(segment),
            seconds=made.seconds,
        )
        self.store.put(self.key(segment), made.state, segment.tokens, info)

    def _held(self, states: dict[Segment, Bytes], segment: Segment) -> Bytes:
        """The state of a segment, kept at hand in ``states`` from then on. Raises ``_Gone``."""
        if segment not in states:
            state = self.store.get(self.key(segment))
            if state is None:
                raise _Gone
            states[segment] = state
        return states[segment]

    def _check_can_be_made(self, segments: Iterable[Segment]) -> None:
        """What sees everything before it is made where it stands, with any model. The rest has to be moved."""
        if not self.context.can_shift and not all(segment.chained for segment in segments):
            raise self._rigid()

    def _check_can_be_spliced(self, plan: Plan) -> None:
        if self.context.can_shift:
            return
        before: tuple[Segment | None, ...] = ()
        for span in plan.spans:
            if span.segment and not (span.whole and not span.delta and span.segment.sees == before):
                raise self._rigid()
            before = (*before, span.segment)

    def _rigid(self) -> ModelError:
        model = self.context.model
        kind = "keeps a recurrent state" if model.recurrent else "ties what it knows to absolute positions"
        return ModelError(
            f"{model.path.name}: a {model.architecture} model {kind}, so that modules can't be spliced into it; "
            "use --fidelity high, which reuses whole combinations of them, or --no-cache (use_cache=False)"
        )

    # -- prompts -----------------------------------------------------------------------------------------------------
    def prefill(
        self, plan: Plan, schema: str = "", progress: OnProgress | None = None, *, fresh: bool = False
    ) -> Prefill:
        """Get ``plan`` into the context, with logits of its last token.

        ``fresh=True`` forgets what the context holds first, so that every token without a slice is evaluated. Slices
        that turn out to be unusable are made again, once.
        """
        if fresh:
            self._splicer.reset()
        self._check_can_be_spliced(plan)
        encoded = Encoded()
        states: dict[Segment, Bytes] = {}

        def splice() -> Spliced:
            shared = self._splicer.shared(plan)
            held = {span.segment for span in plan.spans[:shared] if span.segment}
            wanted = [segment for segment in self._loaded(plan.segments) if segment not in held]
            missing = self.missing(wanted, states.keys() | held)
            step = counting(progress, effort(missing) + plan.n_tokens - plan.n_cached)
            self._make(missing, wanted, held, states, schema, encoded, step)
            with self.store.quiet():
                return self._splicer.splice(plan, partial(self._held, states), step)

        with self.store.using(self.keys(plan)):
            spliced = self._mending(splice, states)
        evaluated = spliced.evaluated
        if plan.exact:
            evaluated += sum(len(span.tokens) for span in plan.spans if span.segment in encoded.made)
        self._learn_rate(encoded.tokens + spliced.evaluated, encoded.seconds + spliced.prefill_ms / 1000)
        return Prefill(
            prompt_tokens=plan.n_tokens,
            cached_tokens=plan.n_tokens - evaluated,
            fresh_tokens=evaluated,
            encoded_tokens=encoded.tokens,
            encode_ms=encoded.seconds * 1000,
            splice_ms=spliced.splice_ms,
            prefill_ms=spliced.prefill_ms,
        )

    def _mending(self, action: Callable[[], T], states: dict[Segment, Bytes]) -> T:
        """Do ``action``; slices that turn out to be unusable are made again, each of them once.

        So are those that go before they are had, as often as that happens: what is in ``states`` by then is kept, so
        that each attempt gets further than the one before.
        """
        refused: set[Segment] = set()
        had, futile = -1, 0
        while True:
            try:
                return action()
            except _Gone:
                futile = futile + 1 if len(states) == had else 0
                had = len(states)
                if futile == _FUTILE:
                    raise CpucacheError(
                        "slices are evicted faster than they are made; give the store more room"
                    ) from None
            except Refused as error:
                if error.segment in refused:
                    raise CpucacheError(f"{error}, not even when made anew; check the store's disk") from error
                refused.add(error.segment)
                states.pop(error.segment, None)
                self.store.discard(self.key(error.segment))

    def _learn_rate(self, tokens: int, seconds: float) -> None:
        if seconds > 0 and tokens >= (8 if self.prefill_rate is None else 32):
            self.prefill_rate = tokens / seconds

    def capture(self, segments: Iterable[Segment], schema: str = "") -> int:
        """Save what the context holds of ``segments``, evaluated as fresh text right behind their contexts.

        Gives how many bytes there were. Writing goes on in the background.
        """
        taken = 0
        for segment in segments:
            state = self._splicer.capture(segment)
            if state is not None:
                # What making it again would take.
                seconds = len(segment.tokens) / (self.prefill_rate or 100.0)
                self._keep(Made(segment, state, seconds), schema)
                taken += state.nbytes
        return taken

    def append(self, tokens: Tokens) -> None:
        """Evaluate tokens behind everything else, with logits of the last."""
        self._splicer.append(tokens)

    def forced(self, plan: Plan, tokens: Tokens, schema: str = "", progress: OnProgress | None = None) -> Logits:
        """Logits behind each token of the plan's last span, which is fresh, and behind each of ``tokens`` after it.

        One row for each, a vocabulary long: what the model would say next if this is how it went on.
        """
        *before, last = plan.spans
        self.prefill(Plan(tuple(before), plan.exact), schema, progress)
        rows = self._splicer.append(np.concatenate([last.tokens, tokens]), logits="all")
        assert rows is not None
        return rows

    def reset(self) -> None:
        """Empty the context. The store keeps its slices."""
        self._splicer.reset()

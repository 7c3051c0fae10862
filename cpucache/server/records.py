"""Records of requests: what a tenant asked lately, what it was answered from, and, when asked, why not from more."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cpucache.engine import Engine, Metrics, Stream
from cpucache.engine.misses import Asked, Miss, explain
from cpucache.engine.reply import Prepared
from cpucache.layout import RoleRun, Text, Tokens
from cpucache.layout.vocabulary import empty
from cpucache.reuse import Plan, Reuse
from cpucache.server.asked import Asked as Given
from cpucache.server.failures import Refusal

SHOWN = 100
"""Requests that are listed."""
_KEPT = 2 * SHOWN
"""Those that are kept: the oldest to explain the others by."""
_TOKENS = 2_000_000
"""Tokens of prompts that are kept, 4 bytes each."""


PREPARING = "/v1/cache/prepare"
"""The path that evaluates ahead."""


@dataclass(eq=False)
class Record:
    """A request that was answered, prepared for, or refused."""

    id: str
    path: str
    model: str
    created: float = field(default_factory=time.time)
    metrics: Metrics = field(default_factory=Metrics)
    status: int | None = None
    """The HTTP status; ``None``: it is being answered."""
    finish: str = "running"
    prompt: Tokens = field(default_factory=empty)
    answer: list[int] = field(default_factory=list)
    """Tokens of the answer that were evaluated."""
    roles: tuple[RoleRun, ...] = ()
    evaluated: tuple[tuple[int, int], ...] = ()
    """The tokens of the prompt that were evaluated, each run by its beginning and end."""
    ends: tuple[int, ...] = ()
    """Where the exact slices end that the prompt begins with."""
    exact: bool = True
    """Whether what was saved behind these is exact, too."""
    begun: float = 0.0
    """When its slices were looked up, by ``time.monotonic``."""
    saved: float = float("inf")
    """When its prompt had been evaluated and saved."""
    use_cache: bool = True
    schema: bool = False
    """Whether it is a PML prompt."""
    reuse: Reuse = "schema"
    """Which slices it could take."""

    def as_dict(self) -> dict[str, Any]:
        """What is told about it."""
        metrics = self.metrics
        return {
            "id": self.id,
            "created": round(self.created, 3),
            "path": self.path,
            "model": self.model,
            "status": self.status,
            "finish": self.finish,
            "prompt_tokens": metrics.prompt_tokens or len(self.prompt),
            "exact": metrics.exact_tokens,
            "clean": metrics.clean_tokens,
            "related": metrics.related_tokens,
            "foreign": metrics.foreign_tokens,
            "evaluated": metrics.fresh_tokens,
            "recomputed": metrics.recomputed_tokens,
            "completion_tokens": metrics.completion_tokens,
            "ttft_ms": round(metrics.ttft_ms, 1),
            "total_ms": round(metrics.total_ms, 1),
        }

    def looked_up(self, metrics: Metrics) -> None:
        """Note that the first token is there."""
        self.saved = time.monotonic()
        self.begun = self.saved - (metrics.encode_ms + metrics.splice_ms + metrics.prefill_ms) / 1000

    @property
    def size(self) -> int:
        """Tokens that are kept of it."""
        return len(self.prompt) + len(self.answer)

    @property
    def rate(self) -> float:
        """Tokens evaluated in a second; 0 where none were."""
        seconds = (self.metrics.prefill_ms + self.metrics.encode_ms) / 1000
        return self.metrics.fresh_tokens / seconds if seconds > 0 else 0.0


class Records:
    """The last requests of a tenant. May be used from several threads.

    Args:
        engine: The tenant's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: deque[Record] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    # -- while a request is answered ---------------------------------------------------------------------------------
    def begin(self, record: Record) -> Record:
        """Note a request."""
        with self._lock:
            self._kept.append(record)
        return record

    def answered(self, record: Record, stream: Stream) -> None:
        """Note what an answer that has ended was made of."""
        record.metrics, record.finish = stream.metrics, stream.metrics.finish
        record.answer = stream.tokens[: stream.evaluated]
        spans = stream.plan.spans
        if spans:
            record.prompt = stream.plan.tokens
            first = next((index for index, span in enumerate(spans) if span.relation != "exact"), len(spans))
            record.exact = first == len(spans)
            record.ends = tuple(span.end for span in spans[:first] if span.slice)
            record.evaluated = evaluated(stream.plan, stream.metrics.fresh_tokens)
        self._trim()

    def prepared(self, identity: str, given: Given, made: Prepared, model: str) -> Record:
        """Note a prompt that was evaluated ahead."""
        there = given.size - made.evaluated_tokens
        metrics = Metrics(prompt_tokens=given.size, exact_tokens=there, fresh_tokens=made.evaluated_tokens)
        record = Record(identity, PREPARING, model, metrics=metrics, finish="prepared", saved=time.monotonic())
        record.schema = not isinstance(given.prompt, Text)
        if isinstance(given.prompt, Text):
            record.prompt, record.roles = given.prompt.tokens[:-1], given.prompt.roles
        return self.begin(record)

    def list(self) -> list[Record]:
        """The last requests, the newest first."""
        with self._lock:
            return list(self._kept)[: -SHOWN - 1 : -1]

    def find(self, identity: str) -> Record:
        """A request by its id. Raises ``Refusal`` (404)."""
        for record in self.list():
            if record.id == identity:
                return record
        raise Refusal(404, f"no request '{identity}' is on record; GET /v1/requests lists the last {SHOWN}")

    def _trim(self) -> None:
        with self._lock:
            while len(self._kept) > 1 and sum(each.size for each in self._kept) > _TOKENS:
                self._kept.popleft()

    # -- when somebody asks ------------------------------------------------------------------------------------------
    def why(self, record: Record) -> Miss | None:
        """Why tokens of a prompt were evaluated that need not have been. Takes up to a second."""
        if record.schema:
            made = record.metrics.encoded_tokens
            return Miss("not-encoded", 0, made) if made else None
        with self._lock:
            known = [each for each in self._kept if each.use_cache and not each.schema and each.saved <= record.begun]
        return explain(
            self._asked(record),
            [self._asked(each) for each in known],
            self.text,
            points=self._engine.context.memory.points,
        )

    def text(self, tokens: Tokens) -> str:
        """The text of tokens."""
        return self._engine.model.text(tokens, special=True)

    def _asked(self, record: Record) -> Asked:
        """A record as it is compared with others."""
        size = len(record.prompt)
        tokens = np.concatenate([record.prompt, np.array(record.answer, np.int32)])
        ends = list(record.ends)
        if record.exact:
            # As ``engine.saving`` has it: the rest of the prompt but for its last token, then that and the answer.
            for begin, end in ((ends[-1] if ends else 0, size - 1), (size - 1, len(tokens))):
                ends += [begin + cut for cut in self._engine.slices.cuts(tokens[begin:end], part=True)]
        return Asked(tokens, size, record.roles, tuple(ends), record.evaluated, record.use_cache)


def evaluated(plan: Plan, count: int) -> tuple[tuple[int, int], ...]:
    """The tokens of a prompt that were evaluated, ``count`` in all, by what its plan has no slices of."""
    runs: list[tuple[int, int]] = []
    at = 0
    for span in plan.spans:
        if span.slice is None or span.missing:
            runs.append((at, at + len(span.tokens)))
        at += len(span.tokens)
    if sum(end - begin for begin, end in runs) < count:
        return ((at - count, at),)  # a recurrent model goes on from further back
    # Where there were fewer, the llama.cpp context held the first of them.
    return _last(runs, count)


def _last(runs: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """The last ``count`` places of some runs."""
    kept: list[tuple[int, int]] = []
    for begin, end in reversed(runs):
        if count <= 0:
            break
        kept.append((max(begin, end - count), end))
        count -= end - begin
    return tuple(reversed(kept))

"""Records of a tenant's last requests: where the state of each prompt came from, and why tokens were evaluated."""

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
"""Number of requests that are listed."""
_KEPT = 2 * SHOWN
"""Number of requests that are kept: those not listed any more still explain the others."""
_TOKENS = 2_000_000
"""Number of tokens of all kept requests together, 4 bytes each."""


PREPARING = "/v1/cache/prepare"
"""Path of the endpoint that prefills ahead of time."""


@dataclass(eq=False)
class Record:
    """A request that is being answered, was answered, was prefilled ahead of time, or was refused."""

    id: str
    path: str
    model: str
    created: float = field(default_factory=time.time)
    metrics: Metrics = field(default_factory=Metrics)
    status: int | None = None
    """HTTP status; ``None`` until the response has ended."""
    finish: str = "running"
    prompt: Tokens = field(default_factory=empty)
    answer: list[int] = field(default_factory=list)
    """Ids of the answer's tokens, as far as they were evaluated."""
    roles: tuple[RoleRun, ...] = ()
    evaluated: tuple[tuple[int, int], ...] = ()
    """Runs of the prompt's tokens that were evaluated, as indices [begin, end)."""
    ends: tuple[int, ...] = ()
    """Ends of the exact slices at the head of the prompt, as token indices."""
    exact: bool = True
    """Whether every span was exact, so that slices saved after these are exact too."""
    begun: float = 0.0
    """Time of the lookup, by ``time.monotonic``."""
    saved: float = float("inf")
    """Time at which the prompt was evaluated and saved, by ``time.monotonic``."""
    use_cache: bool = True
    schema: bool = False
    """Whether the prompt is a PML prompt."""
    reuse: Reuse = "schema"
    """Which slices the prompt could take, see ``Engine.plan``."""

    def as_dict(self) -> dict[str, Any]:
        """JSON object of the record. Times are in milliseconds, ``created`` in seconds since the epoch."""
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
        """Sets ``begun`` and ``saved``. Called when the first token has been generated."""
        self.saved = time.monotonic()
        self.begun = self.saved - (metrics.encode_ms + metrics.splice_ms + metrics.prefill_ms) / 1000

    @property
    def size(self) -> int:
        """Number of tokens that the record keeps."""
        return len(self.prompt) + len(self.answer)

    @property
    def rate(self) -> float:
        """Evaluated tokens per second; 0 if no time was spent."""
        seconds = (self.metrics.prefill_ms + self.metrics.encode_ms) / 1000
        return self.metrics.fresh_tokens / seconds if seconds > 0 else 0.0


class Records:
    """The last requests of a tenant. Safe to use from several threads.

    Args:
        engine: The tenant's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: deque[Record] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    # -- while a request is answered ---------------------------------------------------------------------------------
    def begin(self, record: Record) -> Record:
        """Adds a record and returns it. The oldest leave when all together have more than ``_TOKENS`` tokens."""
        with self._lock:
            self._kept.append(record)
        self._trim()
        return record

    def answered(self, record: Record, stream: Stream) -> None:
        """Completes the record of an answer that has ended, from its metrics and plan."""
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

    def prepared(self, identity: str, given: Given, prefill: Prepared, model: str) -> Record:
        """Adds the record of a prompt that was prefilled ahead of time.

        Args:
            identity: Id of the request.
            given: The prompt.
            prefill: Token counts of the prefill.
            model: Name of the model.
        """
        there = given.size - prefill.evaluated_tokens
        metrics = Metrics(prompt_tokens=given.size, exact_tokens=there, fresh_tokens=prefill.evaluated_tokens)
        record = Record(identity, PREPARING, model, metrics=metrics, finish="prepared", saved=time.monotonic())
        record.schema = not isinstance(given.prompt, Text)
        if isinstance(given.prompt, Text):
            record.prompt, record.roles = given.prompt.tokens[:-1], given.prompt.roles
        return self.begin(record)

    def list(self) -> list[Record]:
        """Returns the last ``SHOWN`` requests, the newest first."""
        with self._lock:
            return list(self._kept)[: -SHOWN - 1 : -1]

    def find(self, identity: str) -> Record:
        """Returns the listed request with an id. Raises ``Refusal`` (404)."""
        for record in self.list():
            if record.id == identity:
                return record
        raise Refusal(404, f"no request '{identity}' is known; GET /v1/requests lists the last {SHOWN}")

    def _trim(self) -> None:
        with self._lock:
            while len(self._kept) > 1 and sum(each.size for each in self._kept) > _TOKENS:
                self._kept.popleft()

    # -- explanations ------------------------------------------------------------------------------------------------
    def why(self, record: Record) -> Miss | None:
        """Explains why tokens of a prompt were evaluated that could have been reused. Takes up to a second."""
        if record.schema:
            encoded = record.metrics.encoded_tokens
            return Miss("not-encoded", 0, encoded) if encoded else None
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
        """Converts a record for ``explain``."""
        size = len(record.prompt)
        tokens = np.concatenate([record.prompt, np.array(record.answer, np.int32)])
        ends = list(record.ends)
        if record.exact:
            # ``engine.saving`` saves the rest of the prompt without its last token, then that token with the answer.
            for begin, end in ((ends[-1] if ends else 0, size - 1), (size - 1, len(tokens))):
                ends += [begin + cut for cut in self._engine.slices.cuts(tokens[begin:end], part=True)]
        return Asked(tokens, size, record.roles, tuple(ends), record.evaluated, record.use_cache)


def evaluated(plan: Plan, count: int) -> tuple[tuple[int, int], ...]:
    """Returns the runs of a prompt's tokens that were evaluated, ``count`` in all, as indices [begin, end).

    They are the spans without a slice in the plan. If fewer tokens were evaluated: the last ``count`` of these;
    if more: the last ``count`` of the prompt.
    """
    runs: list[tuple[int, int]] = []
    at = 0
    for span in plan.spans:
        if span.slice is None or span.missing:
            runs.append((at, at + len(span.tokens)))
        at += len(span.tokens)
    if sum(end - begin for begin, end in runs) < count:
        return ((at - count, at),)  # a recurrent model continues after a saved state further back
    # Fewer, because the llama.cpp context still held the first ones.
    return _last(runs, count)


def _last(runs: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """Returns the last ``count`` indices of some runs, as runs."""
    kept: list[tuple[int, int]] = []
    for begin, end in reversed(runs):
        if count <= 0:
            break
        kept.append((max(begin, end - count), end))
        count -= end - begin
    return tuple(reversed(kept))

"""Servers measured by their clients: cpucache's, with and without reuse, and any other that speaks OpenAI's dialect."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

import httpx

from cpucache.bench.text import filler
from cpucache.engine import Engine
from cpucache.errors import CpucacheError

Say = Callable[[str], None]
_QUESTION = 4  # new tokens of a request that goes on from a prefix
_ANSWER = 24  # tokens of an answer in a conversation
_LONG = 64  # tokens of an answer whose speed is measured
_PATIENCE = 1200.0


@dataclass
class Asked:
    """What a client saw of one answer."""

    ttft_ms: float
    seconds: float
    pieces: int
    text: str
    evaluated: int | None = None
    """Tokens of the prompt that were evaluated, where the server tells."""


@dataclass
class Traced:
    """A request of an agent."""

    tokens: int
    repeated: int
    """Those in blocks that an earlier request of the same agent had."""
    ttft_ms: float
    evaluated: int | None
    """Tokens that were evaluated, where the server tells."""


@dataclass
class Target:
    """A server to be measured."""

    name: str
    url: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What is sent with every request besides."""
    restart: Callable[[], str] | None = None
    """Ends the server and starts it again; gives its new address."""


@dataclass
class ServerReport:
    """What was measured of one server. Times in milliseconds."""

    name: str
    prefix: list[float] = field(default_factory=list)
    """Time to first token of a long text that is known, and a few new tokens."""
    rounds: list[list[float]] = field(default_factory=list)
    """Time to first token of each user, by round of their conversations."""
    restarted: list[float] = field(default_factory=list)
    """The same for the round after a restart, and ``warm`` without one."""
    warm: list[float] = field(default_factory=list)
    one_stream: float = 0.0
    """Tokens a second of one answer."""
    together: float = 0.0
    """Tokens a second of four answers side by side, in all."""
    permuted: dict[str, list[float]] = field(default_factory=dict)
    """Time to first token of documents in other orders: ``"marked"`` as modules, and not (``"plain"``)."""
    traces: list[Traced] = field(default_factory=list)
    """Requests of an agent."""
    failures: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {
            "name": self.name,
            "prefix": _spread(self.prefix),
            "rounds": [_spread(each) for each in self.rounds],
            "warm": _spread(self.warm),
            "restarted": _spread(self.restarted),
            "tokens_per_second": {"one": round(self.one_stream, 2), "four": round(self.together, 2)},
            **({"permuted": {name: _spread(each) for name, each in self.permuted.items()}} if self.permuted else {}),
            **({"traces": traced(self.traces)} if self.traces else {}),
            "failures": self.failures,
        }


def traced(requests: Sequence[Traced]) -> dict[str, Any]:
    """What the requests of an agent took together."""
    repeated = sum(each.repeated for each in requests)
    told = [each for each in requests if each.evaluated is not None]
    again = sum(max(0, (each.evaluated or 0) - (each.tokens - each.repeated)) for each in told)
    return {
        "requests": len(requests),
        "tokens": sum(each.tokens for each in requests),
        "repeated": repeated,
        **({"repeated_not_evaluated": round(1 - again / repeated, 4)} if told and repeated else {}),
        "ttft": _spread([each.ttft_ms for each in requests]),
    }


def _spread(values: Sequence[float]) -> dict[str, float | int] | None:
    if not values:
        return None
    p95 = quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
    return {"p50": round(median(values), 1), "p95": round(p95, 1), "runs": len(values)}


class Client:
    """Asks one server.

    Args:
        target: The server.
        report: Counts failures.
    """

    def __init__(self, target: Target, report: ServerReport) -> None:
        self._target = target
        self._report = report
        self._http = httpx.Client(timeout=_PATIENCE)

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def chat(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int, extra: Mapping[str, Any] | None = None
    ) -> Asked | None:
        """The answer to a conversation, streamed; ``None`` when the server fails. ``extra`` is sent besides."""
        body = {"messages": list(messages), "max_tokens": max_tokens, **(extra or {})}
        return self._ask("/v1/chat/completions", body, lambda choice: choice["delta"].get("content"))

    def complete(self, prompt: str | Sequence[int], max_tokens: int) -> Asked | None:
        """What follows a text, streamed."""
        body = {"prompt": prompt, "max_tokens": max_tokens}
        return self._ask("/v1/completions", body, lambda choice: choice.get("text"))

    def _ask(self, path: str, body: dict[str, Any], text_of: Callable[[Any], str | None]) -> Asked | None:
        sent = {"model": "any", "temperature": 0, "stream": True, **body, **self._target.extra}
        started = time.perf_counter()
        first = last = 0.0
        pieces: list[str] = []
        try:
            with self._http.stream("POST", self._target.url + path, json=sent) as reply:
                reply.raise_for_status()
                facts = reply.headers.get("x-cpucache", "")
                for line in reply.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choices = json.loads(line[6:]).get("choices")
                    piece = text_of(choices[0]) if choices else None
                    # An answer may be empty: then its end is what comes first.
                    if piece or (choices and choices[0].get("finish_reason")):
                        last = time.perf_counter()
                        first = first or last
                        pieces += [piece] if piece else []
        except httpx.HTTPError:
            self._report.failures += 1
            return None
        if not first:
            self._report.failures += 1
            return None
        evaluated = re.search(r"evaluated=(\d+)", facts)
        counted = int(evaluated.group(1)) if evaluated else None
        return Asked((first - started) * 1000, last - first, len(pieces), "".join(pieces), counted)


Workload: TypeAlias = tuple[str, Callable[[Engine, Client, ServerReport], None]]
"""What is measured, and what measures it."""


def measure_server(
    engine: Engine,
    target: Target,
    *,
    tokens: int,
    users: int,
    rounds: int,
    repeat: int,
    more: Sequence[Workload] = (),
    say: Say,
) -> ServerReport:
    """Measure one server.

    Args:
        engine: Makes texts of so many tokens. It is not asked anything.
        target: The server.
        tokens: Of the text that is known, of which half is what all users have in common.
        users: Who talk at the same time.
        rounds: Of each conversation.
        repeat: Requests of what is measured one by one.
        more: What is measured besides, by name.
        say: Told what is measured.
    """
    report = ServerReport(target.name)
    client = Client(target, report)
    try:
        say(f"{target.name}: {tokens} known tokens and {_QUESTION} new ones")
        # Nobody has seen this text before, not even in an earlier run.
        seed = random.SystemRandom().randrange(1 << 30)
        prefix = filler(engine, tokens, seed)
        client.complete(prefix, 1)
        for number in range(repeat):
            asked = client.complete(prefix + filler(engine, _QUESTION, seed + 1 + number), 1)
            report.prefix += [asked.ttft_ms] if asked else []
        say(f"{target.name}: one answer, and four side by side")
        _speeds(engine, client, report, seed, repeat)
        say(f"{target.name}: {users} users, {rounds} rounds")
        _conversations(engine, client, target, report, tokens // 2, users, rounds, seed)
        for name, workload in more:
            say(f"{target.name}: {name}")
            workload(engine, client, report)
    finally:
        client.close()
    return report


def _speeds(engine: Engine, client: Client, report: ServerReport, seed: int, repeat: int) -> None:
    texts = [filler(engine, 32, seed + 100 + number) for number in range(4)]
    one_stream, together = [], []
    for _ in range(max(1, repeat // 2)):
        asked = client.complete(texts[0], _LONG)
        if asked and asked.seconds:
            one_stream.append((asked.pieces - 1) / asked.seconds)
        started = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda text: client.complete(text, _LONG), texts))
        elapsed = time.perf_counter() - started
        together.append(sum(each.pieces for each in answers if each) / elapsed)
    report.one_stream = median(one_stream) if one_stream else 0.0
    report.together = median(together)


def _conversations(
    engine: Engine,
    client: Client,
    target: Target,
    report: ServerReport,
    tokens: int,
    users: int,
    rounds: int,
    seed: int,
) -> None:
    """Users talk at the same time, with a system text in common; then once more, and once more after a restart."""
    system = {"role": "system", "content": filler(engine, tokens, seed + 200)}
    told: list[list[dict[str, str]]] = [[system] for _ in range(users)]

    def say(user: int, number: int) -> float | None:
        text = filler(engine, 40, seed + 1000 * (user + 1) + number)
        told[user].append({"role": "user", "content": text})
        asked = client.chat(told[user], _ANSWER)
        told[user].append({"role": "assistant", "content": asked.text if asked else ""})
        return asked.ttft_ms if asked else None

    def together(number: int) -> list[float]:
        with ThreadPoolExecutor(users) as pool:
            found = list(pool.map(lambda user: say(user, number), range(users)))
        return [each for each in found if each is not None]

    for number in range(rounds):
        report.rounds.append(together(number))
    report.warm = together(rounds)
    if target.restart is not None:
        target.url = target.restart()
        report.restarted = together(rounds + 1)


def http_overhead(engine: Engine, target: Target, *, tokens: int, repeat: int) -> tuple[list[float], list[float]]:
    """Time to first token of one cached request, through the engine and through a server, in turn."""
    report = ServerReport(target.name)
    client = Client(target, report)
    text = filler(engine, tokens, 77)
    direct: list[float] = []
    served: list[float] = []
    try:
        for number in range(repeat + 1):
            metrics = engine.generate(text=text, max_tokens=1).metrics
            asked = client.complete(text, 1)
            # The first of each evaluates the text.
            if number and asked:
                direct.append(metrics.ttft_ms)
                served.append(asked.ttft_ms)
    finally:
        client.close()
    return direct, served


@contextmanager
def own_server(model: str, folder: Path, options: Sequence[str]) -> Iterator[Target]:
    """cpucache's server in a process of its own, with a store of its own."""
    command = [sys.executable, "-m", "cpucache.cli.main", "serve", "-m", model, "--port", "0", *options]
    process: subprocess.Popen[str] | None = None

    def stop() -> None:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    def start() -> str:
        nonlocal process
        stop()
        environment = {**os.environ, "CPUCACHE_HOME": str(folder)}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stderr
        line = process.stderr.readline()
        found = re.search(r"answers at (http://\S+)", line)
        if not found:
            raise CpucacheError(f"the server does not start: {line or process.stderr.read()}")
        return found.group(1)

    try:
        yield Target("cpucache", start(), restart=start)
    finally:
        stop()

"""Server benchmark: clients measure cpucache's server, with and without reuse, and other servers of OpenAI's API."""

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
_QUESTION = 4  # new tokens of a request after a known prefix
_ANSWER = 24  # tokens of an answer in a conversation
_LONG = 64  # tokens of an answer whose speed is measured
_PATIENCE = 1200.0


@dataclass
class Asked:
    """One answer, as a client received it. ``seconds``: from the first piece to the last."""

    ttft_ms: float
    seconds: float
    pieces: int
    text: str
    evaluated: int | None = None
    """Tokens of the prompt that were evaluated, if the server says so."""


@dataclass
class Traced:
    """A request of a coding agent. ``tokens``: length of its prompt."""

    tokens: int
    repeated: int
    """Tokens in blocks that an earlier request of the same agent contained."""
    ttft_ms: float
    evaluated: int | None
    """Tokens that were evaluated, if the server says so."""


@dataclass
class Target:
    """A server that is measured."""

    name: str
    url: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request."""
    restart: Callable[[], str] | None = None
    """Ends the server, starts it again, and returns its new address."""


@dataclass
class ServerReport:
    """Measurements of one server. Times are in milliseconds."""

    name: str
    prefix: list[float] = field(default_factory=list)
    """Times to first token of a long known text with a few new tokens after it."""
    rounds: list[list[float]] = field(default_factory=list)
    """Times to first token of all users, by round of their conversations."""
    restarted: list[float] = field(default_factory=list)
    """Times to first token of the round after a restart; ``warm``: of the round before, without a restart."""
    warm: list[float] = field(default_factory=list)
    one_stream: float = 0.0
    """Tokens a second of one answer."""
    together: float = 0.0
    """Tokens a second of four concurrent answers, in total."""
    permuted: dict[str, list[float]] = field(default_factory=dict)
    """Times to first token of documents in other orders: ``"marked"`` as modules, or not (``"plain"``)."""
    traces: list[Traced] = field(default_factory=list)
    """Requests of coding agents."""
    failures: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Returns all measurements for ``--json``."""
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
    """Returns totals over the requests of an agent, and the spread of their times to first token.

    ``repeated_not_evaluated``: share of the repeated tokens that the server did not evaluate again.
    """
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
    """HTTP client of one server.

    Args:
        target: The server.
        report: Report that counts the failures.
    """

    def __init__(self, target: Target, report: ServerReport) -> None:
        self._target = target
        self._report = report
        self._http = httpx.Client(timeout=_PATIENCE)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def chat(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int, extra: Mapping[str, Any] | None = None
    ) -> Asked | None:
        """Returns the answer to a conversation; ``None`` if the server fails. ``extra``: further fields to send."""
        body = {"messages": list(messages), "max_tokens": max_tokens, **(extra or {})}
        return self._ask("/v1/chat/completions", body, lambda choice: choice["delta"].get("content"))

    def complete(self, prompt: str | Sequence[int], max_tokens: int) -> Asked | None:
        """Returns the continuation of a text or of tokens; ``None`` if the server fails."""
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
                    # An empty answer has no piece of text: its end counts as its first token.
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
"""Name of a measurement, and the function that measures."""


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
    """Measures one server.

    Args:
        engine: Engine whose tokenizer sets the length of the texts. It evaluates nothing.
        target: The server.
        tokens: Tokens of the known text. The system text that all users share has half as many.
        users: Number of users that talk at the same time.
        rounds: Rounds of each conversation.
        repeat: Number of requests with a known prefix; speeds are measured half as often.
        more: Further measurements.
        say: Called with a description of each measurement before it begins.

    Returns:
        The measurements. Requests that failed are only counted.
    """
    report = ServerReport(target.name)
    client = Client(target, report)
    try:
        say(f"{target.name}: {tokens} known tokens and {_QUESTION} new ones")
        # A random seed, because the server may hold texts of an earlier run.
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
    """Conversations of concurrent users with a common system text: all rounds, another, and one after a restart."""
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
    """Measures one cached request through the engine and through a server, in turn.

    Args:
        engine: Engine with the same model as the server.
        target: The server.
        tokens: Tokens of the request.
        repeat: Number of requests of each kind.

    Returns:
        Times to first token in milliseconds, of the engine and of the server.
    """
    report = ServerReport(target.name)
    client = Client(target, report)
    text = filler(engine, tokens, 77)
    direct: list[float] = []
    served: list[float] = []
    try:
        for number in range(repeat + 1):
            metrics = engine.generate(text=text, max_tokens=1).metrics
            asked = client.complete(text, 1)
            # The first request of each kind evaluates the text.
            if number and asked:
                direct.append(metrics.ttft_ms)
                served.append(asked.ttft_ms)
    finally:
        client.close()
    return direct, served


@contextmanager
def own_server(model: str, folder: Path, options: Sequence[str]) -> Iterator[Target]:
    """Runs cpucache's server in a process of its own, with its store in ``folder``.

    Raises ``CpucacheError`` if the server does not start.
    """
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

"""Workloads of the server benchmark: documents in other orders, and requests of coding agents."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpucache.bench.server import Client, ServerReport, Traced
from cpucache.bench.text import filler
from cpucache.engine import Engine
from cpucache.errors import InputError
from cpucache.layout import Tokens

_DOCUMENTS, _SIZE, _ORDERS = 5, 500, 10
_MODULE = {"cache_control": {"type": "module"}}
_ANYWHERE = {"cpucache": {"reuse": "anywhere"}}


def permutations(engine: Engine, client: Client, report: ServerReport, *, size: int = _SIZE) -> None:
    """Measures five documents in ten orders, each with another question. After the first order no document is new.

    The documents are sent as content parts marked as modules, and as one message, joined by blank lines, with
    ``reuse="anywhere"``. Other servers ignore these fields. LMCache calls the workload ``long_doc_permutator``.

    Args:
        engine: Engine whose tokenizer sets the length of the texts.
        client: Client of the server.
        report: Report to which the times are added.
        size: Tokens of a document.
    """
    for kind in ("marked", "plain"):
        # A random seed, because the server may hold texts of an earlier run.
        seed = random.SystemRandom().randrange(1 << 30)
        documents = [filler(engine, size, seed + number).strip() for number in range(_DOCUMENTS)]
        choice = random.Random(seed)
        times: list[float] = []
        for number in range(_ORDERS):
            order = choice.sample(documents, _DOCUMENTS) if number else documents
            question = filler(engine, 12, seed + 100 + number).strip()
            asked = client.chat([_message(order, question, kind)], 1, _ANYWHERE if kind == "plain" else {})
            times += [asked.ttft_ms] if asked and number else []
        report.permuted[kind] = times


def _message(documents: Sequence[str], question: str, kind: str) -> dict[str, Any]:
    if kind == "plain":
        return {"role": "user", "content": "\n\n".join([*documents, question])}
    parts = [{"type": "text", "text": document, **_MODULE} for document in documents]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def replay(engine: Engine, client: Client, report: ServerReport, traces: Sequence[Path], most: int) -> None:
    """Sends the requests of coding agents one after the other, without the pauses between them.

    A trace lists the hashes of the blocks of tokens in each request. Each block becomes random tokens, the same for the
    same hash.

    Args:
        engine: Engine whose tokenizer returns the tokens.
        client: Client of the server.
        report: Report to which the requests are added.
        traces: Files of the traces, one agent each.
        most: Most tokens of a request; longer requests are skipped.

    Raises:
        InputError: A file is not a trace.
    """
    words = engine.model.tokenize(filler(engine, 200, 1))
    for trace in traces:
        seen: set[int] = set()
        for blocks in _requests(trace, most):
            tokens = np.concatenate([_block(words, trace.stem, number, size) for number, size in blocks])
            repeated = sum(size for number, size in blocks if number in seen)
            seen.update(number for number, _ in blocks)
            asked = client.complete(tokens.tolist(), 1)
            if asked:
                report.traces.append(Traced(len(tokens), repeated, asked.ttft_ms, asked.evaluated))


def _requests(trace: Path, most: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the blocks of each request of a trace, each with its hash and its number of tokens."""
    try:
        told = json.loads(trace.read_text(encoding="utf-8"))
        size, requests = int(told["block_size"]), [(int(each["in"]), each["hash_ids"]) for each in told["requests"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{trace}: not a trace of an agent's requests ({error})") from error
    for tokens, numbers in requests:
        if tokens <= most:
            sizes = [min(size, tokens - begin) for begin in range(0, tokens, size)]
            yield [(number, count) for number, count in zip(numbers, sizes, strict=False) if count > 0]


def _block(words: Tokens, name: str, number: int, size: int) -> Tokens:
    """Tokens of a block: the same for the same name of a trace and the same hash."""
    return np.random.default_rng([number, *name.encode()]).choice(words, size)

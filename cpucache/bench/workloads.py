"""Workloads of real clients for a server: documents in other orders, and the requests of coding agents."""

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
    """Five documents of 500 tokens in ten orders, each with another question: after the first, none is new.

    As content parts marked as modules, and as one message, joined by blank lines, that may be reused anywhere. Other
    servers pass over what says so. (LMCache calls the workload ``long_doc_permutator``.)
    """
    for kind in ("marked", "plain"):
        # Nobody has seen these texts before, not even in an earlier run.
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
    """The requests of coding agents, one after the other, up to ``most`` tokens each.

    A trace says which blocks of 64 tokens each request had: each becomes random tokens, the same wherever its hash
    stands. Times to think are left out.
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
    """The blocks of each request of a trace, each with its number and its size. Raises ``InputError``."""
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
    """The tokens of a block."""
    return np.random.default_rng([number, *name.encode()]).choice(words, size)

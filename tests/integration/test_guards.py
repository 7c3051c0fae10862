"""What must hold where several things happen at once, or where something odd is asked."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache import Engine
from cpucache.errors import CpucacheError, InputError
from cpucache.layout import Text
from cpucache.layout.conversation import _split
from cpucache.reuse import KVCache
from cpucache.runtime import Batch, Run, Stopped
from cpucache.server.toolcalls import ToolParser
from cpucache.sessions import Damaged
from tests.support.command import PROMPT, SCHEMA
from tests.support.held import no_collector, open_files
from tests.support.serving import serving
from tests.support.sessions import engine, message, plain_spoken
from tests.support.tiny import RECURRENT_ARCHS
from tests.support.workbench import bench, opened, slice_of, some_tokens

Tiny = Callable[..., Path]


@pytest.mark.parametrize("arch", ["llama", *RECURRENT_ARCHS])
def test_a_batch_is_stopped_only_where_nothing_of_it_stays(arch: str, tiny: Tiny) -> None:
    """A recurrent state would have gone on."""
    with opened(tiny(arch)) as context:
        batch = Batch()
        batch.add(Run(0, 0, some_tokens(100)), "last")
        if arch == "llama":
            with pytest.raises(Stopped):
                context.evaluate(batch, lambda: True)
            assert context.last_position(0) == -1
        else:
            context.evaluate(batch, lambda: True)
            found = context.logits()
            context.clear()
            context.decode([Run(0, 0, some_tokens(100))], logits="last")
            assert np.array_equal(context.logits(), found)


def test_the_scratch_sequence_is_nobody_s_while_others_are_evaluated(tiny: Tiny) -> None:
    """Answers are saved through it in between."""
    with bench(tiny("llama")) as desk:
        kv_cache = desk.kv_cache
        splicer = kv_cache.splicer
        first = slice_of(some_tokens(20))
        moved = [slice_of(some_tokens(10, seed), [first], start=100 + 20 * seed) for seed in (1, 2)]
        task = KVCache.encode(kv_cache, kv_cache.only, [first, *moved])
        work = next(task)
        steps = 0
        while True:
            steps += 1
            assert all(run.sequence != splicer.scratch for run in work.runs)
            assert kv_cache.context.last_position(splicer.scratch) == -1
            kv_cache.context.decode(work.runs, logits="last")
            try:
                work = task.send(0)
            except StopIteration:
                break
        assert steps >= 3
        for each in (first, *moved):
            state = kv_cache.store.get(each.key)
            assert state is not None
            # The number of cells follows the kind of the state, its sequence, and the number of streams.
            assert state[12:16].view("<u4")[0] == len(each.tokens)


def test_what_is_saved_after_a_foreign_slice_is_not_exact(tiny: Tiny, tmp_path: Path) -> None:
    texts = [message(number, 30) + "\n\n" for number in range(4)]
    with engine(tiny("llama"), tmp_path, segment_tokens=(16, 64), reuse="anywhere") as running:
        running.generate(text="".join(texts), max_tokens=1)
        other = "".join([message(50, 30) + "\n\n", *texts, message(60, 30)])
        running.generate(text=other, max_tokens=1)
        stream = running.stream(text=other, max_tokens=1)
        metrics = stream.reply().metrics
        spans = stream.plan.spans
        exact = sum(
            len(span.tokens) for span in spans[: next(i for i, span in enumerate(spans) if span.relation != "exact")]
        )
        assert 0 < metrics.exact_tokens <= exact
        told = metrics.exact_tokens + metrics.clean_tokens + metrics.foreign_tokens + metrics.fresh_tokens
        assert told == metrics.prompt_tokens


@pytest.mark.parametrize("bad", [Text(np.empty(0, np.int32)), Text(np.array([1 << 20])), Text(np.array([-1]))])
def test_a_text_is_checked_like_tokens(bad: Text, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running, pytest.raises(InputError, match="tokens"):
        running.generate(bad)


def test_a_locked_account_of_what_was_asked_stops_no_answer(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, reuse="anywhere") as running:
        texts = [message(number, 60) + "\n\n" for number in range(2)]
        running.generate(text="".join(texts) + "Which?", max_tokens=1)
        database = sqlite3.connect(tmp_path / "slices" / "asked.sqlite", isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        reply = running.generate(text="".join(texts[::-1]) + "Which?", max_tokens=2)
        assert reply.metrics.foreign_tokens > 0
        assert time.monotonic() - started < 10
        database.close()


def test_modules_are_found_in_long_texts() -> None:
    long, short = "abcd" * 50, "bcda" * 40
    text = f"x{long}y{short}{long}z"
    parts = _split(text, [long, short])
    assert "".join(part for part, _ in parts) == text
    assert [part for part, module in parts if module] == [long, short, long]
    started = time.monotonic()
    assert len(_split("a" * 1_000_000, ["a" * 19_999 + "b"])) == 1
    assert time.monotonic() - started < 10


def test_a_fenced_call_with_much_white_space() -> None:
    parser = ToolParser(["f"])
    started = time.monotonic()
    parser.feed('```json\n{"name": "f", "arguments": {}}' + " " * 200_000)
    parser.feed("\n```")
    assert parser.finish() == ""
    assert [call.name for call in parser.calls] == ["f"]
    assert time.monotonic() - started < 10


def test_odd_requests_are_answered_with_what_is_wrong(tiny: Tiny, tmp_path: Path) -> None:
    with serving(plain_spoken(tiny("llama")), tmp_path) as served:
        many = served.http.post("/v1/completions", json={"prompt": [[1]] * 1000, "max_tokens": 1})
        assert (many.status_code, "at most 16 prompts" in many.text) == (400, True)
        # Half of a character.
        half = b'{"prompt": "a", "max_tokens": 1, "grammar": "root ::= \\"\\ud800\\""}'
        sent = served.http.post("/v1/completions", content=half, headers={"content-type": "application/json"})
        assert sent.status_code < 500
        body = b'{"input": "a", "instructions": "\\ud800", "max_output_tokens": 1, "stream": true}'
        told = served.http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
        assert (told.status_code < 500 and "response.completed" in told.text) or "response.incomplete" in told.text


@pytest.mark.parametrize("tokens", [[[1, 2, 3]], [[(1 << 31) - 1]], [[]], [[0] * 5000]])
def test_tokens_that_are_none_of_the_model(tokens: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path) as running:
        with running.session("talk") as talk:
            talk.send("Hello", max_tokens=2)
        with contextlib.closing(sqlite3.connect(tmp_path / "sessions" / "sessions.sqlite")) as database:
            pieces = json.dumps({"parts": tokens, "pending": []})
            database.execute("UPDATE entries SET pieces = ? WHERE id = 1", (pieces,))
            database.commit()
        with contextlib.suppress(Damaged, CpucacheError), running.session("talk") as talk:
            talk.send("Again", max_tokens=2)
        # Whatever came of it, the engine goes on.
        with running.session("other") as other:
            assert other.send("Hello", max_tokens=2).metrics.completion_tokens


@pytest.mark.parametrize("kept", [True, False])
def test_a_closed_engine_holds_no_file(kept: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """At once, also when somebody still has the engine."""
    (tmp_path / "schema.xml").write_text(SCHEMA)
    engines = []
    with no_collector():
        for _ in range(3):
            with Engine(tiny("llama"), store=tmp_path / "store", n_ctx=512, threads=1) as engine:
                engine.add_schema(tmp_path / "schema.xml")
                engine.generate(PROMPT, max_tokens=2)
                engine.prefetch(PROMPT).result()
                assert engine.store.ram.used > 0
            if kept:
                engines.append(engine)
            assert open_files(tmp_path) == []

"""The engine as it comes: what its settings reach, what it refuses, and what it closes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpucache import ContextFull, Engine, Fidelity, InputError
from cpucache.pml import parse_schema
from cpucache.runtime import Context, Model
from cpucache.store import Fingerprints, Store
from tests.support.command import PROMPT, SCHEMA
from tests.support.sessions import engine, message, said, truth
from tests.support.workbench import distance, tolerance

Tiny = Callable[..., Path]

# Modules whose contexts are other modules than precede them here.
PICKED = '<prompt schema="shop"><winter/><hours opens="ten"/><user>What is there to eat?</user></prompt>'


# ---- fidelity --------------------------------------------------------------------------------------------------------
def test_an_engine_of_exact_slices_begins_conversations_exactly(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with engine(model, tmp_path, fidelity="high") as running, truth(model) as true:
        running.add_schema(parse_schema(SCHEMA))
        running.encode("shop")
        with running.session("s", prompt=PICKED) as session:
            answer = said(running, session.stream(max_tokens=4))
            assert answer.stream.plan.exact
            true.check("llama", answer)
            true.check("llama", said(running, session.stream(message(1), max_tokens=4)))
    # It would show: at the default level the beginning is not exact.
    with engine(model, tmp_path / "other") as running, truth(model) as true:
        running.add_schema(parse_schema(SCHEMA))
        running.encode("shop")
        with running.session("s", prompt=PICKED) as session:
            answer = said(running, session.stream(max_tokens=1))
            assert not answer.stream.plan.exact
            assert distance(answer.rows[0], true.rows(answer.tokens, 1)[0]) > 10 * tolerance("llama", "f32")


@pytest.mark.parametrize("how", [{}, {"fidelity": "fast"}, {"fidelity": "high"}, {"fidelity": Fidelity(1.0)}], ids=str)
@pytest.mark.parametrize("usual", ["balanced", "high"])
def test_what_is_prefetched_is_what_is_spliced(how: dict[str, Any], usual: Any, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, fidelity=usual) as running:
        running.add_schema(parse_schema(SCHEMA))
        running.encode("shop")
        running.encode_for(PICKED, fidelity="high")
    with engine(tiny("llama"), tmp_path, fidelity=usual) as running:
        running.add_schema(parse_schema(SCHEMA))
        running.prefetch(PICKED, **how).result()
        stream = running.stream(PICKED, max_tokens=1, **how)
        keys = set(running.kv_cache.keys(stream.planned()))
        there = {key for key in keys if key in running.store.ram}
        assert there == keys
        assert len(running.store.ram) == len(keys)
        assert stream.reply().metrics.encoded_tokens == 0


def test_settings_that_contradict_one_another_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(parse_schema(SCHEMA))
        calls: list[Callable[..., Any]] = [
            *(running.plan, running.stream, running.generate, running.prefetch, running.encode_for, running.fidelity),
            lambda prompt, **how: running.session("s", prompt=prompt, **how),
        ]
        for call in calls:
            with pytest.raises(InputError, match="fidelity='best'"):
                call(PROMPT, fidelity="best")
        with pytest.raises(InputError, match="not both"):
            Fidelity.of("fast", 0.1)
        with pytest.raises(InputError, match="recompute=2"):
            Fidelity(recompute=2)
        with pytest.raises(InputError, match="exact slices only"):
            Fidelity(recompute=0.1, exact=True)


# ---- positions -------------------------------------------------------------------------------------------------------
def test_a_prompt_past_the_trained_positions_is_refused_with_the_numbers(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", n_ctx=128)
    with engine(model, tmp_path, n_ctx=1024) as running:
        for request in ({"text": "a" * 128}, {"prompt": [{"role": "user", "content": "a" * 128}]}):
            with pytest.raises(ContextFull, match=r"the prompt is 1\d\d tokens long .* the 128 positions"):
                running.stream(**request)
        running.add_schema(parse_schema(SCHEMA))
        with pytest.raises(ContextFull, match=r"is 2\d\d tokens long .* 128 positions .*largest parts: new text"):
            running.generate(PROMPT.replace("eat", "e" * 128))
        assert running.generate(text="a" * 100, max_tokens=400).metrics.completion_tokens <= 28


def test_modules_left_out_do_not_push_a_prompt_past_the_trained_positions(tiny: Tiny, tmp_path: Path) -> None:
    """It is laid out packed instead."""
    modules = "".join(f"<module name='m{index}'>{chr(65 + index) * 30}</module>" for index in range(4))
    model = tiny("llama", n_ctx=128)
    with engine(model, tmp_path, n_ctx=256, fidelity="fast") as running, truth(model, n_ctx=256) as true:
        layout = running.add_schema(parse_schema(f"<schema name='s'>{modules}</schema>"))
        assert layout.positions == "reserved"
        short, long = (f"<prompt schema='s'><m3/>{'x' * count}</prompt>" for count in (4, 20))
        assert running.plan(short).end > running.plan(short).n_tokens
        plan = running.plan(long)
        assert plan.end == plan.n_tokens < 128
        assert running.generate(long, max_tokens=2).text
        true.check("llama", said(running, running.stream(long, max_tokens=3)))


def test_a_conversation_keeps_to_the_trained_positions(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama", n_ctx=256), tmp_path, n_ctx=1024) as running, running.session("s") as session:
        for number in range(12):
            stream = session.stream(message(number), max_tokens=5)
            stream.reply()
            assert stream.plan.end + stream.evaluated <= 256
        assert session.left_out > 0
        with pytest.raises(ContextFull, match=r"3\d\d tokens does not fit .* 256"):
            session.send("a" * 300)


# ---- open and close --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"segment_tokens": (0, 8)}, "segments of 0 to 8 tokens"),
        ({"threads": 0}, "threads=0"),
        ({"ram_budget": "much"}, "'much' is not a size"),
        ({"disk_budget": "-1"}, "-1"),
        ({"positions": "free"}, "positions='free'"),
        ({"refine": "always"}, "refine='always'"),
        ({"fidelity": "best"}, "fidelity='best'"),
        ({"kv_type": "f8"}, "f8"),
        ({"flash": "maybe"}, "maybe"),
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(settings: dict[str, Any], what: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=what):
        Engine(tiny("llama"), store=tmp_path, **{"n_ctx": 256, "threads": 1, **settings})


def test_what_was_opened_is_closed_when_a_later_step_fails(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[type] = []
    for kind in (Model, Context, Store):

        def close(self: Any, kind: Any = kind, done: Any = kind.close) -> None:
            closed.append(kind)
            done(self)

        monkeypatch.setattr(kind, "close", close)

    def unreadable(self: Fingerprints, path: Path) -> str:
        raise OSError("the disk is gone")

    threads = threading.active_count()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(Fingerprints, "of", unreadable)
        Engine(tiny("llama"), store=tmp_path, n_ctx=256, threads=1)
    assert closed == [Store, Context, Model]
    assert threading.active_count() == threads
    with Engine(tiny("llama"), store=tmp_path, n_ctx=256, threads=1) as running:
        assert running.generate(text="a", max_tokens=2).metrics.fresh_tokens == 1


def test_a_store_that_can_t_be_opened_is_done_without(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with Engine(tiny("llama"), store=tmp_path / "file" / "store", n_ctx=256, threads=1) as running:
        assert not running.store.writable
        running.add_schema(parse_schema(SCHEMA))
        first, second = (running.generate(PROMPT, max_tokens=2).metrics for _ in range(2))
        assert first.encoded_tokens > second.encoded_tokens == 0

"""``-v``, ``--debug``, ``CPUCACHE_DEBUG`` and ``--profile``, as a person runs them; and the log of an engine."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cpucache import Engine
from cpucache.pml import parse_schema
from cpucache.stages import STAGES, profiled
from tests.support.command import PROMPT, SCHEMA, Outcome, cpucache, invoke
from tests.support.sessions import message

Tiny = Callable[..., Path]
LINE = re.compile(r" *\d+\.\d{3} (cpucache\.\w+): ")


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Callable[..., Outcome]:
    (tmp_path / "schema.xml").write_text(SCHEMA)
    (tmp_path / "prompt.xml").write_text(PROMPT)
    fixed = ("-s", "schema.xml", "-m", tiny("llama"), "-n", "2", "--threads", "1")
    private = tmp_path / "store"
    private.mkdir(mode=0o700)

    def call(*before: str, command: str = "run", after: tuple[str, ...] = (), **environment: str) -> Outcome:
        arguments: list[str | Path] = [*before, command, "prompt.xml", *fixed, *after]
        return cpucache(*arguments, cwd=tmp_path, CPUCACHE_HOME=str(private), **environment)

    return call


def rooms(outcome: Outcome) -> set[str]:
    return {found[1] for line in outcome.err.splitlines() if (found := LINE.match(line))}


# ---- the command line ------------------------------------------------------------------------------------------------
def test_nobody_is_told_what_they_did_not_ask_for(run: Callable[..., Outcome]) -> None:
    outcome = run(CPUCACHE_DEBUG="0")
    assert outcome.status == 0
    assert not rooms(outcome)
    assert len(outcome.err.splitlines()) == 1  # the figures


@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_verbose_tells_what_is_done_and_why(where: str, run: Callable[..., Outcome]) -> None:
    before = ("-v",) if where != "after" else ()
    after = ("--verbose",) if where != "before" else ()
    first, again = run(*before, after=after), run(*before, after=after)
    assert (first.status, again.status) == (0, 0)
    assert rooms(first) == {"cpucache.engine", "cpucache.reuse"}
    assert re.search(r"encoding missing slices: \d+, of \d+ tokens: .*hours.*summer", first.err)
    assert "encoding missing" not in again.err
    assert re.search(r"shop: \d+ of \d+ tokens from the cache, first token after", again.err)
    assert "no slice yet" not in first.err, "that is for --debug"


@pytest.mark.parametrize("how", ["before", "after", "environment"])
def test_debug_tells_of_each_part(how: str, run: Callable[..., Outcome]) -> None:
    outcome = run(
        *(("--debug",) if how == "before" else ()),
        after=("--debug",) if how == "after" else (),
        **({"CPUCACHE_DEBUG": "1"} if how == "environment" else {}),
    )
    assert outcome.status == 0
    assert re.search(
        r"\d+\.\.\d+ hours exact slice \w{8}: no slice yet|hours \w+ slice \w{8}: no slice yet", outcome.err
    )
    assert "summer" in outcome.err
    assert re.search(r"evaluated: new text", outcome.err)


@pytest.mark.parametrize(("flag", "traced"), [("", False), ("-v", False), ("--debug", True)])
def test_tracebacks_are_for_those_who_debug(flag: str, traced: bool, run: Callable[..., Outcome]) -> None:
    outcome = run(after=("--recompute", "0.1", "--fidelity", "fast", *filter(None, [flag])))
    assert outcome.status == 2
    assert ("Traceback (most recent call last)" in outcome.err) is traced
    assert outcome.err.splitlines()[-1].startswith("cpucache: give a fidelity")


def test_every_command_takes_them() -> None:
    for command in (["run"], ["schema", "check"], ["cache", "ls"], ["models", "list"], ["bench", "ttft"], ["serve"]):
        shown = invoke(*command, "--help")
        assert shown.count("--debug") == 1
        assert shown.count("-v, --verbose") == 1


# ---- where the time goes ---------------------------------------------------------------------------------------------
def test_a_profile_adds_up(run: Callable[..., Outcome]) -> None:
    run()
    told = json.loads(run(after=("--profile", "--json")).out)
    first, whole = told["profile"]["first_token"], told["profile"]["whole"]
    assert list(first) == list(whole) == [*STAGES, "rest"]
    for name in ("parse", "plan", "look up", "load", "decode", "sample"):
        assert first[name] > 0, name
    assert whole["decode"] > first["decode"]
    # What is parsed is read before the call whose time is measured.
    assert sum(first.values()) - first["parse"] == pytest.approx(told["ttft_ms"], abs=0.1)
    assert sum(whole.values()) - whole["parse"] == pytest.approx(told["total_ms"], abs=0.1)
    assert "profile" not in json.loads(run(after=("--json",)).out)


def test_a_profile_is_shown_beside_the_answer(run: Callable[..., Outcome]) -> None:
    plain, outcome = run(), run(after=("--profile",))
    assert outcome.out == plain.out
    for name in (*STAGES, "rest", "together"):
        assert re.search(rf"^ *{name} +[\d,.]+ ms +[\d,.]+ ms", outcome.err, re.MULTILINE), name
    refused = run(after=("--profile", "--compare"))
    assert (refused.status, len(refused.err.splitlines())) == (2, 1)


def test_benchmarks_are_split_too(tiny: Tiny) -> None:
    small = ("--tokens", "64", "--modules", "2", "--repeat", "1", "--full-repeat", "0", "--threads", "1")
    shown = invoke("bench", "ttft", "-m", tiny("llama"), *small, "--profile", "--json")
    found = json.loads(shown)
    assert set(found["profile"]) == {"ram", "disk", "other", "other_again", "balanced", "refined"}
    for name, stages in found["profile"].items():
        assert list(stages) == [*STAGES, "rest"]
        assert stages["load"] > 0 and stages["decode"] > 0, name
        assert sum(stages.values()) == pytest.approx(found[name]["median_ms"], abs=0.1)


def test_requests_beside_one_another_are_profiled_separately(tiny: Tiny, tmp_path: Path) -> None:
    with Engine(tiny("llama"), store=tmp_path, parallel=2, n_ctx=1024) as engine:
        engine.generate("warm", max_tokens=1)
        with profiled() as one:
            first = engine.stream(message(1, 60), max_tokens=20)
        second = engine.stream(message(2, 60), max_tokens=20)
        first.begin()
        second.begin()
        first.reply()
        second.reply()
    assert one.ms["decode"] > 0 and one.ms["sample"] > 0
    assert sum(one.ms.values()) <= first.metrics.total_ms + 1


# ---- the log of an engine --------------------------------------------------------------------------------------------
def test_what_leaves_memory_and_disk_is_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cpucache")
    with Engine(tiny("llama"), store=tmp_path, ram_budget="600KiB", disk_budget="1MiB", n_ctx=1024) as engine:
        for number in range(6):
            engine.generate(text=message(number, 60), max_tokens=1)
            engine.store.flush()
    told = [(record.name, record.getMessage()) for record in caplog.records]
    assert any(name == "cpucache.store" and "the least recently used, from memory for" in text for name, text in told)
    assert any(name == "cpucache.store" and "from disk for" in text for name, text in told)


def test_what_is_waited_for_is_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cpucache")
    with Engine(tiny("llama"), store=tmp_path, parallel=2, n_ctx=512) as engine:
        streams = [engine.stream(text=message(number, 20), max_tokens=200) for number in range(3)]
        for stream in streams:
            stream.begin()
        for stream in streams:
            stream.reply()
    told = [record.getMessage() for record in caplog.records if record.name == "cpucache.engine"]
    assert any(re.search(r"waits; running or waiting before it: \d", text) for text in told)
    assert sum("waits for cells" in text for text in told) in (1, 2), "each request says so once"
    assert sum("first token after" in text for text in told) == 3


def test_a_slice_that_is_refused_is_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cpucache")
    with Engine(tiny("llama"), store=tmp_path, n_ctx=512) as engine:
        engine.add_schema(parse_schema("<schema name='s'><module name='a'>Some text of a module.</module></schema>"))
        prompt = "<prompt schema='s'><a/><user>Why?</user></prompt>"
        wanted = engine.generate(prompt, max_tokens=3).text
        (key,) = engine.kv_cache.keys(engine.plan(prompt))
        state = engine.store.get(key)
        assert state is not None
        engine.store.ram.put(key, state[: len(state) // 2].copy())
        engine.forget()
        assert engine.generate(prompt, max_tokens=3).text == wanted
    told = [record.getMessage() for record in caplog.records if record.name == "cpucache.reuse"]
    assert "a slice of 'a' can't be loaded; encoding it again" in told


def test_what_nobody_follows_is_not_written(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "cpucache")
    with Engine(tiny("llama"), store=tmp_path, n_ctx=512) as engine:
        engine.generate("Hello", max_tokens=2)
    assert not caplog.records

"""``cache_control`` in Anthropic's requests: what stands up to a mark is a segment's end, and is kept for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.server.keeping import Keeper
from cpucache.store import SliceInfo, Store
from tests.support.serving import Served, serving, until
from tests.support.sessions import message, plain_spoken

Tiny = Callable[..., Path]

SYSTEM, NOTES = message(1, 60), message(2, 40)
MARK = {"cache_control": {"type": "ephemeral"}}
HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SETTINGS: dict[str, Any] = {"model": "any", "max_tokens": 4, "extra_body": {"temperature": 0}}


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    with serving(plain_spoken(tiny("llama")), tmp_path, segment_tokens=(64, 512)) as running:
        yield running


def blocks(*texts: str, mark: dict[str, Any] = MARK, marked: int = 0) -> list[Any]:
    return [{"type": "text", "text": text, **(mark if index == marked else {})} for index, text in enumerate(texts)]


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def size(served: Served, text: str) -> int:
    return len(served.engine.model.tokenize(text))


def test_what_stands_before_a_mark_is_found_whatever_follows(served: Served) -> None:
    """Also in the middle of what would else be one segment."""

    def read(text: str, mark: dict[str, Any]) -> bool:
        """Whether a text is found again before another."""
        for number in (3, 4):
            content = blocks(text, message(number, 40), mark=mark)
            answer = served.anthropic.messages.create(messages=[{"role": "user", "content": content}], **SETTINGS)
            served.engine.forget()
        return (answer.usage.cache_read_input_tokens or 0) >= size(served, text)

    assert read(message(1, 9), MARK)
    # Without a mark the end of a block is nothing special.
    assert not read(message(5, 9), {})


def test_marks_inside_a_system_text(served: Served) -> None:
    short = message(6, 9)
    for number in (3, 4):
        answer = served.anthropic.messages.create(
            system=blocks(short, message(number, 9)), messages=asked("Hi"), **SETTINGS
        )
        served.engine.forget()
    assert (answer.usage.cache_read_input_tokens or 0) >= size(served, short)


def test_what_is_marked_does_not_change_a_prompt(served: Served) -> None:
    plain = served.anthropic.messages.create(system=f"{SYSTEM}\n\n{NOTES}", messages=asked(NOTES), **SETTINGS)
    marked = served.anthropic.messages.create(
        system=blocks(SYSTEM, NOTES, mark=HOUR, marked=1),
        messages=[{"role": "user", "content": blocks(NOTES)}],
        **SETTINGS,
    )
    assert marked.content == plain.content
    used = marked.usage
    assert used.cache_creation_input_tokens == 0 and used.cache_creation is not None
    total = (plain.usage.input_tokens, plain.usage.cache_creation_input_tokens, plain.usage.cache_read_input_tokens)
    assert used.input_tokens + (used.cache_read_input_tokens or 0) == sum(each or 0 for each in total)


def test_usage_tells_how_long_it_is_kept(served: Served) -> None:
    system = blocks(SYSTEM, mark=HOUR)
    user = [{"role": "user", "content": blocks(NOTES, "Which?")}]
    for streams in (False, True):
        settings = {**SETTINGS, "system": system, "messages": user}
        if streams:
            served.engine.forget()
            with served.anthropic.messages.stream(**settings) as stream:
                used = stream.get_final_message().usage
        else:
            used = served.anthropic.messages.create(**settings).usage
        created = used.cache_creation
        assert created is not None
        assert used.cache_creation_input_tokens == created.ephemeral_1h_input_tokens + created.ephemeral_5m_input_tokens
        if streams:
            assert created.ephemeral_1h_input_tokens == created.ephemeral_5m_input_tokens == 0
            assert (used.cache_read_input_tokens or 0) >= size(served, SYSTEM) + size(served, NOTES)
        else:
            assert created.ephemeral_1h_input_tokens >= size(served, SYSTEM)
            assert created.ephemeral_5m_input_tokens >= size(served, NOTES) - 2


def held(served: Served) -> int:
    """Tokens of the slices that are kept, as the store has them."""
    return len(served.service.keeper)


def saved(served: Served) -> set[str]:
    """Keys of the slices on disk, without those that are shorter than the system texts."""
    served.engine.store.flush()
    assert served.engine.store.index is not None
    return {row.key for row in served.engine.store.index.rows() if row.info.tokens >= 100}


def test_a_marked_prompt_is_not_evicted(tiny: Tiny, tmp_path: Path) -> None:
    with serving(plain_spoken(tiny("llama")), tmp_path, ram_budget="6MiB", disk_budget="6MiB") as served:
        marked = {"system": blocks(SYSTEM, mark=HOUR), "messages": asked("Hi"), **SETTINGS}
        plain = {"system": message(9, 60), "messages": asked("Hi"), **SETTINGS}
        for settings in (marked, plain):
            served.anthropic.messages.create(**settings)
        until(lambda: held(served) > 0)
        plain_slices = saved(served) - set(served.service.keeper._until)
        assert plain_slices
        # Much more than there is room for. When a slice is evicted depends on how long its evaluation took.
        for number in range(10, 100):
            served.anthropic.messages.create(system=message(number, 120), messages=asked("Hi"), **SETTINGS)
            if number > 16 and not saved(served) & plain_slices:
                break
        served.engine.forget()
        gone = served.anthropic.messages.create(**plain).usage
        assert (gone.cache_read_input_tokens or 0) < 20
        kept = served.anthropic.messages.create(**marked).usage
        assert (kept.cache_read_input_tokens or 0) >= size(served, SYSTEM)
        served.service.close()
        assert held(served) == 0
        until(lambda: not served.engine.store._using)


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ({"type": "ephemeral", "ttl": "2h"}, '"5m" or "1h"'),
        ({"type": "eternal"}, '"5m" or "1h"'),
        ({}, '"5m" or "1h"'),
    ],
)
def test_other_marks_are_refused(control: dict[str, Any], reason: str, served: Served) -> None:
    for body in (
        {"system": blocks("x", mark={"cache_control": control})},
        {"messages": [{"role": "user", "content": blocks("x", mark={"cache_control": control})}]},
        {"tools": [{"name": "f", "input_schema": {}, "cache_control": control}]},
    ):
        reply = served.http.post("/v1/messages", json={"messages": asked("x"), "max_tokens": 2, **body})
        assert reply.status_code == 400
        assert reason in reply.json()["error"]["message"]


def test_there_are_four_at_most(served: Served) -> None:
    texts = [{"type": "text", "text": f"part {number}", **MARK} for number in range(5)]
    tools = [{"name": f"f{number}", "input_schema": {}, **MARK} for number in range(5)]
    for in_system, in_tools in ((4, 0), (5, 0), (3, 1), (4, 1), (2, 2), (3, 2), (0, 4), (0, 5)):
        body = {"messages": asked("x"), "max_tokens": 2, "system": texts[:in_system], "tools": tools[:in_tools]}
        reply = served.http.post("/v1/messages", json=body)
        if in_system + in_tools == 4:
            assert reply.status_code == 200, reply.text
        else:
            assert reply.status_code == 400
            assert "at most 4 marks, not 5" in reply.json()["error"]["message"]


# ---- keeping ---------------------------------------------------------------------------------------------------------
def put(store: Store, name: str, count: int = 1000) -> str:
    info = SliceInfo("model", "model", "", "", 1, 0, "format", "", 1.0, name, "", 0)
    store.put(name, np.zeros(count, np.uint8), np.zeros(1, np.int32), info)
    return name


def test_slices_are_let_go_when_their_time_is_over() -> None:
    with Store(None, ram_budget=10_000) as store:
        first, second = put(store, "a" * 32), put(store, "b" * 32)

        async def keeping() -> None:
            keeper = Keeper(store)
            keeper.keep([first], 0.1)
            keeper.keep([first, second], 0.3)
            keeper.keep([second], 0.1)
            begun = time.monotonic()
            assert set(store._using) == {first, second}
            await asyncio.sleep(0.2)
            # The longer time counts.
            assert len(keeper) == 2 or time.monotonic() - begun > 0.3
            while len(keeper):
                await asyncio.sleep(0.01)
            assert time.monotonic() - begun >= 0.29
            assert not store._using
            assert keeper.bytes == 0

        asyncio.run(keeping())


def test_at_most_half_of_the_room_is_kept() -> None:
    with Store(None, ram_budget=10_000) as store:
        keys = [put(store, f"{number:032}") for number in range(8)]

        async def keeping() -> None:
            keeper = Keeper(store)
            keeper.keep([*keys, "f" * 32], 60)
            assert len(keeper) == 5 and keeper.bytes == 5000
            # What found no room then finds it when others go.
            keeper.close()
            assert not store._using
            keeper.keep(keys[5:], 60)
            assert len(keeper) == 3
            keeper.close()

        asyncio.run(keeping())

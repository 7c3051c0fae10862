"""Modules over HTTP: content parts that a client marks, and tools, are reused wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpucache.reuse import Reuse
from tests.support.serving import Served, serving
from tests.support.sessions import message, plain_spoken

Tiny = Callable[..., Path]

DOCUMENTS = [message(number, 30) for number in range(4)]
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 4}
MODULE = {"cache_control": {"type": "module"}}


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    with serving(plain_spoken(tiny("llama")), tmp_path, segment_tokens=(16, 64)) as running:
        yield running


def facts(served: Served, path: str, body: dict[str, Any]) -> dict[str, int]:
    """Token counts of an answer by relation."""
    reply = served.http.post(path, json={**GREEDY, **body})
    assert reply.status_code == 200, reply.text
    told = dict(each.split("=") for each in reply.headers["x-cpucache"].split(", "))
    return {name: int(told[name]) for name in ("exact", "clean", "related", "foreign", "evaluated")}


def chat(order: list[int], *, marked: bool) -> dict[str, Any]:
    parts = [{"type": "text", "text": DOCUMENTS[number], **(MODULE if marked else {})} for number in order]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "Which of them?"}]}]}


def messages(order: list[int], *, marked: bool) -> dict[str, Any]:
    content = chat(order, marked=marked)["messages"][0]["content"]
    return {"system": content[:2], "messages": [{"role": "user", "content": content[2:]}]}


def responses(order: list[int], *, marked: bool) -> dict[str, Any]:
    content = chat(order, marked=marked)["messages"][0]["content"]
    parts = [{**part, "type": "input_text"} for part in content]
    return {"input": [{"role": "user", "content": parts}], "max_output_tokens": 4}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", chat), ("/v1/messages", messages), ("/v1/responses", responses)],
    ids=["chat", "messages", "responses"],
)
def test_marked_parts_are_reused_in_another_order(path: str, body: Callable[..., Any], served: Served) -> None:
    first = facts(served, path, body([0, 1, 2, 3], marked=True))
    assert first["foreign"] == first["clean"] == 0
    sizes = [len(served.engine.model.tokenize(document)) for document in DOCUMENTS]
    other = facts(served, path, body([2, 0, 3, 1], marked=True))
    assert other["foreign"] + other["clean"] == sum(sizes)
    assert other["evaluated"] < min(sizes)
    # Without marks, no slice is reused whose context is other text.
    plain = facts(served, path, body([3, 1, 2, 0], marked=False))
    assert plain["foreign"] == plain["clean"] == 0
    assert plain["evaluated"] > sum(sizes) - max(sizes)


def test_only_what_is_marked_is_taken_from_elsewhere(served: Served) -> None:
    def body(first: str, second: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": first}, {"type": "text", "text": second, **MODULE}]
        return {"messages": [{"role": "user", "content": parts}]}

    facts(served, "/v1/chat/completions", body(DOCUMENTS[0], DOCUMENTS[1]))
    swapped = facts(served, "/v1/chat/completions", body(DOCUMENTS[2], DOCUMENTS[1]))
    size = len(served.engine.model.tokenize(DOCUMENTS[1]))
    assert swapped["foreign"] == size
    # The document that was marked is now one that is not.
    assert facts(served, "/v1/chat/completions", body(DOCUMENTS[1], DOCUMENTS[3]))["foreign"] == 0


def test_a_tool_is_found_after_another_system_text(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": DOCUMENTS[0], "parameters": {}}}

    def body(system: str) -> dict[str, Any]:
        conversation = [{"role": "system", "content": system}, {"role": "user", "content": "Look."}]
        return {"messages": conversation, "tools": [tool]}

    template = served.engine.model.chat_template or ""
    first = facts(served, "/v1/chat/completions", body("It is ten o'clock."))
    other = facts(served, "/v1/chat/completions", body("It is half past eleven."))
    assert first["foreign"] == 0
    # A template that knows no tools has them told in words.
    known = "tools" in template
    assert (other["foreign"] >= len(served.engine.model.tokenize(DOCUMENTS[0]))) == known


def test_what_the_server_may_reuse(served: Served) -> None:
    facts(served, "/v1/chat/completions", chat([0, 1, 2, 3], marked=True))
    reuse: Reuse
    for reuse, marked, taken in (("exact", True, False), ("anywhere", False, True)):
        served.service.settings = replace(served.service.settings, reuse=reuse)
        found = facts(served, "/v1/chat/completions", chat([2, 3, 1, 0] if marked else [1, 0, 3, 2], marked=marked))
        assert (found["foreign"] + found["clean"] > 0) == taken


def test_modules_are_counted_as_they_are_answered(served: Served) -> None:
    """A module is tokenized by itself: a blank before it is no part of its first token."""
    text = {"type": "text", "text": f" the first. {DOCUMENTS[0]}"}
    head = {"type": "text", "text": "Read this:"}
    body: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": [head, {**text, **MODULE}]}]}
    counted = served.anthropic.messages.count_tokens(**body).input_tokens
    used = served.anthropic.messages.create(max_tokens=1, **body).usage
    assert counted == used.input_tokens + used.cache_creation_input_tokens + used.cache_read_input_tokens
    body["messages"] = [{"role": "user", "content": [head, text]}]
    assert served.anthropic.messages.count_tokens(**body).input_tokens < counted

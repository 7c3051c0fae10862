"""The last requests on record: what each was answered from, whose they are, and why one was no hit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cpucache.server.logs import JsonFormatter
from cpucache.server.records import SHOWN
from cpucache.server.settings import ServerSettings
from tests.support.command import cpucache
from tests.support.serving import Served, serving, until
from tests.support.sessions import message, plain_spoken

Tiny = Callable[..., Path]

SYSTEM = message(1, 60)
CHAT: dict[str, Any] = {
    "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message(2, 20)}],
    "temperature": 0,
    "max_tokens": 4,
}
MESSAGES: dict[str, Any] = {
    "system": SYSTEM,
    "messages": [{"role": "user", "content": message(3, 20)}],
    "temperature": 0,
    "max_tokens": 4,
}
RESPONSES: dict[str, Any] = {
    "instructions": SYSTEM,
    "input": message(4, 20),
    "temperature": 0,
    "max_output_tokens": 4,
}
PROMPT: dict[str, Any] = {"prompt": message(5, 60), "temperature": 0, "max_tokens": 4}
DIALECTS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": PROMPT,
    "/v1/messages": MESSAGES,
    "/v1/responses": RESPONSES,
}
FIELDS = {
    *("id", "created", "path", "model", "status", "finish", "prompt_tokens", "exact", "clean", "related", "foreign"),
    *("evaluated", "recomputed", "completion_tokens", "ttft_ms", "total_ms"),
}
KINDS = ("exact", "clean", "related", "foreign", "evaluated")
SCHEMA = """<schema name="shelf"><system>A shelf.
<module name="one">The first of many rules is this.</module></system></schema>"""


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    with serving(plain_spoken(tiny("llama")), tmp_path, segment_tokens=(16, 64)) as running:
        yield running


def ask(served: Served, path: str, body: dict[str, Any], key: str = "none") -> tuple[str, dict[str, Any]]:
    """Ask for an answer; gives the id of the request, and what is on record of it."""
    headers = {"Authorization": f"Bearer {key}"}
    reply = served.http.post(path, json=body, headers=headers)
    identity = reply.headers["x-request-id"]
    told = served.http.get(f"/v1/requests/{identity}", headers=headers)
    assert told.status_code == 200, told.text
    return identity, told.json()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", DIALECTS)
def test_each_answer_says_how_much_it_reused(path: str, stream: bool, served: Served) -> None:
    for number in range(2):
        reply = served.http.post(path, json={**DIALECTS[path], "stream": stream})
        assert reply.status_code == 200, reply.text
        facts = dict(each.split("=") for each in reply.headers["x-cpucache"].split(", "))
        told = served.http.get(f"/v1/requests/{reply.headers['x-request-id']}").json()
        assert {name: int(facts[name]) for name in KINDS} == {name: told[name] for name in KINDS}
        assert sum(told[name] for name in KINDS) == told["prompt_tokens"] > 100
        assert set(told) == {*FIELDS, "why"}
        assert (told["path"], told["status"], told["finish"], told["completion_tokens"]) == (path, 200, "length", 4)
        assert 0 < told["ttft_ms"] < told["total_ms"]
        if number:
            assert (told["evaluated"], told["why"]) == (1, None)
        else:
            assert told["why"]["cause"] == "nothing-known"
            assert told["why"]["evaluated"] == told["evaluated"]


@pytest.mark.parametrize("path", DIALECTS)
def test_what_was_spliced_is_never_told_as_exact(path: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = ServerSettings(reuse="anywhere")
    with serving(plain_spoken(tiny("llama")), tmp_path, segment_tokens=(16, 64), settings=settings) as served:
        body = json.dumps(DIALECTS[path])
        ask(served, path, json.loads(body))
        for first in (SYSTEM, PROMPT["prompt"]):
            body = body.replace(json.dumps(first)[1:-1], json.dumps(f"It is noon now. {first}")[1:-1])
        _, told = ask(served, path, json.loads(body))
        assert told["clean"] + told["foreign"] > 64
        assert told["exact"] < 64
        # Nor is it the second time, when all of it lies in the context as it was spliced.
        _, again = ask(served, path, json.loads(body))
        assert again["evaluated"] == 1
        assert again["exact"] < 64


def test_the_last_requests_are_listed_the_newest_first(served: Served) -> None:
    assert served.http.get("/v1/requests").json() == {"object": "list", "data": []}
    ids = [ask(served, path, body)[0] for path, body in DIALECTS.items()]
    listed = served.http.get("/v1/requests").json()["data"]
    assert [each["id"] for each in listed] == ids[::-1]
    assert all(set(each) == FIELDS for each in listed)
    assert [each["path"] for each in listed] == list(DIALECTS)[::-1]
    assert listed[0]["created"] >= listed[-1]["created"]
    for _ in range(SHOWN):
        served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert len(served.http.get("/v1/requests").json()["data"]) == SHOWN
    gone = served.http.get(f"/v1/requests/{ids[0]}")
    assert gone.status_code == 404
    assert "GET /v1/requests lists" in gone.json()["error"]["message"]


def test_a_request_that_is_refused_is_on_record(served: Served) -> None:
    _, told = ask(served, "/v1/chat/completions", {"messages": []})
    assert (told["status"], told["finish"], told["prompt_tokens"], told["why"]) == (400, "refused", 0, None)
    _, told = ask(served, "/v1/chat/completions", {"messages": [{"role": "user", "content": "y" * 9000}]})
    assert told["status"] == 400
    # What asks for no answer is not.
    served.http.get("/v1/models")
    assert len(served.http.get("/v1/requests").json()["data"]) == 2


def test_several_answers_have_a_record_each(served: Served) -> None:
    identity, told = ask(served, "/v1/chat/completions", {**CHAT, "n": 2})
    listed = served.http.get("/v1/requests").json()["data"]
    assert {each["id"] for each in listed} == {identity, f"{identity}-2"}
    assert told["completion_tokens"] == 4


def test_nobody_is_told_of_others(tiny: Tiny, tmp_path: Path) -> None:
    settings = ServerSettings(api_keys=("first", "second"))
    with serving(plain_spoken(tiny("llama")), tmp_path, segment_tokens=(16, 64), settings=settings) as served:
        identity, _ = ask(served, "/v1/chat/completions", CHAT, "first")
        second = {"Authorization": "Bearer second"}
        assert served.http.get("/v1/requests", headers=second).json()["data"] == []
        assert served.http.get(f"/v1/requests/{identity}", headers=second).status_code == 404
        # Nor by what a prompt is compared with.
        clock = json.loads(json.dumps(CHAT).replace("1: ", "8: "))
        _, told = ask(served, "/v1/chat/completions", clock, "second")
        assert told["why"]["cause"] == "nothing-known" and told["why"]["known"] == ""
        _, told = ask(served, "/v1/chat/completions", {**clock, "max_tokens": 5}, "first")
        assert told["why"] is None or told["why"]["known"].count("8: ") == 0
        assert served.http.get("/v1/requests", headers={"Authorization": "Bearer third"}).status_code == 401


def test_what_was_evicted(tiny: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ram_budget": "2MiB", "disk_budget": "2MiB", "segment_tokens": (16, 64)}
    with serving(plain_spoken(tiny("llama")), tmp_path, **options) as served:
        ask(served, "/v1/chat/completions", CHAT)
        for number in range(10, 20):
            ask(served, "/v1/completions", {**PROMPT, "prompt": message(number, 120)})
        served.engine.store.flush()
        served.engine.forget()
        _, told = ask(served, "/v1/chat/completions", CHAT)
        assert told["evaluated"] > 100
        assert told["why"]["cause"] == "evicted"
        assert "--disk" in told["why"]["advice"]


def test_a_recurrent_model_goes_on_from_points(tiny: Tiny, tmp_path: Path) -> None:
    with serving(plain_spoken(tiny("mamba")), tmp_path, segment_tokens=(16, 64)) as served:
        ask(served, "/v1/chat/completions", CHAT)
        system, user = CHAT["messages"]
        other = {**system, "content": f"{SYSTEM[:-40]} and what else there is to be said of it"}
        _, told = ask(served, "/v1/chat/completions", {**CHAT, "messages": [other, user]})
        assert told["why"]["cause"] in ("resume-points", "line-changed")
        assert "no text after a change can be spliced" in told["why"]["advice"]
        assert told["why"]["position"] > 0.8 * len(served.engine.model.tokenize(SYSTEM))


def test_prompts_on_schemas_and_prompts_that_were_prepared(served: Served) -> None:
    assert served.http.post("/v1/schemas", json={"text": SCHEMA}).status_code == 201
    extension = {"prompt": '<prompt schema="shelf"><one/></prompt>'}
    body = {"messages": [{"role": "user", "content": "Which?"}], "cpucache": extension, "max_tokens": 2}
    _, first = ask(served, "/v1/chat/completions", body)
    _, second = ask(served, "/v1/chat/completions", body)
    assert first["why"]["cause"] == "not-encoded" and second["why"] is None

    _, told = ask(served, "/v1/cache/prepare", {"messages": CHAT["messages"]})
    assert (told["finish"], told["why"]) == ("prepared", None)
    assert told["evaluated"] > 100 and told["exact"] == told["prompt_tokens"] - told["evaluated"]
    _, told = ask(served, "/v1/chat/completions", CHAT)
    assert (told["evaluated"], told["why"]) == (1, None)
    changed = json.loads(json.dumps(CHAT).replace("1: ", "7: "))
    _, told = ask(served, "/v1/chat/completions", changed)
    assert told["why"]["cause"] == "line-changed"


def test_prompts_that_were_only_prepared_leave_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpucache.server.records._TOKENS", 1000)
    for number in range(6):
        body = {"messages": [{"role": "user", "content": message(number, 60)}]}
        identity, _ = ask(served, "/v1/cache/prepare", body)
    (tenant,) = served.service.tenants
    kept = tenant.records.list()
    assert kept[0].id == identity
    assert 1 < len(kept) < 6
    assert 200 < sum(each.size for each in kept) <= 1000


def test_while_many_ask(served: Served) -> None:
    def work(number: int) -> bool:
        body = {**PROMPT, "prompt": message(number % 5, 40)}
        _, told = ask(served, "/v1/completions", body)
        listed = served.http.get("/v1/requests").json()["data"]
        return told["status"] == 200 and told["id"] in {each["id"] for each in listed}

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(30)))
    until(served.idle)


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_explains(served: Served) -> None:
    empty = cpucache("why", "--url", served.url)
    assert (empty.status, empty.out) == (
        0,
        f"{served.url} has had no request with this API key since it was started\n",
    )
    ask(served, "/v1/chat/completions", CHAT)
    changed = json.loads(json.dumps(CHAT).replace("1: ", "7: "))
    identity, record = ask(served, "/v1/chat/completions", changed)
    listed = cpucache("why", "--url", served.url, COLUMNS="120").out
    assert listed.index(identity) < listed.index("chat/completions") and str(record["evaluated"]) in listed
    shown = cpucache("why", identity, "--url", f"{served.url}/").out
    for part in (
        "line-changed: A line early in the prompt has changed",
        "↵7: ",
        "↵1: ",
        "--reuse anywhere",
        f"{record['evaluated']} evaluated",
    ):
        assert part in shown, shown
    assert json.loads(cpucache("why", identity, "--url", served.url, "--json").out) == record
    assert json.loads(cpucache("why", "--url", served.url, "--json").out)["data"][0]["id"] == identity


def test_the_command_says_what_to_do(tiny: Tiny, tmp_path: Path) -> None:
    settings = ServerSettings(api_keys=("first",))
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=settings) as served:
        locked = cpucache("why", "--url", served.url)
        assert (locked.status, locked.out) == (2, "")
        assert "--api-key" in locked.err and locked.err.count("\n") == 1
        unknown = cpucache("why", "req_x", "--url", served.url, CPUCACHE_API_KEY="first")
        assert unknown.status == 2 and "no request 'req_x' is known" in unknown.err
        assert cpucache("why", "--url", f"{served.url}/x", "--api-key", "first").status == 2
        url = served.url
    nobody = cpucache("why", "--url", url)
    assert nobody.status == 1 and "`cpucache serve`" in nobody.err
    assert cpucache("why", "--url", "localhost").status == 2


# ---- logs ------------------------------------------------------------------------------------------------------------
def test_a_line_for_each_request(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cpucache.server"):
        identity, told = ask(served, "/v1/messages", MESSAGES)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    (line,) = [each for each in lines if each["id"] == identity]
    wanted = {name: told[name] for name in (*KINDS, "path", "status", "prompt_tokens", "ttft_ms", "model", "finish")}
    assert wanted.items() <= line.items()
    assert line["time"].endswith("+00:00") and line["level"] == "info"
    text = next(record.getMessage() for record in caplog.records if identity in record.getMessage())
    assert text.startswith(f"{identity} POST /v1/messages 200 prompt_tokens={told['prompt_tokens']} exact=0")


def test_other_lines_are_objects_too() -> None:
    record = logging.LogRecord("cpucache.store", logging.WARNING, __file__, 1, "no %s\nleft", ("room",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert {"level": "warning", "logger": "cpucache.store", "message": "no room\nleft"}.items() <= json.loads(
        line
    ).items()

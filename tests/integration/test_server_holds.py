"""The server in a careless and hostile world: what it refuses, who waits, and what remains of a client that goes."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok

from cpucache.server.settings import ServerSettings
from tests.support.pace import slow
from tests.support.serving import Served, serving, until
from tests.support.sessions import plain_spoken

Tiny = Callable[..., Path]
CHAT = "/v1/chat/completions"


def asking(text: str = "the sea", **settings: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": text}], "temperature": 0, **settings}


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    with serving(plain_spoken(tiny("llama")), tmp_path) as running:
        yield running


# ---- at the door -----------------------------------------------------------------------------------------------------
def test_a_key_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=ServerSettings(api_keys=("sesame",))) as served:
        for headers in ({}, {"Authorization": "Bearer no"}, {"x-api-key": "Sesame"}, {"Authorization": "sesame!"}):
            for path in (CHAT, "/v1/messages", "/metrics", "/tokenize"):
                reply = httpx.post(served.url + path, json=asking(), headers=headers)
                assert reply.status_code == 401
                assert "API key" in reply.json()["error"]["message"]
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        for headers in ({"Authorization": "Bearer sesame"}, {"x-api-key": "sesame"}):
            encoded = {name.encode(): value.encode() for name, value in headers.items()}
            assert httpx.post(served.url + CHAT, json=asking(max_tokens=2), headers=encoded).status_code == 200


def test_another_name_for_this_machine_is_refused(served: Served) -> None:
    """A page that resolves its own name to this machine is refused, and no page may read what others are told."""
    for name in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", ""):
        reply = served.http.get("/health", headers={"Host": name})
        assert reply.status_code == 400
    for name in ("localhost", "localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert served.http.get("/health", headers={"Host": name}).status_code == 200
    reply = served.http.get("/health", headers={"Origin": "https://evil.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_too_much_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=ServerSettings(max_body=1 << 20)) as served:
        body = json.dumps(asking("y" * (1 << 20)))
        for sent in (body.encode(), (each.encode() for each in (body[:1000], body[1000:]))):
            for path in (CHAT, "/v1/messages"):
                if isinstance(sent, bytes) or path == CHAT:
                    reply = served.http.post(path, content=sent, headers={"content-type": "application/json"})
                    assert reply.status_code == 413
                    assert "1 MiB" in reply.json()["error"]["message"]
        assert served.http.post(CHAT, json=asking(max_tokens=2)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/tokenize"])
def test_garbage_is_refused_in_the_dialect_s_shape(path: str, served: Served) -> None:
    deep = b'{"messages": ' + b"[" * 100_000
    for body in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", deep, b'{"messages": 3, "prompt": {}}'):
        reply = served.http.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        told = reply.json()
        assert told["error"]["message"]
        assert (told.get("type") == "error") == (path == "/v1/messages")
    assert served.http.get(path).status_code == 405
    assert served.http.get("/nowhere").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"grammar": "root ::= " + "(" * 60_000}, "500 nested groups"),
        ({"grammar": "root ::= a\n" + "".join(f"a{n} ::= b\n" for n in range(2000))}, "1000 rules"),
        ({"stop": ["a"] * 100}, "64 short strings"),
        ({"stop": ["a" * 2000]}, "64 short strings"),
    ],
    ids=["nested", "rules", "stops", "long stop"],
)
def test_what_would_take_llama_cpp_down_is_refused(body: dict[str, Any], reason: str, served: Served) -> None:
    reply = served.http.post(CHAT, json=asking(max_tokens=5, **body))
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]
    assert served.http.post(CHAT, json=asking(max_tokens=2)).status_code == 200


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "maxLength": 10**9}, None),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 10**6}, None),
        ({"type": "string", "minLength": 10**9}, "minLength may be at most 256"),
        ({"type": "string", "pattern": "^a{100000}$"}, "at most 256 times"),
    ],
    ids=str,
)
def test_bounds_of_a_schema_that_no_grammar_has(schema: dict[str, Any], reason: str | None, served: Served) -> None:
    whole = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": whole}}
    reply = served.http.post(CHAT, json=asking(max_tokens=5, response_format=form))
    assert reply.status_code == (200 if reason is None else 400)
    assert reason is None or reason in reply.json()["error"]["message"]


# ---- waiting ---------------------------------------------------------------------------------------------------------
def test_when_too_many_wait_the_next_is_told_so(tiny: Tiny, tmp_path: Path) -> None:
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=ServerSettings(queue=2), parallel=1) as served:
        slow(served.engine)
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(served.http.post, CHAT, json=asking(max_tokens=100)) for _ in range(4)]
            # One is answered and one read ahead, and two wait.
            until(lambda: served.service._admission.waiting == 2)
            refused = served.http.post(CHAT, json=asking(max_tokens=100))
            assert [each.result().status_code for each in asked] == [200] * 4
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "5"
        assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("name", ["Authorization", "x-api-key"])
def test_whoever_has_many_requests_waits_for_those_who_have_few(name: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = ServerSettings(api_keys=("many", "few"))
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=settings, parallel=1) as served:
        slow(served.engine)
        done: list[str] = []

        def ask(key: str, number: int = 0) -> None:
            # The key that lets a request in is the key whose turn it takes, whatever the other header says.
            headers = {"Authorization": f"Bearer {number}", name: f"Bearer {key}" if name == "Authorization" else key}
            assert served.http.post(CHAT, json=asking(max_tokens=20), headers=headers).status_code == 200
            done.append(key)

        many = [threading.Thread(target=ask, args=["many", number]) for number in range(8)]
        for thread in many:
            thread.start()
        until(lambda: served.service._admission.waiting == 6)
        few = threading.Thread(target=ask, args=["few"])
        few.start()
        for thread in (*many, few):
            thread.join()
        assert done.index("few") <= 3


def test_a_request_that_takes_too_long_is_ended(tiny: Tiny, tmp_path: Path) -> None:
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=ServerSettings(timeout=0.5), parallel=1) as served:
        slow(served.engine, 0.05)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(served.http.post, CHAT, json=asking(max_tokens=1000)) for _ in range(3)]
            for each in asked:
                reply = each.result()
                assert reply.status_code == 503
                assert "--timeout" in reply.json()["error"]["message"]
        until(served.idle, 5)


# ---- gone ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_the_answer_of_a_client_that_has_gone_ends(path: str, streams: bool, served: Served) -> None:
    slow(served.engine)
    body = json.dumps(asking(max_tokens=1500, stream=streams)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(served.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if streams:
            assert client.recv(64)
        until(lambda: bool(served.engine.host.core._scheduler.answers))
    until(served.idle, 5)
    # What was evaluated is found again.
    assert served.http.post(CHAT, json=asking(max_tokens=2)).status_code == 200


def test_many_clients_that_come_and_go_leave_nothing(served: Served) -> None:
    """Disconnects, stalls and garbage: no slot, cell, thread or queue position is lost, and answers are right."""
    wanted = served.http.post(CHAT, json=asking(max_tokens=20)).json()["choices"][0]["message"]["content"]
    process = psutil.Process()
    threads, files = process.num_threads(), process.num_fds()
    port = int(served.url.rsplit(":", 1)[1])
    end = time.monotonic() + 15
    wrong: list[str] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=served.url, timeout=60) as http:
            while time.monotonic() < end:
                kind = rng.randrange(5)
                if kind == 0:
                    reply = http.post(CHAT, json=asking(max_tokens=20))
                    if reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] != wanted:
                        wrong.append(reply.text)
                elif kind == 1:
                    with http.stream("POST", CHAT, json=asking(f"text {seed}", max_tokens=400, stream=True)) as reply:
                        for _ in zip(range(rng.randrange(5)), reply.iter_lines(), strict=False):
                            pass
                else:
                    with socket.create_connection(("127.0.0.1", port)) as raw:
                        body = json.dumps(asking("y" * rng.randrange(500), max_tokens=100)).encode()
                        sent = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                        sent += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                        sent = (sent + body)[: rng.randrange(len(sent + body) + 1)] if kind < 4 else rng.randbytes(200)
                        raw.sendall(sent)
                        time.sleep(rng.random() / 4)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(client, range(50)))
    assert wrong == []
    until(served.idle)
    assert served.service._admission._free == 3
    assert not any(slot.busy for slot in served.engine.kv_cache.splicer.slots)
    assert not served.engine.store._using
    until(lambda: process.num_fds() <= files + 5)
    # The threads that begin requests stay for the next.
    assert process.num_threads() <= threads + 40
    assert served.http.post(CHAT, json=asking(max_tokens=20)).json()["choices"][0]["message"]["content"] == wanted


# ---- anything --------------------------------------------------------------------------------------------------------
def test_the_server_fails_for_no_request_of_any_shape(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) >= 10
    for operation in operations:

        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def attempt(case: Any) -> None:
            response = case.call(timeout=60)
            assert response.status_code < 500 or case.path == "/v1/embeddings", response.text

        attempt()

"""PML over HTTP: schemas that are uploaded, prompts on them, and what is evaluated ahead."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cpucache.engine import Engine
from cpucache.pml import parse_schema
from cpucache.server.settings import ServerSettings
from tests.support.pace import slow
from tests.support.serving import Served, serving, until
from tests.support.sessions import message, plain_spoken
from tests.support.shelf import FULL, PROMPT, SCHEMA

Tiny = Callable[..., Path]

ASKED: list[Any] = [{"role": "user", "content": "Which of them?"}]
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 6}


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    settings = ServerSettings(max_schemas=3, max_schema_bytes=1 << 20)
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=settings, segment_tokens=(16, 64)) as running:
        yield running


def upload(served: Served, text: str = SCHEMA) -> httpx.Response:
    return served.http.post("/v1/schemas", json={"text": text})


def encoded(served: Served, name: str = "shelf") -> dict[str, Any]:
    """Encode a schema, to the end."""
    assert served.http.post(f"/v1/schemas/{name}/encode", json={}).status_code == 202

    def ended() -> bool:
        return served.http.get(f"/v1/schemas/{name}").json()["encoding"]["state"] not in ("waiting", "running")

    until(ended)
    told: dict[str, Any] = served.http.get(f"/v1/schemas/{name}").json()
    return told


# ---- schemas ---------------------------------------------------------------------------------------------------------
def test_a_schema_is_uploaded_encoded_and_deleted(served: Served) -> None:
    told = upload(served)
    assert told.status_code == 201
    assert told.json()["encoding"] == {
        "state": "none",
        "done": 0,
        "total": told.json()["encoding"]["total"],
        "error": None,
    }
    (listed,) = served.http.get("/v1/schemas").json()["data"]
    assert listed == told.json()
    assert listed["tokens"] >= listed["encoding"]["total"] > 100
    done = encoded(served)
    assert done["encoding"] == {**listed["encoding"], "state": "done", "done": listed["encoding"]["total"]}
    assert done["segments"]["encoded"] == done["segments"]["total"]
    assert done["text"] == SCHEMA
    tree = done["tree"]
    one, two, union, place, now = tree["children"]
    assert [each["kind"] for each in tree["children"]] == ["module", "module", "union", "parameter", "module"]
    assert [each["name"] for each in union["children"]] == ["near", "far"]
    assert all(each["encoded"] == each["tokens"] > 0 for each in (tree, one, two, *union["children"]))
    assert (place["tokens"], place["encoded"], now["encoded"], now["cache"]) == (12, 0, 0, False)
    assert served.http.delete("/v1/schemas/shelf").json()["deleted"]
    assert served.http.get("/v1/schemas").json()["data"] == []
    for reply in (served.http.get("/v1/schemas/shelf"), served.http.delete("/v1/schemas/shelf")):
        assert reply.status_code == 404
        assert "no schema 'shelf'" in reply.json()["error"]["message"]
    reply = served.http.post("/v1/chat/completions", json={"messages": [], "cpucache": {"prompt": PROMPT}})
    assert reply.status_code == 400
    # What was encoded is found when it comes again.
    assert upload(served).json()["encoding"]["state"] == "done"


def test_encoding_lets_answers_go_first(served: Served) -> None:
    upload(served)
    slow(served.engine, 0.1)
    assert served.http.post("/v1/schemas/shelf/encode", json={}).json()["encoding"]["state"] in ("waiting", "running")
    body = {"messages": ASKED, **GREEDY}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200
    seen = served.http.get("/v1/schemas/shelf").json()["encoding"]
    assert seen["state"] == "running" and seen["done"] < seen["total"]
    # Asked for again it is not begun again; deleted, it ends.
    served.http.post("/v1/schemas/shelf/encode", json={})
    assert not served.service.background._jobs
    served.http.delete("/v1/schemas/shelf")
    until(served.idle, 10)
    until(lambda: served.service.background._thread is None, 10)


def test_no_schema_names_a_file_and_none_is_too_large(served: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    for src in ("secret", str(secret), os.path.relpath(secret), "/etc/passwd"):
        reply = upload(served, f"<schema name='a'><module name='m' src='{src}'/></schema>")
        assert reply.status_code == 400
        assert "there is no folder to look in" in reply.json()["error"]["message"]
    assert upload(served, str(secret)).status_code == 400
    deep = "<schema name='a'>" + "".join(f"<module name='m{n}'>" for n in range(200)) + "</module>" * 200 + "</schema>"
    for text, reason in (
        (deep, "nested more than 100 deep"),
        ("<schema name='a'>" + "<module name='m'>x</module>" * 100_001 + "</schema>", "more than 100,000 tags"),
        ("<schema name='a'>x", "line"),
        ("<schema name='a'><module>x</module><b/></schema>", "lacks its attribute 'name'"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><schema name="a">&x;</schema>', "DOCTYPE"),
    ):
        reply = upload(served, text)
        assert reply.status_code == 400
        assert reason in reply.json()["error"]["message"]
    # Every mistake is told, one a line.
    assert (
        len(upload(served, "<schema name='a'><module>x</module><b/></schema>").json()["error"]["message"].splitlines())
        == 2
    )
    for number in range(3):
        assert upload(served, f"<schema name='s{number}'>x</schema>").status_code == 201
    assert upload(served, "<schema name='s3'>x</schema>").status_code == 400
    assert upload(served, "<schema name='s0'>y</schema>").status_code == 201
    assert upload(served, f"<schema name='s0'>{'y ' * 1_000_000}</schema>").status_code == 413
    # The bytes count, not the characters; what the replaced schema had does not.
    assert upload(served, f"<schema name='s0'>{'ü' * 600_000}</schema>").status_code == 413
    # Names are names, not paths.
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b"):
        assert served.http.get(f"/v1/schemas/{name}").status_code in (404, 405)


# ---- prompts ---------------------------------------------------------------------------------------------------------
def test_a_prompt_is_what_the_engine_says_in_every_dialect(served: Served, tmp_path: Path, tiny: Tiny) -> None:
    whole = FULL.replace("</prompt>", "<user>Which of them?</user></prompt>")
    with Engine(
        plain_spoken(tiny("llama")), n_ctx=2048, threads=1, kv_type="f32", store=tmp_path / "other"
    ) as undisturbed:
        undisturbed.add_schema(parse_schema(SCHEMA))
        undisturbed.encode("shelf")
        wanted = undisturbed.generate(whole, max_tokens=6)
    upload(served)
    encoded(served)
    given = {"prompt": PROMPT, "arguments": {"place": "Ulm & Bonn"}}
    chat = served.openai.chat.completions.create(messages=ASKED, extra_body={"cpucache": given}, **GREEDY)
    assert chat.choices[0].message.content == wanted.text
    assert chat.usage is not None and chat.usage.prompt_tokens == wanted.metrics.prompt_tokens
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == wanted.metrics.cached_tokens > 100
    with served.openai.chat.completions.create(
        messages=[], extra_body={"cpucache": {"prompt": whole}}, stream=True, **GREEDY
    ) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted.text
    settings: dict[str, Any] = {"model": "any", "max_tokens": 6, "extra_body": {"temperature": 0, "cpucache": given}}
    answer = served.anthropic.messages.create(messages=ASKED, **settings)
    assert answer.content[0].text == wanted.text
    counted = served.anthropic.messages.count_tokens(model="any", messages=ASKED, extra_body={"cpucache": given})
    assert counted.input_tokens == wanted.metrics.prompt_tokens
    response = served.openai.responses.create(
        model="any", input=ASKED[0]["content"], max_output_tokens=6, temperature=0, extra_body={"cpucache": given}
    )
    assert response.output_text == wanted.text


def test_fidelity_and_recompute(served: Served) -> None:
    upload(served)
    encoded(served)

    def facts(**given: Any) -> dict[str, float]:
        body = {"messages": ASKED, **GREEDY, "cpucache": given}
        told = served.http.post("/v1/chat/completions", json=body).headers["x-cpucache"]
        return {name: float(value) for name, value in (each.split("=") for each in told.split(", "))}

    fast = facts(prompt=FULL, fidelity="fast")
    assert fast["related"] + fast["clean"] > 100
    half = facts(prompt=FULL, recompute=0.5)
    assert half["evaluated"] > fast["evaluated"] + 50
    # Without a prompt it is said of the messages.
    text = {"role": "user", "content": message(5, 60)}
    for reuse in ("exact", "anywhere"):
        body = {"messages": [{"role": "system", "content": reuse}, text], **GREEDY, "cpucache": {"reuse": reuse}}
        told = served.http.post("/v1/chat/completions", json=body).headers["x-cpucache"]
        assert ("foreign=0" in told) == (reuse == "exact")
    high = facts(prompt=FULL, fidelity="high")
    assert high["related"] == high["clean"] == 0


@pytest.mark.parametrize(
    ("given", "more", "reason"),
    [
        ({"prompt": "/etc/passwd"}, {}, "cpucache.prompt"),
        ({"prompt": "<prompt schema='shelf'><three/></prompt>"}, {}, "no module 'three'"),
        ({"prompt": "<prompt schema='other'/>"}, {}, "no schema 'other'"),
        ({"prompt": PROMPT, "arguments": {"where": "x"}}, {}, "where"),
        ({"prompt": "<prompt schema='shelf' place='a'/>", "arguments": {"place": "x"}}, {}, "'place' already"),
        ({"prompt": PROMPT, "arguments": {"place": "long " * 99}}, {}, "tokens long"),
        ({"prompt": PROMPT, "fidelity": "best"}, {}, "fidelity"),
        ({"prompt": FULL, "fidelity": "fast", "recompute": 0.1}, {}, "not both"),
        ({"prompt": PROMPT, "recompute": 2}, {}, "recompute"),
        ({"prompt": PROMPT, "src": "x"}, {}, "src"),
        (
            {"prompt": PROMPT},
            {"messages": [{"role": "system", "content": "x"}]},
            "only text messages of user and assistant",
        ),
        ({"prompt": PROMPT}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "its schema"),
        ({"prompt": "<prompt schema='shelf'>" + "<two>" * 150 + "</two>" * 150 + "</prompt>"}, {}, "100 deep"),
    ],
)
def test_what_is_no_prompt_is_refused(given: dict[str, Any], more: dict[str, Any], reason: str, served: Served) -> None:
    upload(served)
    reply = served.http.post("/v1/chat/completions", json={"messages": ASKED, **GREEDY, "cpucache": given, **more})
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]


# ---- ahead -----------------------------------------------------------------------------------------------------------
TOOL = {"type": "function", "function": {"name": "look", "description": message(8, 10), "parameters": {}}}
USED = {"name": "look", "description": message(8, 10), "input_schema": {}}


@pytest.mark.parametrize(
    ("ahead", "path", "later"),
    [
        (
            {"messages": [{"role": "system", "content": message(6, 50)}], "tools": [TOOL]},
            "/v1/chat/completions",
            {"messages": [{"role": "system", "content": message(6, 50)}, *ASKED], "tools": [TOOL]},
        ),
        (
            {"system": message(6, 50), "messages": [], "tools": [USED]},
            "/v1/messages",
            {"system": message(6, 50), "messages": ASKED, "tools": [USED]},
        ),
        ({"messages": ASKED * 3}, "/v1/chat/completions", {"messages": ASKED * 3}),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": message(7, 30)}]},
            "/v1/messages",
            {"messages": [*ASKED, {"role": "assistant", "content": message(7, 30)}, *ASKED]},
        ),
    ],
    ids=["openai", "anthropic", "user", "assistant"],
)
def test_what_is_prepared_is_not_evaluated_again(
    ahead: dict[str, Any], path: str, later: dict[str, Any], served: Served
) -> None:
    first, second = (served.http.post("/v1/cache/prepare", json=ahead).json() for _ in range(2))
    # The last token is not evaluated ahead where an answer is to follow at once.
    size = first["prompt_tokens"] - (ahead["messages"] == ASKED * 3)
    assert (first["cached_tokens"], first["evaluated_tokens"]) == (0, size)
    assert (second["cached_tokens"], second["evaluated_tokens"]) == (size, 0)
    served.engine.forget()
    told = served.http.post(path, json={**GREEDY, **later}).headers["x-cpucache"]
    facts = dict(each.split("=") for each in told.split(", "))
    assert int(facts["exact"]) >= size
    assert int(facts["evaluated"]) < 60


def test_a_prompt_is_prepared_ahead(served: Served) -> None:
    upload(served)
    body = {"cpucache": {"prompt": FULL}}
    first, second = (served.http.post("/v1/cache/prepare", json=body).json() for _ in range(2))
    assert first["evaluated_tokens"] > 100
    assert second["evaluated_tokens"] == 0
    assert second["cached_tokens"] >= first["evaluated_tokens"]
    assert served.http.post("/v1/cache/prepare", json={}).status_code == 400
    assert (
        served.http.post("/v1/cache/prepare", json={"messages": [{"role": "user", "content": "y" * 9000}]}).status_code
        == 400
    )


def test_preparing_is_bounded_and_ends_with_its_client(tiny: Tiny, tmp_path: Path) -> None:
    settings = ServerSettings(queue=1, timeout=20)
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=settings, segment_tokens=(16, 64)) as served:
        slow(served.engine, 0.5)

        def ahead(number: int, timeout: float) -> int:
            body = {"messages": [{"role": "user", "content": message(number, 250)}]}
            try:
                return served.http.post("/v1/cache/prepare", json=body, timeout=timeout).status_code
            except httpx.ReadTimeout:
                return 0

        with ThreadPoolExecutor(3) as pool:
            gone = pool.submit(ahead, 1, 1.0)
            until(lambda: served.engine.host.core.busy)
            waits = pool.submit(ahead, 2, 60.0)
            until(lambda: len(served.service.background._jobs) == 1)
            assert ahead(3, 5.0) == 429
            assert gone.result() == 0
            assert waits.result() == 200
        until(served.idle, 5)
        until(lambda: not any(thread.name == "cpucache-background" for thread in threading.enumerate()), 5)


def test_preparing_while_the_server_shuts_down(served: Served) -> None:
    slow(served.engine, 0.2)

    def ahead(number: int) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": message(number, 250)}]}
        return served.http.post("/v1/cache/prepare", json=body)

    background = served.service.background
    with ThreadPoolExecutor(2) as pool:
        # One is evaluated, one waits.
        asked = [pool.submit(ahead, number) for number in (1, 2)]
        until(lambda: background._running is not None and len(background._jobs) == 1)
        served.service.close()
        for each in asked:
            reply = each.result()
            assert reply.status_code == 503
            assert "shutting down" in reply.json()["error"]["message"]
            assert reply.headers["Retry-After"] == "5"

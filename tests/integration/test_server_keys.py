"""Several API keys: who is let in, and what those who are learn of one another."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from cpucache.server.access import namespace_of
from cpucache.server.settings import ServerSettings
from tests.support.pace import slow
from tests.support.serving import Served, serving, until
from tests.support.sessions import message, plain_spoken
from tests.support.shelf import SCHEMA

Tiny = Callable[..., Path]

KEYS = ("first-key", "second-key", "schlüssel")
DOCUMENTS = [message(number, 30) for number in range(3)]
MODULE = {"cache_control": {"type": "module"}}


@contextmanager
def kept(tiny: Tiny, folder: Path, **settings: Any) -> Iterator[Served]:
    chosen = ServerSettings(api_keys=KEYS, **settings)
    with serving(plain_spoken(tiny("llama")), folder, settings=chosen, segment_tokens=(16, 64)) as running:
        yield running


def facts(served: Served, key: str, *documents: str) -> dict[str, int]:
    """Token counts of an answer by relation, for documents that may be reused at any position."""
    parts = [{"type": "text", "text": document, **MODULE} for document in documents]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 4}
    headers = {"Authorization": f"Bearer {key}"}
    reply = served.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    told = (each.split("=") for each in reply.headers["x-cpucache"].split(", "))
    return {name: int(value) for name, value in told if name != "ttft_ms"}


def test_each_key_is_enough_and_all_are_compared(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(tiny, tmp_path) as served:
        compared: list[bytes] = []
        compare = hmac.compare_digest

        def noting(shown: bytes, key: bytes) -> bool:
            compared.append(key)
            return compare(shown, key)

        monkeypatch.setattr(hmac, "compare_digest", noting)
        for shown in (*KEYS, "first", "", "First-key", "first-keyy"):
            compared.clear()
            reply = httpx.get(f"{served.url}/v1/models", headers={b"x-api-key": shown.encode()})
            assert reply.status_code == (200 if shown in KEYS else 401)
            # In constant time: none is passed over, whichever is shown.
            assert compared == [key.encode() for key in KEYS]


def test_clients_are_told_in_their_own_way(tiny: Tiny, tmp_path: Path) -> None:
    with kept(tiny, tmp_path) as served:
        asked: Any = [{"role": "user", "content": "Hi"}]
        wrong = openai.OpenAI(base_url=f"{served.url}/v1", api_key="no", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError, match="API key"):
            wrong.chat.completions.create(model="any", messages=asked)
        other = anthropic.Anthropic(base_url=served.url, api_key="no", max_retries=0)
        with other, pytest.raises(anthropic.AuthenticationError, match="API key"):
            other.messages.create(model="any", messages=asked, max_tokens=2)
        right = anthropic.Anthropic(base_url=served.url, api_key=KEYS[1], max_retries=0)
        with right:
            assert right.messages.create(model="any", messages=asked, max_tokens=2).content


@pytest.mark.parametrize("isolate", [False, True])
def test_what_keys_share(isolate: bool, tiny: Tiny, tmp_path: Path) -> None:
    with kept(tiny, tmp_path, isolate=isolate) as served:
        first, second, _ = KEYS
        size = facts(served, first, *DOCUMENTS)["evaluated"]
        # The same text: exact, and the time tells that it was asked before; unless nothing is shared.
        other = facts(served, second, *DOCUMENTS)
        assert other["exact"] == (0 if isolate else size - 1)
        # The documents in another order: never what another key has evaluated.
        served.engine.forget()
        assert facts(served, first, *DOCUMENTS[::-1])["foreign"] > 50
        swapped = [DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[2]]
        third = facts(served, second, *swapped)
        assert third["foreign"] + third["clean"] > 50


def test_foreign_text_of_another_key_is_never_taken(tiny: Tiny, tmp_path: Path) -> None:
    with kept(tiny, tmp_path, reuse="anywhere") as served:
        facts(served, KEYS[0], *DOCUMENTS)
        told = facts(served, KEYS[1], *DOCUMENTS[::-1])
        assert told["foreign"] == told["clean"] == told["related"] == 0
        assert told["exact"] < 20
        assert facts(served, KEYS[0], DOCUMENTS[1], DOCUMENTS[2])["foreign"] > 50


def test_schemas_of_another_key_are_not_there(tiny: Tiny, tmp_path: Path) -> None:
    with kept(tiny, tmp_path) as served:
        first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS[:2])
        assert served.http.post("/v1/schemas", json={"text": SCHEMA}, headers=first).status_code == 201
        assert served.http.get("/v1/schemas", headers=second).json()["data"] == []
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/encode")):
            reply = served.http.request(method, f"/v1/schemas/shelf{path}", json={}, headers=second)
            assert reply.status_code == 404
        assert served.http.get("/v1/schemas/shelf", headers=first).status_code == 200
        # One of the same name is another.
        mine = "<schema name='shelf'>mine</schema>"
        served.http.post("/v1/schemas", json={"text": mine}, headers=second)
        assert served.http.get("/v1/schemas/shelf", headers=first).json()["text"] == SCHEMA
        assert served.http.get("/v1/schemas/shelf", headers=second).json()["text"] == mine


@pytest.mark.parametrize("isolate", [False, True])
def test_keys_are_isolated_after_a_restart_too(isolate: bool, tiny: Tiny, tmp_path: Path) -> None:
    for restarted in (False, True):
        with kept(tiny, tmp_path, isolate=isolate) as served:
            told = facts(served, KEYS[restarted], *DOCUMENTS)
            assert (told["exact"] > 0) == (restarted and not isolate)
            assert facts(served, KEYS[restarted], *DOCUMENTS)["evaluated"] == 1
            if restarted:
                turned = facts(served, KEYS[0], *DOCUMENTS[::-1])
                assert turned["foreign"] > 50


def test_answers_side_by_side_share_no_cells_between_isolated_keys(tiny: Tiny, tmp_path: Path) -> None:
    with kept(tiny, tmp_path, isolate=True) as served:
        slow(served.engine, 0.02)
        with ThreadPoolExecutor(2) as pool:
            told = list(pool.map(lambda key: facts(served, key, *DOCUMENTS), KEYS[:2]))
        assert [each["exact"] for each in told] == [0, 0]
        until(served.idle)


def test_a_key_is_not_given_away() -> None:
    assert namespace_of("first-key") != namespace_of("second-key")
    assert "first" not in namespace_of("first-key")
    assert len(namespace_of("")) == 32

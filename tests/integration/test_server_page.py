"""The page as it is served: its files, their headers, and what is reached with a key and without."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import cpucache
from cpucache.server.settings import ServerSettings
from cpucache.server.web import PATHS
from tests.support.serving import Served, serving, until
from tests.support.sessions import message, plain_spoken

Tiny = Callable[..., Path]

FILES = Path(cpucache.__file__).parent / "server" / "page"
KEYS = ("first-key", "second-key")


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    settings = ServerSettings(api_keys=KEYS)
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=settings, segment_tokens=(16, 64)) as running:
        yield running


def test_every_file_is_served_without_a_key_and_nothing_else(served: Served) -> None:
    names = {"index.html" if path == "/" else path.removeprefix("/page/") for path in PATHS}
    assert names == {path.name for path in FILES.iterdir()}
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path in PATHS:
        reply = httpx.get(served.url + path)
        name = "index.html" if path == "/" else path.rpartition("/")[2]
        assert reply.status_code == 200
        assert reply.content == (FILES / name).read_bytes()
        assert reply.headers["content-type"] == f"{kinds[name.rpartition('.')[2]]}; charset=utf-8"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
        # What one page gets, no other may frame, read or embed.
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        policy = dict(each.split(" ", 1) for each in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert httpx.post(served.url + path).status_code == 405
        head = httpx.head(served.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert httpx.get(served.url + path, headers={"Host": "evil.example"}).status_code == 400
    for path in ("/page/", "/page", "/page/index.html", "/page/..%2fweb.py", "/page/%2e%2e/web.py", "/page/page.py"):
        assert served.http.get(path).status_code == 404
        assert httpx.get(served.url + path).status_code == 401


def test_it_needs_nothing_that_it_does_not_bring() -> None:
    html = (FILES / "index.html").read_text()
    texts = {path.name: path.read_text() for path in FILES.iterdir()}
    named = {found for text in texts.values() for found in re.findall(r"\"(/page/[^\"]+|/page)\"", text)}
    assert named == set(PATHS) - {"/"}
    for name, text in texts.items():
        # The name space of SVG is a name, which nobody goes to.
        assert not re.search(r"(https?:)?//\w+\.", text.replace("http://www.w3.org/2000/svg", "")), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    assert not re.search(r"\s(style|on\w+)=|<style", html)
    identities = set(re.findall(r"\sid=\"([^\"]+)\"", html))
    for name, text in texts.items():
        assert set(re.findall(r"\$\(\"([^\"]+)\"\)", text)) <= identities, name
    assert set(re.findall(r"\s(?:for|aria-controls|aria-labelledby)=\"([^\"]+)\"", html)) <= identities


@pytest.mark.parametrize("path", ["/v1/cache", "/v1/schemas", "/v1/requests", "/metrics", "/v1/models"])
def test_what_it_shows_needs_the_key(path: str, served: Served) -> None:
    assert httpx.get(served.url + path).status_code == 401
    assert httpx.get(served.url + path, headers={"Authorization": "Bearer no"}).status_code == 401
    assert served.http.get(path).status_code == 200


def test_the_account_of_the_store(served: Served) -> None:
    def account(key: str = KEYS[0]) -> dict[str, Any]:
        told: dict[str, Any] = served.http.get("/v1/cache", headers={"Authorization": f"Bearer {key}"}).json()
        return told

    empty = account()
    assert (empty["object"], empty["slices"], empty["ram_slices"], empty["hits"]) == ("cache", 0, 0, 0)
    assert empty["ram_budget"] == empty["budget"] == 1 << 30
    body = {"messages": [{"role": "user", "content": message(1, 60)}], "temperature": 0, "max_tokens": 4}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200
    until(lambda: account()["slices"] > 0)
    served.engine.store.flush()
    first = account()
    assert first["misses"] > 0
    assert 0 < first["ram_bytes"] <= first["ram_budget"]
    index = served.engine.store.index
    assert index is not None
    assert first["bytes"] == sum(row.bytes for row in index.rows())
    served.engine.forget()
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200
    # At once, and not only when the index has been told.
    second = account()
    assert second["hits"] > first["hits"]
    # Totals, which are the same whoever asks; of what is in it, nothing is said.
    assert account(KEYS[1]) == account(KEYS[0])
    assert all(isinstance(value, int | float) for name, value in second.items() if name != "object")

"""``cpucache serve`` as a process: it answers, ends in good order, and goes on from what it knew."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.command import PATIENCE, cpucache, started
from tests.support.sessions import message, plain_spoken

Tiny = Callable[..., Path]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": message(1, 60)}], "temperature": 0, "max_tokens": 8}


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    with started("serve", "-m", model, "--port", "0", "--threads", "1", *options) as process:
        assert process.stderr
        line = process.stderr.readline()
        found = re.search(r"answers at (http://127\.0\.0\.1:\d+) \(Ctrl-C ends\)", line)
        assert found, line
        with httpx.Client(base_url=found.group(1), timeout=60) as client:
            yield client, process


def test_it_answers_and_after_a_restart_evaluates_nothing_again(tiny: Tiny, store_home: Path) -> None:
    model = plain_spoken(tiny("llama"))
    texts, cached = [], []
    for _ in range(2):
        with serving(model, "--segment-tokens", "8-16") as (client, process):
            assert client.get("/health").json() == {"status": "ok"}
            reply = client.post("/v1/chat/completions", json=ASKED).json()
            texts.append(reply["choices"][0]["message"]["content"])
            cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
            count = reply["usage"]["prompt_tokens"]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (0, "")
        assert err == "the server has ended; all evaluated state is saved\n"
    assert texts[0] == texts[1]
    assert cached == [0, count - 1]
    assert store_home.exists()


def test_ctrl_c_ends_answers_under_way(tiny: Tiny, store_home: Path) -> None:
    with serving(plain_spoken(tiny("llama"))) as (client, process):
        lines: list[str] = []

        def read() -> None:
            body = {**ASKED, "max_tokens": 3000, "stream": True, "grammar": 'root ::= "a"*'}
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                lines.extend(reply.iter_lines())

        def interrupt() -> None:
            process.send_signal(signal.SIGINT)

        reader = threading.Thread(target=read)
        reader.start()
        timer = threading.Timer(0.5, interrupt)
        timer.start()
        process.communicate(timeout=30)
        reader.join()
    assert process.returncode == 0


def test_what_can_t_be_is_said_at_once(tiny: Tiny) -> None:
    model = tiny("llama")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = cpucache("serve", "-m", model, "--port", port)
        assert done.status == 2
        assert re.fullmatch(rf"cpucache: --host 127\.0\.0\.1 --port {port}: Address already in use\n", done.err)
    done = cpucache("serve", "-m", model, "--host", "0.0.0.0")
    assert done.status == 2
    assert "--api-key" in done.err
    assert cpucache("serve", "-m", model, "--parallel", "40").status == 2
    done = cpucache("serve", "-m", model, "--isolate")
    assert (done.status, "--api-key" in done.err) == (2, True)
    assert cpucache("serve", "-m", model, "--api-key", "a", "--api-key", "").status == 2


def test_several_keys(tiny: Tiny, store_home: Path) -> None:
    with serving(plain_spoken(tiny("llama")), "--api-key", "one", "--api-key", "two", "--isolate") as (client, process):
        cached = {}
        for key in ("one", "two", "one", "three"):
            reply = client.post("/v1/chat/completions", json=ASKED, headers={"Authorization": f"Bearer {key}"})
            if reply.status_code == 200:
                cached[key] = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            if key == "two":
                assert cached[key] == 0
        assert cached.keys() == {"one", "two"}
        assert cached["one"] > 0
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_verbose_tells_a_line_for_each_request_and_what_was_evaluated(tiny: Tiny, store_home: Path) -> None:
    with serving(plain_spoken(tiny("llama")), "-v") as (client, process):
        client.get("/v1/models")
        reply = client.post("/v1/chat/completions", json={"messages": []})
        assert reply.status_code == 400
        answered = client.post("/v1/chat/completions", json=ASKED)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    lines = err.splitlines()
    assert re.fullmatch(r" +\d+\.\d{3} cpucache\.server: req_[0-9a-f]{24} GET /v1/models 200", lines[0])
    assert lines[1].endswith(f" cpucache.server: {reply.headers['x-request-id']} POST /v1/chat/completions 400")
    assert any(re.search(r"cpucache\.reuse: .* \d+ to evaluate", line) for line in lines[2:])
    told = f"{answered.headers['x-request-id']} POST /v1/chat/completions 200 prompt_tokens="
    assert any(told in line for line in lines[2:])


def test_logs_as_json(tiny: Tiny, store_home: Path) -> None:
    with started("serve", "-m", plain_spoken(tiny("llama")), "--port", "0", "--threads", "1", "--log-json") as process:
        assert process.stderr
        first = json.loads(process.stderr.readline())
        url = re.search(r"http://\S+", first["message"])
        assert url
        reply = httpx.post(f"{url[0]}/v1/chat/completions", json=ASKED, timeout=60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    answered, ended = map(json.loads, err.splitlines())
    assert answered["id"] == reply.headers["x-request-id"]
    told = f"exact={answered['exact']}, clean={answered['clean']}, related={answered['related']}, "
    assert reply.headers["x-cpucache"].startswith(told)
    assert (answered["path"], answered["status"]) == ("/v1/chat/completions", 200)
    assert answered["ttft_ms"] > 0
    assert ended["message"] == "the server has ended; all evaluated state is saved"


@pytest.mark.parametrize("word", ["OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "--api-key", "/v1/messages"])
def test_the_help_teaches(word: str) -> None:
    assert word in cpucache("serve", "--help").out

"""Workloads for servers: what is sent, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpucache.bench.server import Client, ServerReport, Target, Traced, traced
from cpucache.bench.workloads import permutations, replay
from cpucache.errors import InputError
from tests.support.serving import Served, serving

Tiny = Callable[..., Path]


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    with serving(tiny("llama"), tmp_path, n_ctx=2048) as running:
        yield running


def test_documents_in_other_orders(served: Served) -> None:
    report = ServerReport("cpucache")
    client = Client(Target("cpucache", served.url), report)
    permutations(served.engine, client, report, size=150)
    client.close()
    assert (set(report.permuted), report.failures) == ({"marked", "plain"}, 0)
    assert all(len(each) == 9 and min(each) > 0 for each in report.permuted.values())
    assert set(report.as_dict()["permuted"]) == {"marked", "plain"}


def test_an_agent_s_requests(served: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    requests = [
        {"in": 200, "hash_ids": [1, 2, 3, 4]},
        {"in": 300, "hash_ids": [1, 2, 3, 5, 6]},
        {"in": 5000, "hash_ids": list(range(79))},
        {"in": 300, "hash_ids": [1, 2, 3, 5, 6]},
    ]
    trace.write_text(json.dumps({"block_size": 64, "requests": requests}))
    report = ServerReport("cpucache")
    client = Client(Target("cpucache", served.url), report)
    replay(served.engine, client, report, [trace], 1000)
    client.close()
    assert [(each.tokens, each.repeated) for each in report.traces] == [(200, 0), (300, 192), (300, 300)]
    assert [each.evaluated for each in report.traces][::2] == [200, 1]
    middle = report.traces[1].evaluated
    assert middle is not None and 108 <= middle < 300
    told = report.as_dict()["traces"]
    assert (told["requests"], told["tokens"], told["repeated"]) == (3, 800, 492)
    # One token of what repeats is evaluated in any case.
    assert told["repeated_not_evaluated"] == pytest.approx(1 - (1 + middle - 108) / 492, abs=1e-3)
    assert traced([Traced(10, 0, 1.0, None)]).keys() == {"requests", "tokens", "repeated", "ttft"}


@pytest.mark.parametrize("content", ["", "[]", '{"block_size": 64}', '{"block_size": 64, "requests": [{"in": 3}]}'])
def test_what_is_no_trace(content: str, served: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(content)
    report = ServerReport("cpucache")
    with pytest.raises(InputError, match="not a trace of an agent's requests"):
        replay(served.engine, Client(Target("cpucache", served.url), report), report, [trace], 1000)

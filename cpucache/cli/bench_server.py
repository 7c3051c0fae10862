"""``cpucache bench server``: measures servers as their clients see them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cpucache.bench.series import Series
from cpucache.cli.console import err, out, seconds
from cpucache.cli.options import engine_options
from cpucache.engine import Engine

_TRACES = "an agent's requests"

if TYPE_CHECKING:
    from cpucache.bench.server import ServerReport, Workload


@click.command("server", short_help="Measure a server as its clients see it.")
@engine_options
@click.option(
    "--tokens", type=click.IntRange(64), default=1500, show_default=True, help="Length of the known text, in tokens."
)
@click.option(
    "--users", type=click.IntRange(1, 16), default=4, show_default=True, help="Number of users at the same time."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds of each conversation.")
@click.option(
    "--repeat", type=click.IntRange(2), default=9, show_default=True, help="Number of requests of quick measurements."
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME=URL",
    help="Send the same requests to another running server that speaks OpenAI's API. Repeatable.",
)
@click.option("--orders", is_flag=True, help="Also ask for five documents of 500 tokens in ten orders.")
@click.option(
    "--trace",
    "traces",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also replay requests of a coding agent: block hashes, as in callanjfox/kv-cache-tester. Repeatable.",
)
@click.option(
    "--trace-tokens",
    type=click.IntRange(64),
    default=16_000,
    show_default=True,
    help="Skip longer requests of an agent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def server(
    model: str,
    tokens: int,
    users: int,
    rounds: int,
    repeat: int,
    peers: tuple[str, ...],
    orders: bool,
    traces: tuple[Path, ...],
    trace_tokens: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure `cpucache serve` with real clients: with reuse, without it, and other servers for comparison.

    \b
    prefix    a long text that is known, and 4 new tokens
    speed     tokens a second of one answer, and of four side by side
    users     conversations at the same time, with the same system text; the last round again after a restart
    overhead  the same cached request through the server and through Engine
    orders    documents in other orders, as parts marked as modules and not (--orders)
    traces    requests of coding agents, one after the other (--trace)

    For llama.cpp's own server: llama-server -m FILE -c 8192 -np 4 --cache-reuse 256 --port 8081, and
    --peer llama-server=http://127.0.0.1:8081. Nothing else should run meanwhile.
    """
    # Needs httpx, which the other benchmarks do not.
    from cpucache.bench.server import Target, http_overhead, measure_server, own_server
    from cpucache.bench.workloads import permutations, replay

    named = [peer.partition("=") for peer in peers]
    for name, _, url in named:
        if not url.startswith("http"):
            raise click.BadParameter(f"'{name}': NAME=URL is expected", param_hint="--peer")

    def say(line: str) -> None:
        if not as_json:
            err.print(f"[dim]{line} …[/dim]")

    more: list[Workload] = [("documents in other orders", permutations)] if orders else []
    if traces:
        more.append((_TRACES, partial(replay, traces=traces, most=trace_tokens)))
    settings: dict[str, Any] = {"tokens": tokens, "users": users, "rounds": rounds, "repeat": repeat, "say": say}
    settings["more"] = more
    passed = [f"--{name}={options[key]}" for name, key in (("ctx", "n_ctx"), ("threads", "threads")) if options[key]]
    with tempfile.TemporaryDirectory(prefix="cpucache-bench-") as folder:
        options["store"] = Path(folder) / "engine"
        with Engine(model, **options) as engine:
            engine.warm_up()
            # Stopped before peers are measured: it refines while it is idle. Without reuse, traces would take hours.
            with own_server(model, Path(folder) / "server", passed) as own:
                reports = [measure_server(engine, own, **settings)]
                say("through Engine and through the server in turn")
                direct, served = http_overhead(engine, own, tokens=tokens, repeat=repeat)
                without = Target("cpucache, no reuse", own.url, {"cache_prompt": False})
                few = {"repeat": 2, "rounds": 1, "more": [each for each in more if each[0] != _TRACES]}
                reports.append(measure_server(engine, without, **settings | few))
            reports += [measure_server(engine, Target(name, url.rstrip("/")), **settings) for name, _, url in named]
            name = engine.model.path.stem
    result = {
        "model": name,
        "tokens": tokens,
        "users": users,
        "servers": [report.as_dict() for report in reports],
        "overhead": {"engine": Series(direct).as_dict(), "server": Series(served).as_dict()},
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    out.print(_table(reports))
    for line in _workloads(reports):
        out.print(line, soft_wrap=True)
    longer = Series(served).median - Series(direct).median
    out.print(f"through the server, a cached request takes {longer:.1f} ms longer to its first token", soft_wrap=True)
    failed = sum(report.failures for report in reports)
    if failed:
        err.print(f"{failed} requests failed")


def _table(reports: Sequence[ServerReport]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for title in ("", "prefix", "p95", "tok/s", "of four", "round 1", "later", "restarted"):
        table.add_column(title, justify="right" if title else "left", no_wrap=not title)
    for each in reports:
        later = [value for values in [*each.rounds[1:], each.warm] for value in values]
        first = each.rounds[0] if each.rounds else []
        spread = each.as_dict()["prefix"]
        table.add_row(
            each.name,
            *([seconds(spread["p50"]), seconds(spread["p95"])] if spread else ["–", "–"]),
            f"{each.one_stream:.1f}",
            f"{each.together:.1f}",
            *(seconds(Series(values).median) if values else "–" for values in (first, later, each.restarted)),
        )
    return table


def _workloads(reports: Sequence[ServerReport]) -> Iterator[str]:
    """Yields a line for each further measurement."""
    from cpucache.bench.server import traced

    for each in reports:
        for kind, found in each.permuted.items():
            told = seconds(Series(found).median) if found else "–"
            yield f"{each.name}: documents in another order, {kind}: {told} to the first token"
        if each.traces:
            agent = traced(each.traces)
            share = agent.get("repeated_not_evaluated")
            spared = "" if share is None else f", {share:.1%} of the repeated tokens not evaluated"
            yield f"{each.name}: an agent's requests: p50 {seconds(agent['ttft']['p50'])}{spared}"

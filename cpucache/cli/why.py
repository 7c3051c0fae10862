"""``cpucache why``: explains why tokens of a request were evaluated again."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import datetime
from typing import Any
from urllib.parse import quote

import click
from rich.table import Column, Table
from rich.text import Text

from cpucache.cli.console import listing, out, safe, seconds
from cpucache.errors import CpucacheError, InputError

_PATIENCE = 30  # seconds
_FINISH = {"stop": "", "length": "", "refused": "refused"}


@click.command(short_help="Show why a request to the server missed the cache, and which setting helps.")
@click.argument("request_id", metavar="[REQUEST-ID]", required=False)
@click.option(
    "--url", default="http://127.0.0.1:8080", show_default=True, metavar="URL", help="Address of `cpucache serve`."
)
@click.option("--api-key", envvar="CPUCACHE_API_KEY", show_envvar=True, metavar="KEY", help="API key of the server.")
@click.option("--json", "as_json", is_flag=True, help="Print the server's JSON.")
def why(request_id: str | None, url: str, api_key: str | None, as_json: bool) -> None:
    """Show why tokens of a request were evaluated that the server had evaluated before, and which setting helps.

    REQUEST-ID is the x-request-id of a response. Without it, the last requests are listed, with their ids. A server
    keeps about a hundred requests of each API key until it ends.

    \b
    cpucache why                                        the last requests
    cpucache why req_0f3a5c7e9b1d2f4a6c8e0b1d           the first token that differed, what it cost, and the cause
    """
    path = "/v1/requests" + ("" if request_id is None else f"/{quote(request_id, safe='')}")
    told = _get(url.rstrip("/") + path, api_key)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    elif request_id is None:
        _list(told["data"], url)
    else:
        _show(told)


def _get(url: str, api_key: str | None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--url: '{url}' is not an address such as http://127.0.0.1:8080")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
            told = json.load(reply)
    except urllib.error.HTTPError as error:
        raise _refused(error, url) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CpucacheError(
            f"no cpucache server answers at {url} ({reason}); start one with `cpucache serve`, or give its --url"
        ) from error
    if not isinstance(told, dict) or not ("id" in told or "data" in told):
        raise CpucacheError(f"{url}: this is not a cpucache server; give the --url of one")
    return told


def _refused(error: urllib.error.HTTPError, url: str) -> CpucacheError:
    if error.code == 401:
        return InputError("the server needs an API key: give it with --api-key, or $CPUCACHE_API_KEY")
    try:
        message = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{url} answers {error.code}: is this a cpucache server?"
    if error.code == 404:
        return InputError(f"{message}; `cpucache why` without an id lists them")
    return CpucacheError(str(message))


def _list(requests: list[dict[str, Any]], url: str) -> None:
    if not requests:
        out.print(f"{url} has had no request with this API key since it was started", soft_wrap=True)
        return
    numbers = ("prompt", "reused", "evaluated")
    columns = [Column("request", no_wrap=True), Column("time", no_wrap=True), Column("path", no_wrap=True)]
    columns += [Column(name, justify="right", no_wrap=True) for name in (*numbers, "first token")]
    columns.append(Column("status", no_wrap=True))
    rows = [
        (
            Text(each["id"]),
            datetime.fromtimestamp(each["created"]).strftime("%H:%M:%S"),
            Text(each["path"].removeprefix("/v1/")),
            f"{each['prompt_tokens']:,}",
            f"{sum(each[kind] for kind in ('exact', 'clean', 'related', 'foreign')):,}",
            f"{each['evaluated']:,}",
            seconds(each["ttft_ms"]) if each["ttft_ms"] else "",
            _status(each),
        )
        for each in requests
    ]
    out.print(listing(columns, rows, expendable=("path", "time", "status", "prompt"), close=True))
    out.print("`cpucache why REQUEST` shows why one missed the cache.", soft_wrap=True)


def _status(request: dict[str, Any]) -> str:
    if request["status"] is None:
        return "running"
    finish = _FINISH.get(request["finish"], request["finish"])
    return f"{request['status']} {finish}".strip()


def _show(request: dict[str, Any]) -> None:
    kinds = [f"{request[kind]:,} {kind}" for kind in ("exact", "clean", "related", "foreign") if request[kind]]
    first = f", the first token after {seconds(request['ttft_ms'])}" if request["ttft_ms"] else ""
    out.print(
        Text(
            f"{request['path']}: {request['prompt_tokens']:,} tokens: {', '.join(kinds) or 'none'} from slices, "
            f"{request['evaluated']:,} evaluated{first}"
        ),
        soft_wrap=True,
    )
    told = request["why"]
    if told is None:
        out.print("No reuse was missed: all evaluated text was new.")
        return
    out.print()
    out.print(Text(told["cause"], style="bold").append(f": {told['says']}", style="not bold"))
    out.print(Text(f"It cost {told['evaluated']:,} evaluated tokens, {seconds(1000 * told['seconds'])}."))
    if told["known"] or told["sent"]:
        out.print()
        out.print(Text(f"The first token that differs is number {told['position']:,}:"))
        table = Table.grid(padding=(0, 1))
        for name in ("known", "sent"):
            table.add_row(Text(f"  {name}", style="dim"), Text(_one_line(told[name])))
        out.print(table)
    out.print()
    out.print(Text(told["advice"]))


def _one_line(text: str) -> str:
    return safe(text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"))

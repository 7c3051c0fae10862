"""``cpucache serve``: an OpenAI- and Anthropic-compatible port."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from contextlib import suppress
from typing import Any

import click

from cpucache.cli.console import err
from cpucache.cli.options import engine_options
from cpucache.errors import CpucacheError, InputError
from cpucache.reuse import REUSES, Reuse


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@click.command()
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port. 0: any free port.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 16),
    default=4,
    show_default=True,
    help="Number of requests answered at the same time, which share the llama.cpp context (--ctx).",
)
@click.option(
    "--api-key",
    multiple=True,
    metavar="KEY",
    help="Key that clients must send. Repeatable; each key has its own schemas. Required if other machines can "
    "connect.  [env: CPUCACHE_API_KEY, one]",
)
@click.option(
    "--isolate",
    is_flag=True,
    help="Share no cached state between keys. Without --isolate, a client can tell from the time of an answer that "
    "another key has sent the same text.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Another host name by which clients may address the server. Repeatable.",
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Number of requests that may wait; further ones get status 429.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds that a request may wait, and again that its answer may take.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Maximum length of an answer, in tokens, if the request sets none.",
)
@click.option(
    "--tool-order",
    type=click.Choice(["sorted", "as-sent"]),
    default="sorted",
    show_default=True,
    help="Order of tools in the prompt. sorted: by name, so that their order in the request has no effect. as-sent: as "
    "in the request.",
)
@click.option(
    "--reuse",
    type=click.Choice(REUSES),
    default="schema",
    show_default=True,
    help="Slices that a prompt may use. exact: slices evaluated after exactly the text that precedes them in the "
    "prompt. schema: also slices of content parts marked as modules, and of tools, at any position. anywhere: slices "
    "of any text at any position.",
)
@click.option(
    "--log-json",
    is_flag=True,
    help="Write the log as JSON objects, one on each line. It has a line for each request, also without -v.",
)
def serve(
    model: str,
    host: str,
    port: int,
    parallel: int,
    api_key: tuple[str, ...],
    isolate: bool,
    allow_host: tuple[str, ...],
    queue: int,
    timeout: float,
    max_tokens: int,
    tool_order: str,
    reuse: Reuse,
    log_json: bool,
    **options: Any,
) -> None:
    """Answer programs that speak OpenAI's or Anthropic's API.

    Text that a prompt shares with an earlier prompt of any client is not evaluated again: it is spliced from saved
    state, also after a restart.

    \b
    cpucache serve -m qwen2.5-coder-1.5b-instruct
    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none
    export ANTHROPIC_BASE_URL=http://127.0.0.1:8080

    \b
    POST /v1/chat/completions  /v1/completions  /v1/responses       OpenAI's
    POST /v1/messages  /v1/messages/count_tokens                    Anthropic's
    POST /v1/schemas  /v1/schemas/NAME/encode  /v1/cache/prepare    cpucache's own
    GET  /v1/requests  /v1/requests/ID                              the last requests, and why one missed the cache
    GET  /  /v1/cache                                               a page to try the server; contents of the store
    GET  /v1/models  /health  /metrics                              POST /tokenize  /detokenize  /apply-template

    With -v, the log has a line for each request: its id, status, tokens by origin, and times.

    Ctrl-C ends the server: running answers get five seconds, and all evaluated state is saved.
    """
    try:
        import uvicorn

        from cpucache.server.app import create_app
        from cpucache.server.logs import JsonFormatter
        from cpucache.server.settings import ServerSettings
    except ImportError as error:
        raise CpucacheError(
            f"the server needs more packages ({error}); install them with: pip install cpucache[server]"
        ) from error
    from cpucache.engine import Engine

    local = _is_loopback(host)
    keys = api_key or tuple(filter(None, [os.environ.get("CPUCACHE_API_KEY")]))
    if not all(keys):
        raise InputError("--api-key: the key is empty; give a key")
    if isolate and not keys:
        raise InputError("--isolate needs keys to distinguish clients; give each client an --api-key")
    if not local and not keys:
        raise InputError(f"--host {host}: other machines can connect; give a key for clients with --api-key")
    hosts = (*ServerSettings.hosts, host, *allow_host) if local else ()
    settings = ServerSettings(
        api_keys=keys,
        isolate=isolate,
        hosts=tuple(name.lower() for name in hosts),
        queue=queue,
        timeout=timeout,
        max_tokens=max_tokens,
        reuse=reuse,
        sorted_tools=tool_order == "sorted",
    )
    if log_json:
        logging.getLogger("cpucache.server").setLevel(logging.INFO)
        for handler in logging.getLogger("cpucache").handlers:
            handler.setFormatter(JsonFormatter())
    with _listening(host, port) as listener, Engine(model, parallel=parallel, refine="idle", **options) as engine:
        engine.warm_up()
        app = create_app(engine, settings, parallel=parallel)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="off")
        )
        listener.listen(128)
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}"
        _say(f"{engine.model.name} answers at {url} (Ctrl-C ends)", log_json=log_json)
        # After Ctrl-C, uvicorn shuts down in order and then raises KeyboardInterrupt again.
        with suppress(KeyboardInterrupt):
            server.run([listener])
        app.state.service.close()
    _say("the server has ended; all evaluated state is saved", log_json=log_json)


def _say(text: str, *, log_json: bool) -> None:
    """Prints a line about the server, as JSON with ``--log-json``."""
    if log_json:
        logging.getLogger("cpucache.server").info("%s", text)
    else:
        err.print(text, soft_wrap=True, highlight=False)


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket. It is bound before the model is loaded, so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio sends small packets at once; else each answer would wait 40 ms for a receipt.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return listener

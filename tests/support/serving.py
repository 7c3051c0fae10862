"""The server over a tiny model, on a port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import uvicorn

from cpucache import Engine
from cpucache.server.app import create_app
from cpucache.server.service import Service
from cpucache.server.settings import ServerSettings
from tests.support.sessions import engine


@dataclass
class Served:
    """A server under way, and clients of it."""

    url: str
    engine: Engine
    service: Service
    key: str = "none"
    http: httpx.Client = field(init=False)
    # Requests are plain dictionaries in tests, which the types of neither client take.
    openai: Any = field(init=False)
    anthropic: Any = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {self.key}"})
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key=self.key, max_retries=0)

    def close(self) -> None:
        """Close the clients."""
        for client in (self.http, self.openai, self.anthropic):
            client.close()

    def idle(self) -> bool:
        """Whether nothing is being answered."""
        return not self.engine.host.core.busy


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def serving(
    model: Path, folder: Path, *, settings: ServerSettings | None = None, parallel: int = 2, **options: Any
) -> Iterator[Served]:
    """A server of its own."""
    settings = settings or ServerSettings()
    with engine(model, folder, **{"n_ctx": 2048, "parallel": parallel, **options}) as running:
        app = create_app(running, settings, parallel=parallel)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        end = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(f"http://127.0.0.1:{port}", running, app.state.service, next(iter(settings.api_keys), "none"))
        try:
            yield served
        finally:
            served.close()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

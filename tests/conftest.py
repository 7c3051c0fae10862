"""Fixtures of every test: tiny models, the real model, a store of one's own, and no network."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import PROMPT, SCHEMA
from tests.support.tiny import Arch, write_tiny

FOLDERS = Path(__file__).parent
REAL = ("e2e", "clients")
"""Folders whose tests may need the weights of SmolLM2."""
SLOWEST_FIRST = ("e2e", "exactness", "integration")
"""Folders that parallel runs begin with, so that what is left for the end is short."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks every test by its folder, and sorts the folders where tests run in parallel."""
    known = {line.partition(":")[0] for line in config.getini("markers")}
    for item in items:
        if _folder(item) in known:
            item.add_marker(_folder(item))
        if "smollm2" in getattr(item, "fixturenames", ()) and _folder(item) not in REAL:
            raise pytest.UsageError(f"{item.nodeid} needs the real model: it belongs in tests/e2e")
    if hasattr(config, "workerinput"):
        ranks = {name: rank for rank, name in enumerate(SLOWEST_FIRST)}
        items.sort(key=lambda item: ranks.get(_folder(item), len(ranks)))


def _folder(item: pytest.Item) -> str:
    """The folder in ``tests`` that a test is in."""
    return item.path.relative_to(FOLDERS).parts[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(arch, **settings_of_write_tiny)`` gives the path of such a model, written once a session."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[tuple[Any, ...], Path] = {}

    def tiny_model(arch: Arch, **settings: Any) -> Path:
        key = (arch, *sorted(settings.items()))
        if key not in written:
            written[key] = write_tiny(folder / f"{arch}-{len(written)}.gguf", arch, **settings)
        return written[key]

    return tiny_model


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    """A tiny Llama, for tests that any model does for."""
    return tiny("llama")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the shop's ``schema.xml`` and ``prompt.xml``."""
    (tmp_path / "schema.xml").write_text(SCHEMA)
    (tmp_path / "prompt.xml").write_text(PROMPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, which must have been pulled."""
    from cpucache.models import resolve_model

    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session", autouse=True)
def _no_user_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps fixtures that outlive a test off the user's store and conversations, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPUCACHE_HOME", str(tmp_path_factory.mktemp("store")))
        patch.setenv("CPUCACHE_SESSIONS", str(tmp_path_factory.mktemp("sessions")))
        yield


@pytest.fixture(autouse=True)
def store_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``CPUCACHE_HOME`` for each test, and an empty ``CPUCACHE_SESSIONS``."""
    folder = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("CPUCACHE_HOME", str(folder))
    monkeypatch.setenv("CPUCACHE_SESSIONS", str(tmp_path_factory.mktemp("sessions")))
    return folder


@pytest.fixture(autouse=True)
def _level_of_logs() -> Iterator[None]:
    """Takes back what ``--debug`` and ``-v`` of a command that ran in this process set for all that is logged."""
    logger = logging.getLogger("cpucache")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Lets tests reach servers of their own on the loopback interface, and nothing else."""

    def guarded(connect: Callable[[socket.socket, Any], Any]) -> Callable[[socket.socket, Any], Any]:
        def local_only(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                raise AssertionError(f"a test tried to reach {address[0]}:{address[1]}")
            return connect(self, address)

        return local_only

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""A server with default settings over a tiny model whose template knows tools and reasoning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import KEEPING, QWEN
from tests.support.serving import Served, serving
from tests.support.sessions import plain_spoken

Tiny = Callable[..., Path]


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    """A model that thinks as Qwen 3 does."""
    with serving(plain_spoken(tiny("llama", chat_template=QWEN)), tmp_path, n_ctx=4096) as running:
        yield running


@pytest.fixture
def keeping(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    """The same with a template that keeps what was thought."""
    with serving(plain_spoken(tiny("llama", chat_template=KEEPING)), tmp_path, n_ctx=4096) as running:
        yield running

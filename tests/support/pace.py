"""How fast an engine evaluates, for tests in which something is to happen meanwhile."""

from __future__ import annotations

import time
from typing import Any

from cpucache import Engine


def slow(running: Engine, seconds: float = 0.01) -> None:
    """Let every evaluation take longer, so that others come meanwhile."""
    evaluate = running.context.evaluate

    def slowly(*arguments: Any) -> None:
        time.sleep(seconds)
        evaluate(*arguments)

    running.context.evaluate = slowly  # type: ignore[method-assign, assignment]

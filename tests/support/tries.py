"""How many examples the tests of properties try."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

FACTOR = float(os.environ.get("CPUCACHE_EXAMPLES", "1"))
"""Factor of the number of examples: below 1 in `make check`, above 1 in `make stress`."""


def tries(examples: int, **more: Any) -> settings:
    """Settings of a property test: ``examples`` times ``FACTOR`` examples, at least one, without a deadline.

    Args:
        examples: Number of examples by default.
        more: Further settings of hypothesis.
    """
    return settings(
        max_examples=max(1, round(examples * FACTOR)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        **more,
    )

"""Settings of sampling, as callers give them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpucache.runtime import Sampling


def sampling_of(sampling: Sampling | None = None, **keywords: Any) -> Sampling:
    """``sampling``, else the greedy default, with those of its fields changed that are given and not ``None``.

    Raises ``InputError`` for values out of range, ``TypeError`` for a keyword that is no field.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    return replace(sampling or Sampling(), **given)

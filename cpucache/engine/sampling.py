"""Sampling settings from keyword arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpucache.runtime import Sampling


def sampling_of(sampling: Sampling | None = None, **keywords: Any) -> Sampling:
    """A copy of ``sampling`` (default: greedy) with its fields set to those ``keywords`` that are not ``None``.

    Raises ``InputError`` for values out of range, and ``TypeError`` for a keyword that is no field.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    return replace(sampling or Sampling(), **given)

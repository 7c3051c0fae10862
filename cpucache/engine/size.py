"""Sizes in bytes, from text such as ``2GiB``."""

from __future__ import annotations

import re

from cpucache.errors import InputError


def parse_size(text: int | str) -> int:
    """Number of bytes of an integer or of text such as ``512MiB``, ``2GiB``, ``1.5GB``. Raises ``InputError``."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise InputError(f"'{text}' is not a size; write for example 512MiB or 2GiB")
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)

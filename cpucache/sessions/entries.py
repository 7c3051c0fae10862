"""Entries of a transcript, and validation of the rows of its file."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "prompt")
_YEAR_5000 = 95_617_584_000
_DIGITS = re.compile("(?:[0-9a-f]{2})+")


@dataclass(frozen=True)
class Entry:
    """One message, as it was evaluated.

    Attributes:
        role: ``system``, ``user``, ``assistant``, or ``prompt`` for the PML prompt that a conversation began with.
        text: Text of the message.
        pieces: JSON value with the message's tokens, read by ``engine.replay``.
        left_out: Number of entries that had been left out of the llama.cpp context by then, see ``engine.leaving``.
        metrics: JSON object, for example with the number of ``tokens``.
    """

    role: str
    text: str
    pieces: Any
    left_out: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    id: int = 0
    """Id of the row in the file; 0 before the entry is written."""


class Flaw(ValueError):
    """A row that is not valid; the message says why."""


def check_path(rows: Sequence[sqlite3.Row], last: object) -> None:
    """Raises ``Flaw`` unless ``rows``, in order of id, reach from a conversation's first entry to its ``last``."""
    if last is None:
        return
    if not rows or rows[-1]["id"] != last:
        raise Flaw(f"its last entry, {last!r}, is missing")
    first, before = rows[0]["id"], rows[0]["before"]
    # An entry is written after the entry before it, so ids must grow; ids that don't may form a cycle.
    if before is not None:
        raise Flaw(f"entry {first} follows entry {before!r}, which is missing or was written later")


def check_session(row: sqlite3.Row) -> None:
    """Raises ``Flaw`` unless the row of a conversation has a name, model, fingerprint and valid times."""
    texts, times = ("name", "model", "fingerprint"), ("created", "used")
    if not all(_is_text(row[name]) for name in texts) or not all(_is_time(row[name]) for name in times):
        raise Flaw("its name, its model or its times are not valid")


def read_metrics(row: sqlite3.Row) -> tuple[str, dict[str, Any]]:
    """Returns role and metrics of a row. Raises ``Flaw``."""
    metrics = _json(row, "metrics")
    _demand(row, row["role"] in ROLES, f"has an unknown role: {row['role']!r}")
    _demand(row, isinstance(metrics, dict) and _is_count(metrics.get("tokens", 0)), "has no metrics")
    return row["role"], metrics


def read_entry(row: sqlite3.Row, index: int) -> Entry:
    """Returns the entry in a row; ``index`` is its 0-based number in the conversation. Raises ``Flaw``."""
    role, metrics = read_metrics(row)
    text, pieces, left_out, created = _text(row, "text"), _json(row, "pieces"), row["left_out"], row["created"]
    _demand(row, _are_pieces(role, pieces), "has no valid tokens")
    _demand(
        row,
        _is_count(left_out) and left_out <= index,
        f"has an impossible number of entries left out: {left_out!r} of {index}",
    )
    _demand(row, _is_time(created), f"has no valid time: {created!r}")
    return Entry(role, text, pieces, left_out, metrics, created, row["id"])


def _are_pieces(role: str, pieces: Any) -> bool:
    """Whether ``pieces`` have the form that ``engine.replay`` reads for an entry of this role."""
    if not isinstance(pieces, dict):
        return False
    if role == "prompt":
        # Earlier versions wrote segments, and spans that refer to them.
        earlier = "segments" in pieces
        parts, is_one = pieces.get("segments" if earlier else "spans"), _has_tokens if earlier else _is_slice
        known = {"role", "open", "asks", "spans"} <= pieces.keys()
        return known and isinstance(parts, list) and all(isinstance(each, dict) and is_one(each) for each in parts)
    if not _are_tokens(pieces.get("pending")):
        return False
    if role == "user" and "spans" in pieces:
        spans = pieces["spans"]
        return (
            isinstance(spans, list)
            and bool(spans)
            and all(isinstance(each, dict) and _is_slice(each) for each in spans)
        )
    parts = pieces.get("parts")
    return isinstance(parts, list) and all(_are_tokens(each) for each in parts)


def _is_slice(span: dict[str, Any]) -> bool:
    counts, digits = ("at", "count", "start", "attended_tokens"), (span.get("key"), span.get("context"))
    attends_to = span.get("attends_to")
    return (
        _has_tokens(span)
        and all(_is_count(span.get(name)) for name in counts)
        and all(isinstance(span.get(name), str) for name in ("relation", "module"))
        and isinstance(attends_to, list)
        and all(isinstance(each, str) and _DIGITS.fullmatch(each) for each in (*digits, *attends_to))
    )


def _has_tokens(part: dict[str, Any]) -> bool:
    return _are_tokens(part.get("tokens"))


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(_is_count(each) for each in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _text(row: sqlite3.Row, name: str) -> str:
    value = row[name]
    _demand(row, _is_text(value), f"has no text in '{name}'")
    return str(value)


def _is_text(value: Any) -> bool:
    try:
        # Bytes that are not UTF-8 were decoded to surrogates, which can't be encoded.
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value < _YEAR_5000


def _json(row: sqlite3.Row, name: str) -> Any:
    try:
        return json.loads(_text(row, name))
    except (ValueError, RecursionError) as error:
        raise Flaw(f"entry {row['id']}: {name}: not JSON: {error}") from error


def _demand(row: sqlite3.Row, fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise Flaw(f"entry {row['id']} {what}")

"""Entries of a transcript, and what is wrong with rows of its file that are none."""

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

    ``role``: ``system``, ``user``, ``assistant``, or ``prompt`` for the PML prompt that a conversation began with.
    ``pieces`` (JSON) and ``left_out`` are for the one who evaluates, see ``engine.session``.
    """

    role: str
    text: str
    pieces: Any
    left_out: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    id: int = 0
    """Given when it is written."""


class Flaw(ValueError):
    """What is wrong with a row."""


def check_path(rows: Sequence[sqlite3.Row], last: object) -> None:
    """Raise ``Flaw`` unless ``rows``, in order of their ids, lead from the beginning of a conversation to ``last``."""
    if last is None:
        return
    if not rows or rows[-1]["id"] != last:
        raise Flaw(f"entry {last!r}, its last, is missing")
    first, before = rows[0]["id"], rows[0]["before"]
    # An entry is written after the one before it: ids that don't grow are a cycle, or lead to one.
    if before is not None:
        raise Flaw(f"entry {first} stands behind entry {before!r}, which is missing or was written later")


def check_session(row: sqlite3.Row) -> None:
    """Raise ``Flaw`` unless the row of a conversation says what it is with, and when it was begun and used."""
    texts, times = ("name", "model", "fingerprint"), ("created", "used")
    if not all(_is_text(row[name]) for name in texts) or not all(_is_time(row[name]) for name in times):
        raise Flaw("its name, its model or its times are none")


def read_metrics(row: sqlite3.Row) -> tuple[str, dict[str, Any]]:
    """Role and metrics of a row. Raises ``Flaw``."""
    metrics = _json(row, "metrics")
    _demand(row, row["role"] in ROLES, f"has no role that there is: {row['role']!r}")
    _demand(row, isinstance(metrics, dict) and _is_count(metrics.get("tokens", 0)), "has no metrics")
    return row["role"], metrics


def read_entry(row: sqlite3.Row, index: int) -> Entry:
    """The entry in a row, which is number ``index`` of its conversation. Raises ``Flaw``."""
    role, metrics = read_metrics(row)
    text, pieces, left_out, created = _text(row, "text"), _json(row, "pieces"), row["left_out"], row["created"]
    _demand(row, _are_pieces(role, pieces), "does not say what its tokens are")
    _demand(row, _is_count(left_out) and left_out <= index, f"can't have left out {left_out!r} of {index}")
    _demand(row, _is_time(created), f"has no time: {created!r}")
    return Entry(role, text, pieces, left_out, metrics, created, row["id"])


def _are_pieces(role: str, pieces: Any) -> bool:
    """Whether ``pieces`` are what ``engine.session`` writes for an entry of this role."""
    if not isinstance(pieces, dict):
        return False
    if role == "prompt":
        # Earlier versions wrote segments, and spans of these.
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
    _demand(row, _is_text(value), f"has no text as {name}")
    return str(value)


def _is_text(value: Any) -> bool:
    try:
        # Bytes that are no UTF-8 are surrogates here.
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value < _YEAR_5000


def _json(row: sqlite3.Row, name: str) -> Any:
    try:
        return json.loads(_text(row, name))
    except (ValueError, RecursionError) as error:
        raise Flaw(f"entry {row['id']}: {name}: no JSON: {error}") from error


def _demand(row: sqlite3.Row, fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise Flaw(f"entry {row['id']} {what}")

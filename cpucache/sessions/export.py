"""Export of conversations to JSON and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from cpucache.sessions.entries import Entry
from cpucache.sessions.records import Summary

_HEADINGS = {"system": "System", "user": "You", "assistant": "Answer", "prompt": "Prompt"}


def as_json(entries: Sequence[Entry], summary: Summary) -> dict[str, Any]:
    """Conversation as a JSON object. Times are ISO 8601, in UTC."""
    return {
        "name": summary.name,
        "model": summary.model,
        "created": iso(summary.created),
        "used": iso(summary.used),
        "messages": [
            {"role": entry.role, "content": entry.text, "created": iso(entry.created), "metrics": entry.metrics}
            for entry in entries
        ],
    }


def as_markdown(entries: Sequence[Entry], summary: Summary) -> str:
    """Conversation as Markdown: each message, unescaped, under a heading."""
    parts = [f"# {summary.name}", f"With {summary.model}, begun {iso(summary.created)}."]
    for entry in entries:
        heading = _HEADINGS[entry.role]
        if entry.metrics.get("finish") == "interrupted":
            heading += " (interrupted)"
        parts += [f"## {heading}", entry.text.strip()]
    return "\n\n".join(parts) + "\n"


def iso(when: float) -> str:
    """Time, given in seconds since the epoch, as ISO 8601 in UTC."""
    return datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="seconds")

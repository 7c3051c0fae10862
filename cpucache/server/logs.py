"""Logs: one line for each request, as text or as JSON."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any

from fastapi import Request

from cpucache.server.records import Record

_log = logging.getLogger("cpucache.server")
_TOLD = (
    "prompt_tokens",
    "exact",
    "clean",
    "related",
    "foreign",
    "evaluated",
    "completion_tokens",
    "ttft_ms",
    "total_ms",
)


def log_request(request: Request, status: int, record: Record | None) -> None:
    """Logs a request that has ended: its id, path and status; with an answer, also tokens by relation and times."""
    path = request.scope["path"]
    facts: dict[str, Any] = {"id": request.state.id, "method": request.method, "path": path, "status": status}
    counts = {}
    if record is not None and record.finish != "refused":
        told = record.as_dict()
        counts = {name: told[name] for name in _TOLD}
        facts |= {"model": record.model, "finish": record.finish, **counts}
    text = "".join(f" {name}={count:g}" for name, count in counts.items())
    _log.info("%s %s %s %d%s", request.state.id, request.method, path, status, text, extra={"facts": facts})


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level and logger, then the message, or the facts of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """JSON line of a record."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "logger": record.name}
        facts = getattr(record, "facts", None)
        line |= {"message": record.getMessage()} if facts is None else facts
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)

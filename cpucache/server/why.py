"""Explanations of misses for clients: the cause, and what to change."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpucache.engine.misses import Cause, Miss
from cpucache.layout import Tokens
from cpucache.server.records import Record, Records
from cpucache.server.settings import ServerSettings

_BEFORE, _AFTER = 8, 24  # tokens shown of both texts before and after their first difference
_EVALUATED = "The text after it had to be evaluated again."
_ANYWHERE = (
    'Start the server with --reuse anywhere (or send "cpucache": {"reuse": "anywhere"}), so that known text '
    "after the difference is spliced from its slices; or have the client send "
)
_SAYS: dict[Cause, str] = {
    "nothing-known": "No earlier prompt is known.",
    "another-text": "No earlier prompt begins like this one.",
    "answer-rewritten": "An answer was sent back in another form than the model had written it: as other tokens, or "
    "with its JSON formatted differently.",
    "reasoning-left-out": "The model's reasoning before its answer is no longer in the history.",
    "tools-reordered": "The same tools were sent in another order.",
    "tools-changed": "The tools have changed.",
    "line-changed": "A line early in the prompt has changed, such as a clock, a date, a folder or a reminder.",
    "message-changed": "A message in the middle of the conversation was edited, added or left out.",
    "system-changed": "The system text has changed.",
    "evicted": "The text had slices, but they are no longer in the store.",
    "resume-points": "The model keeps a recurrent state, so evaluation can continue from a saved point only, and the "
    "last point was before the difference.",
    "cache-off": 'The request asked for no reuse ("cache_prompt": false).',
    "not-encoded": "Modules of the schema had no slices yet.",
}
_ADVICE: dict[Cause, str] = {
    "nothing-known": "Change nothing: the prompt is known now. POST /v1/cache/prepare evaluates a prompt ahead.",
    "another-text": "Change nothing: the prompt is known now. POST /v1/cache/prepare evaluates a prompt ahead.",
    "answer-rewritten": "Send the answer's text and tool calls back unchanged; the server then finds the tokens of the "
    "answer, which it keeps until it ends.",
    "reasoning-left-out": "The model's chat template leaves the reasoning out. The server evaluates the history "
    "without reasoning when it is idle after an answer: a pause before the next message is enough.",
    "tools-reordered": "Start the server with --tool-order sorted (the default), which makes their order irrelevant.",
    "evicted": "Give the store more room with --disk and --ram, or have the client mark the text to keep "
    '("cache_control": {"type": "ephemeral", "ttl": "1h"}).',
    "resume-points": "Have the client send changing text at the end of the prompt. With this model no text after a "
    "change can be spliced.",
    "cache-off": 'Leave "cache_prompt" out.',
    "not-encoded": "Encode the schema ahead: POST /v1/schemas/NAME/encode.",
}
_WHERE: dict[Cause, str] = {
    "tools-changed": "the same tools in each request.",
    "line-changed": "this line at the end of the prompt.",
    "message-changed": "the conversation unchanged, and new messages at its end.",
    "system-changed": "changing text at the end of the prompt.",
}


def told(record: Record, records: Records, settings: ServerSettings, *, movable: bool) -> dict[str, Any] | None:
    """Explains why tokens of a request were evaluated that could have been reused, as a JSON object for clients.

    Args:
        record: The request.
        records: The tenant's records, for comparison.
        settings: Options of the server, which the advice depends on.
        movable: Whether this model's slices can be spliced at another position.

    Returns:
        Cause, explanation, advice, the texts at the first difference, tokens evaluated and seconds spent on them;
        ``None`` if there is nothing to explain.
    """
    miss = records.why(record)
    if miss is None:
        return None
    known: Tokens = np.empty(0, np.int32) if miss.nearest is None else miss.nearest.tokens
    begin, end = max(0, miss.position - _BEFORE), miss.position + _AFTER
    seconds = miss.evaluated / record.rate if record.rate else 0.0
    changed = miss.cause in _WHERE or miss.cause in ("answer-rewritten", "tools-reordered")
    return {
        "cause": miss.cause,
        "says": f"{_SAYS[miss.cause]} {_EVALUATED}" if changed else _SAYS[miss.cause],
        "advice": _advice(miss, record, settings, movable=movable),
        "position": miss.position,
        "known": records.text(known[begin:end]),
        "sent": records.text(record.prompt[begin:end]),
        "evaluated": miss.evaluated,
        "seconds": round(seconds, 3),
    }


def _advice(miss: Miss, record: Record, settings: ServerSettings, *, movable: bool) -> str:
    """Returns what a client or the operator can change to avoid a miss."""
    cause = miss.cause
    if cause == "tools-reordered" and settings.sorted_tools:
        return "Send the tools in the same order: the server sorts them by name, but two of them have the same name."
    if cause not in _WHERE:
        return _ADVICE[cause]
    if not movable:
        return f"Have the client send {_WHERE[cause]} With this model no text after a change can be spliced."
    if record.reuse == "anywhere":
        return (
            f"Have the client send {_WHERE[cause]} --reuse anywhere is on already; it splices only runs of 64 known "
            "tokens or more."
        )
    return _ANYWHERE + _WHERE[cause]

"""Explanations of misses for clients: the cause, and what to change."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpucache.engine.misses import Cause, Miss
from cpucache.layout import Tokens
from cpucache.server.records import Record, Records
from cpucache.server.settings import ServerSettings

_BEFORE, _AFTER = 8, 24  # tokens shown of both texts before and after their first difference
_EVALUATED = "What comes after it had to be evaluated again."
_ANYWHERE = (
    'Start the server with --reuse anywhere (or send "cpucache": {"reuse": "anywhere"}), so that what comes '
    "after the difference is spliced from what was evaluated before; or have the client send "
)
_SAYS: dict[Cause, str] = {
    "nothing-known": "No earlier prompt is on record that this one could have been answered from.",
    "another-text": "No earlier prompt on record begins like this one: it is another text altogether.",
    "answer-rewritten": "An answer was sent back otherwise than the model had written it: other tokens, or its JSON "
    "written in another way.",
    "reasoning-left-out": "What the model had thought before its answer is not in the history any more.",
    "tools-reordered": "The same tools were sent in another order.",
    "tools-changed": "The tools are others than before.",
    "line-changed": "A line has changed that stands early in the prompt, such as a clock, a date, a folder or a "
    "reminder.",
    "message-changed": "A message in the middle of the conversation was edited, added or left out.",
    "system-changed": "The system text has changed.",
    "evicted": "The text was known, but its slices are gone from the store.",
    "resume-points": "The model keeps a recurrent state: it goes on from the points where that was saved, and the "
    "last one lay before the difference.",
    "cache-off": 'The request asked for no reuse ("cache_prompt": false).',
    "not-encoded": "Modules of the schema had no slices yet.",
}
_ADVICE: dict[Cause, str] = {
    "nothing-known": "Nothing to switch on: it is known now. POST /v1/cache/prepare evaluates a prompt ahead.",
    "another-text": "Nothing to switch on: it is known now. POST /v1/cache/prepare evaluates a prompt ahead.",
    "answer-rewritten": "Send the answer's text and tool calls back unchanged; the server then uses the tokens that it "
    "wrote itself, which it knows since it was started.",
    "reasoning-left-out": "The model's template leaves it out. The server evaluates the history without it while idle, "
    "once an answer has ended: a pause before the next message is enough.",
    "tools-reordered": "Start the server with --tool-order sorted (the default), which makes their order irrelevant.",
    "evicted": "Give the store more room with --disk and --ram, or have the client mark what is to be "
    'kept ("cache_control": {"type": "ephemeral", "ttl": "1h"}).',
    "resume-points": "Keep what changes at the end: nothing after a change can be spliced into this model.",
    "cache-off": 'Leave "cache_prompt" out.',
    "not-encoded": "Encode the schema ahead: POST /v1/schemas/NAME/encode.",
}
_WHERE: dict[Cause, str] = {
    "tools-changed": "the same tools in each request.",
    "line-changed": "it at the end of the prompt.",
    "message-changed": "the conversation as it was, and what is new at its end.",
    "system-changed": "what changes at the end of the prompt.",
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
        return "Send the tools in the same order; sorted by name they differ still, for two of them have one name."
    if cause not in _WHERE:
        return _ADVICE[cause]
    if not movable:
        return f"Have the client send {_WHERE[cause]} With this model nothing after a change can be spliced."
    if record.reuse == "anywhere":
        return (
            f"Have the client send {_WHERE[cause]} --reuse anywhere is on: what could be spliced was, and only runs of "
            "64 known tokens or more are."
        )
    return _ANYWHERE + _WHERE[cause]

"""Leaving: which turns leave a full conversation, to make room for the next one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

from cpucache.engine.host import Host
from cpucache.errors import ContextFull
from cpucache.reuse import History
from cpucache.sessions import Entry

WhenFull: TypeAlias = Literal["oldest", "half", "refuse"]
WHEN_FULL: tuple[WhenFull, ...] = ("oldest", "half", "refuse")
_log = logging.getLogger("cpucache.engine")


def make_room(
    host: Host, name: str, when_full: WhenFull, history: History, entries: Sequence[Entry], new: int, max_tokens: int
) -> None:
    """Drops the oldest turns until the next one fits with room for its answer.

    Args:
        host: Model, store and core.
        name: Name of the conversation.
        when_full: Reaction to a full llama.cpp context, see ``Engine.session``.
        history: History before the next turn, which is changed.
        entries: The transcript, which begins with the entries of the history.
        new: Number of tokens of the new message.
        max_tokens: Maximum length of the answer; the room for it is at most a quarter of the context.

    Raises:
        ContextFull: The turn does not fit, even after all turns that may leave have left.
    """
    n_ctx, known = host.context.n_ctx, host.model.n_ctx_train
    room = min(max_tokens, min(n_ctx, known) // 4)

    def fits(room: int) -> bool:
        # Cells and trained positions are two limits: gaps of left-out modules take positions, but no cells.
        return history.n_tokens + new + room <= n_ctx and history.end + new + room <= known

    # A model whose state can't be moved evaluates the rest again, so drop half of the turns at once, rarely.
    oldest = when_full == "oldest" and host.context.memory.moves
    roles = [entry.role for entry in entries[: len(history)]]
    while not fits(room):
        # A question leaves together with its answer, so an end is where no answer follows.
        ends = [
            index - history.fixed
            for index in range(history.fixed + history.left_out + 1, len(history) + 1)
            if roles[index : index + 1] != ["assistant"]
        ]
        if when_full == "refuse" or not ends:
            break
        leaving = ends[0] if oldest else ends[(len(ends) - 1) // 2]
        _log.info("session %s: its first %d messages leave the context", name, leaving)
        history.leave_out(leaving)
    if fits(room if when_full == "refuse" else 1):
        return
    where = f"a context of {n_ctx}" if n_ctx <= known else f"the {known} positions that the model was trained on"
    more = "raise --ctx (n_ctx=…)" if n_ctx < known else ""
    if when_full == "refuse":
        advice = ", or ".join(filter(None, [more, "let old turns leave (when_full='oldest')"]))
        raise ContextFull(
            f"session '{name}': {history.n_tokens} tokens of conversation and {new} new ones leave no room "
            f"for an answer in {where}; {advice}"
        )
    raise ContextFull(
        f"session '{name}': a message of {new} tokens does not fit {where}, not even when every turn before "
        f"it leaves; {' or '.join(filter(None, [more, 'shorten it']))}"
    )

"""A clock, a date, a folder or a reminder that changes early in the prompt: elsewhere all text after it is read again.

Agents send 10,000 to 25,000 tokens a turn with one such line changed.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.clients import CODING, claude_code, codex, codex_user, open_webui, user, why
from tests.support.serving import Served
from tests.support.sessions import message

BEFORE = "You work for a shop.\n\n" + "\n\n".join(f"Rule {n}: {message(n, 24)}" for n in range(5))
LINES = {
    "clock": ("Current time: 2025-03-01 10:31:07", "Current time: 2025-03-01 10:32:44"),
    "date": ("Today's date: Saturday 2025-03-01", "Today's date: Sunday 2025-03-02"),
    "folder": ("Working directory: /home/a/shop", "Working directory: /home/a/shop/src/parts"),
    "reminder": ("<system-reminder>No list.</system-reminder>", "<system-reminder>A list of 3.</system-reminder>"),
}
ASKED = user("Which rules are there? " * 12)


def system(line: str) -> str:
    return f"{BEFORE}\n{line}\n\n{CODING}"


@pytest.mark.parametrize("kind", LINES)
def test_it_is_exact_up_to_there_and_told_why(kind: str, served: Served) -> None:
    before, after = LINES[kind]
    first = claude_code(served, [ASKED], system=system(before))
    second = claude_code(served, [ASKED], system=system(after))
    # All but the segment that has the line.
    assert second.exact > 0.3 * len(BEFORE)
    assert second.evaluated > 0.5 * len(CODING)
    found = why(served, second)
    assert found is not None and found["cause"] == "line-changed"
    assert 0.5 * len(CODING) < found["evaluated"] <= second.evaluated
    assert "--reuse anywhere" in found["advice"]
    assert found["seconds"] > 0 and found["known"] != found["sent"]
    assert first.exact == 0


@pytest.mark.parametrize("kind", LINES)
def test_with_reuse_anywhere_the_rest_is_spliced(kind: str, served: Served) -> None:
    before, after = LINES[kind]
    anywhere: Any = {"cpucache": {"reuse": "anywhere"}}
    first = open_webui(served, [{"role": "system", "content": system(before)}, ASKED], **anywhere)
    second = open_webui(served, [{"role": "system", "content": system(after)}, ASKED], **anywhere)
    assert second.evaluated < 0.4 * first.size
    assert second.spliced > 0.4 * first.size
    # What was spliced is no exact hit.
    assert second.exact < len(BEFORE) + len(before)
    found = why(served, second)
    assert found is None or (found["evaluated"] < 0.4 * first.size and "anywhere is on" in found["advice"])


def test_at_the_end_of_the_prompt_it_costs_itself(served: Served) -> None:
    told = []
    for line in LINES["clock"]:
        reminder = f"<environment_context>{line}</environment_context>"
        told.append(codex(served, [codex_user("List the files."), codex_user(reminder)]))
    assert told[1].evaluated < 250
    assert told[1].exact > 0.8 * told[0].size

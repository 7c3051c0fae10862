"""Sub-agents, title and tag requests between two turns. A server with slots loses the conversation to each of them."""

from __future__ import annotations

import pytest

from tests.support.clients import claude_code, open_webui, user, why
from tests.support.serving import Served
from tests.support.sessions import message

AROUND = 90
TASKS = [
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n<chat_history>\n{}\n"
    "</chat_history>",
    "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history.\n<chat_history>\n{}\n"
    "</chat_history>",
    "### Task:\nSuggest 3-5 relevant follow-up questions.\n<chat_history>\n{}\n</chat_history>",
]


def test_titles_and_tags_of_open_webui(served: Served) -> None:
    asked = [user(message(1, 60))]
    first = open_webui(served, asked)
    for task in TASKS:
        history = "\n".join(f"{each['role']}: {each['content']}" for each in [*asked, *first.said])
        open_webui(served, [user(task.format(history))])
    second = open_webui(served, [*asked, *first.said, user("And then?")])
    assert second.evaluated < AROUND
    assert why(served, second) is None


def test_sub_agents_of_claude_code(served: Served) -> None:
    asked = [user(message(1, 60))]
    first = claude_code(served, asked)
    helpers = [
        claude_code(served, [user(message(number, 40))], system=f"You are a helper.\n{message(7, 60)}")
        for number in (2, 3, 4)
    ]
    second = claude_code(served, [*asked, *first.said, user("And then?")])
    assert second.evaluated < AROUND
    # They share their system text and their tools with one another.
    assert min(each.exact + each.spliced for each in helpers[1:]) > 0.5 * helpers[0].size
    found = why(served, helpers[0])
    assert found is not None and found["cause"] in ("another-text", "system-changed")


@pytest.mark.parametrize("count", [2, 6])
def test_conversations_take_turns(count: int, served: Served) -> None:
    """More of them than there are slots."""
    talks = [[user(message(number, 30))] for number in range(count)]
    for turn in range(2):
        told = []
        for talk in talks:
            told.append(open_webui(served, talk))
            talk += [*told[-1].said, user(f"And {turn}?")]
    assert max(each.evaluated for each in told) < AROUND

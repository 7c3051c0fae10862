"""Tools in another order, as clients send them that keep them in a set. Elsewhere all text after them is read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cpucache.server.settings import ServerSettings
from tests.support.clients import QWEN, TOOLS, open_webui, tool, user, why
from tests.support.serving import Served, serving
from tests.support.sessions import plain_spoken

Tiny = Callable[..., Path]
ASKED = [user("Which of these would you use? " * 10)]


def test_their_order_changes_nothing(served: Served) -> None:
    first = open_webui(served, ASKED, tools=TOOLS)
    second = open_webui(served, ASKED, tools=TOOLS[::-1])
    assert second.evaluated == 1
    assert second.exact == first.size - 1


def test_in_the_order_as_sent_all_text_after_them_is_evaluated(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(ServerSettings(), sorted_tools=False)
    with serving(plain_spoken(tiny("llama", chat_template=QWEN)), tmp_path, n_ctx=4096, settings=settings) as served:
        open_webui(served, ASKED, tools=TOOLS)
        second = open_webui(served, ASKED, tools=TOOLS[::-1])
        assert second.evaluated > 0.5 * len(ASKED[0]["content"])
        found = why(served, second)
        assert found is not None and found["cause"] == "tools-reordered"
        assert "--tool-order sorted" in found["advice"]


def test_another_tool_costs_itself_and_what_follows(served: Served) -> None:
    """The other definitions are spliced where they stand now."""
    first = open_webui(served, ASKED, tools=TOOLS)
    second = open_webui(served, ASKED, tools=[tool("a_new_one"), *TOOLS])
    assert second.spliced > sum(len(each["description"]) for each in TOOLS)
    assert second.exact + second.spliced < first.size
    found = why(served, second)
    assert found is not None and found["cause"] == "tools-changed"

"""Claude Code's ``x-anthropic-billing-header: …cch=…`` block, which is new in every request.

A server that renders it evaluates everything again each time: 50 s a turn where 3.7 s would do, as reported elsewhere.
"""

from __future__ import annotations

import pytest

from tests.support.clients import claude_code, counted, user, why
from tests.support.serving import Served


def test_it_is_left_out(served: Served) -> None:
    first = claude_code(served, [user("List the files.")], cch="0a1b2")
    again = claude_code(served, [user("List the files.")], cch="c3d4e")
    assert (first.exact, again.evaluated) == (0, 1)
    asked = [user("List the files."), *first.said, user("And what is in them?")]
    second = claude_code(served, asked, cch="f5061")
    # The new message, and what the template puts around it.
    assert second.evaluated < 80
    assert why(served, second) is None


@pytest.mark.parametrize("whole", ["x-anthropic-billing-header: cch={}; Be brief.", "{}: Be brief."])
def test_it_would_cost_everything(whole: str, served: Served) -> None:
    """The same line where nobody knows that it says nothing: in another dialect."""
    body = {"model": "local", "temperature": 0, "max_tokens": 4}
    told = []
    for cch in ("0a1b2", "c3d4e"):
        system = {"role": "system", "content": whole.format(cch) + "\n" + "\n".join(f"Rule {n}." for n in range(60))}
        reply = served.http.post("/v1/chat/completions", json={**body, "messages": [system, user("Hello")]})
        told.append(counted(reply.headers))
    assert told[1].evaluated > 0.9 * told[0].size
    found = why(served, told[1])
    assert found is not None and found["cause"] == "line-changed"
    assert "c3d4e" in found["sent"] and "0a1b2" in found["known"]
    assert "--reuse anywhere" in found["advice"]

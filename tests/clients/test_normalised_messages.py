"""Messages that templates do not take as they are sent: normalised, the same way each time, so that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import CODING, claude_code, open_webui, user, why
from tests.support.serving import Served, serving
from tests.support.sessions import plain_spoken

Tiny = Callable[..., Path]

STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('one system message') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that wants one system message, at the head, and knows no tools."""
AROUND = 90
SYSTEM = {"role": "system", "content": CODING}
FORMS: dict[str, list[dict[str, Any]]] = {
    "one system message": [SYSTEM],
    "several system messages": [SYSTEM, {"role": "system", "content": "Be brief."}],
    "a developer's message": [{"role": "developer", "content": CODING}],
    "a system message in the middle": [
        SYSTEM,
        user("Hi"),
        {"role": "assistant", "content": "Hello"},
        {"role": "system", "content": "The user is in a hurry."},
    ],
    "parts": [{"role": "system", "content": [{"type": "text", "text": CODING}, {"type": "text", "text": "Be brief."}]}],
}


@pytest.fixture
def strict(tiny: Tiny, tmp_path: Path) -> Any:
    with serving(plain_spoken(tiny("llama", chat_template=STRICT)), tmp_path, n_ctx=4096) as running:
        yield running


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("template", ["served", "strict"])
def test_a_conversation_goes_on(form: str, template: str, request: pytest.FixtureRequest) -> None:
    server: Served = request.getfixturevalue(template)
    asked = [*FORMS[form], user("What is new?")]
    first = open_webui(server, asked)
    second = open_webui(server, [*asked, *first.said, user("And what is old?")])
    assert second.exact >= first.size
    assert second.evaluated < AROUND
    assert why(server, second) is None


def test_text_as_parts_is_the_same_text(served: Served) -> None:
    first = open_webui(served, [SYSTEM, user("What is new?")])
    parts = [
        {**each, "content": [{"type": "text", "text": each["content"]}]} for each in (SYSTEM, user("What is new?"))
    ]
    assert open_webui(served, parts).evaluated == 1
    assert first.evaluated == first.size


def test_marks_change_nothing(served: Served) -> None:
    """``cache_control`` moves with the last message."""
    asked = [user("What is new?")]
    first = claude_code(served, asked)
    second = claude_code(served, [*asked, *first.said, user("And what is old?")])
    assert second.evaluated < AROUND
    assert why(served, second) is None


def test_reminders_of_the_system_between_messages(served: Served) -> None:
    """Claude Code tells the model of agents and skills in messages of the role ``system``, after the user's first."""
    reminder = {"role": "system", "content": f"Available agents:\n{CODING}"}
    asked = [user("What is new?"), reminder]
    adaptive: dict[str, Any] = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
    adaptive["context_management"] = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    first = claude_code(served, asked, **adaptive)
    second = claude_code(served, [*asked, *first.said, user("And what is old?")], **adaptive)
    assert second.evaluated < AROUND
    assert why(served, second) is None
    # The reminder is read, where it stands.
    assert claude_code(served, asked[:1], **adaptive).size < first.size - 100

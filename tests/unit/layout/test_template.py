"""Chat templates split into pieces: joined again, the pieces are what the template renders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.layout import ChatTemplate
from cpucache.pml.tree import RoleName
from tests.support.templates import (
    BOS,
    DEFAULT_SYSTEM,
    EOS,
    GEMMA,
    LLAMA3,
    MODERN,
    TEMPLATES,
    WITHOUT_SYSTEM,
    Conversation,
    assembled,
    rendered,
)
from tests.support.tiny import CHATML
from tests.support.tries import tries


def split(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, bos=BOS, eos=EOS)


CONTENTS = st.text("ab {}%<|>[]/#\n\u00e9", min_size=1, max_size=8).map(str.strip).filter(bool)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """system?, user, (assistant, user)*"""
    conversation: list[tuple[RoleName, str]] = [("system", draw(CONTENTS))] if draw(st.booleans()) else []
    conversation.append(("user", draw(CONTENTS)))
    for _ in range(draw(st.integers(0, 2))):
        conversation += [("assistant", draw(CONTENTS)), ("user", draw(CONTENTS))]
    return conversation


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_joined_pieces_are_what_the_template_renders(name: str) -> None:
    template = split(TEMPLATES[name])
    assert not template.plain

    @tries(40)
    @given(conversations())
    def check(conversation: Conversation) -> None:
        if name in WITHOUT_SYSTEM:
            conversation = [turn for turn in conversation if turn[0] != "system"]
        assert assembled(template, conversation) == rendered(TEMPLATES[name], conversation)

    check()


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_role_can_stand_later_in_a_text(name: str) -> None:
    """After other text, a role has its own start, and no beginning of the whole text."""
    template = split(TEMPLATES[name])
    later = {role: template.start(role, previous=None, first=False) for role in ("system", "user", "assistant")}
    whole = assembled(template, [("user", "U"), ("assistant", "A"), ("user", "V")])
    assert f"{template.end('user')}{later['assistant']}A{template.end('assistant')}{later['user']}V" in whole
    # Llama 2 begins every user turn like a text.
    assert (BOS in later["system"]) == (BOS in later["user"]) == (name == "llama 2")
    assert "Be of use." not in "".join(later.values())


# The separate pieces of some, written out, so that they can't be wrong in a way that cancels out.
PIECES = {
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_end|>\n"),
    "default system": ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_end|>\n"),
    "gemma": ("<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n", "<end_of_turn>\n", "\n\n"),
    "llama 2": ("<s>[INST] ", " [/INST]", " ", " </s>", "\n<</SYS>>\n\n"),
    "mistral": ("[INST] ", "[/INST]", " ", "</s>", "\n\n"),
    "zephyr": ("<|user|>\n", "</s>\n", "<|assistant|>\n", "</s>\n", "</s>\n"),
    "phi": ("<|user|>\n", "<|end|>\n", "<|assistant|>\n", "<|end|>\n", "<|end|>\n"),
    "trims": ("\n[USER] ", "", "\n[ASSISTANT] ", "", ""),
    "instruction": ("### Instruction:\n", "\n\n", "### Response:\n", "\n\n", "\n\n"),
    "modern": ("<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|end|>"),
    "reasoning": ("<\uff5cUser\uff5c>", "", "<\uff5cAssistant\uff5c>", "</s>", ""),
    "refuses": ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n", "\n\n"),
}


@pytest.mark.parametrize("name", PIECES)
def test_each_role_gets_what_belongs_to_it(name: str) -> None:
    template = split(TEMPLATES[name])
    user, end_user, assistant, end_assistant, end_system = PIECES[name]
    assert template.start("user", previous="assistant", first=False) == user
    assert template.end("user") == end_user
    assert template.start("assistant", previous="user", first=False) == assistant
    assert template.end("assistant") == end_assistant
    assert template.end("system") == end_system


def test_a_first_user_turn_brings_the_default_system_text() -> None:
    template = split(DEFAULT_SYSTEM)
    begin = "<|im_start|>system\nBe of use.<|im_end|>\n<|im_start|>user\n"
    assert template.start("user", previous=None, first=True) == begin
    assert template.start("system", previous=None, first=True) == "<|im_start|>system\n"


@pytest.mark.parametrize("name", ["refuses", "drops system"])
def test_system_text_that_a_template_does_not_take_heads_the_user_turn(name: str) -> None:
    template = split(TEMPLATES[name])
    text = assembled(template, [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")])
    assert text == rendered(TEMPLATES[name], [("user", "S\n\nU"), ("assistant", "A"), ("user", "V")])


def test_an_answer_to_only_a_system_text_closes_the_turn_that_holds_this_text() -> None:
    assert split(GEMMA).generation("system") == "<end_of_turn>\n<start_of_turn>model\n"
    assert split(GEMMA).generation("user") == split(GEMMA).generation(None) == "<start_of_turn>model\n"
    assert split(CHATML).generation("system") == "<|im_start|>assistant\n"


def test_a_token_that_begins_every_turn_is_no_beginning_of_the_text() -> None:
    """Some models name the token that opens their turns as the one that begins a text."""
    template = ChatTemplate(CHATML, bos="<|im_start|>", eos="<|im_end|>")
    assert template.start("system", previous="user", first=False) == "<|im_start|>system\n"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }",
        "{% unknown %}{{ messages[0].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ no_such_function() }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.role + m.content + m.content }}{% endfor %}",
        CHATML + "{{ messages[0].content }}",
        "{{ raise_exception('never') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "",
        None,
    ],
)
def test_templates_that_are_of_no_use_leave_plain_text(source: str | None) -> None:
    template = split(source)
    assert template.plain
    assert assembled(template, [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]) == "S\nU\nA\nV\n"


def test_the_date_is_the_same_every_day() -> None:
    assert "Today: 26 Jul 2024" in split(LLAMA3).start("system", previous=None, first=True)
    assert "Today: 2024-07-26" in split(MODERN).start("user", previous=None, first=True)

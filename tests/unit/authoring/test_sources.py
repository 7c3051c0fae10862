"""Schemas from Jinja templates, folders of files and recorded requests, and what is told of what they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.authoring.files import Gathered, from_files
from cpucache.authoring.jinja import Turned, from_jinja
from cpucache.authoring.messages import Repetition, from_messages
from cpucache.authoring.requests import recorded
from cpucache.authoring.writing import slug, write_schema
from cpucache.errors import InputError, PMLError
from cpucache.pml import canonical, parse_schema
from cpucache.pml.canonical import meaning
from cpucache.pml.names import flaw
from cpucache.pml.tree import Module, Parameter, Schema, Text, Union
from tests.support.compiling import text_of
from tests.support.tries import tries


def turn(source: str, folder: Path = Path("/nowhere"), **how: Any) -> Turned:
    return from_jinja(source, file="t.jinja", folder=folder, base=folder, length=8, **how)


def same(turned: Turned, inside: str, folder: Path | None = None) -> bool:
    """Whether a template is the schema with this inside, and its PML is canonical."""
    written = write_schema("t", turned.nodes, folder=folder)
    assert canonical(written, file="t.xml", folder=folder) == written
    hand = parse_schema(f'<schema name="t" xml:space="preserve">{inside}</schema>', folder=folder)
    return bool(meaning(parse_schema(written, folder=folder)) == meaning(hand))


# ---- templates -------------------------------------------------------------------------------------------------------
def test_text_conditions_and_parameters() -> None:
    turned = turn(
        "Hi {{ user.name }}, {{ tone | default('kind') }}!\n"
        "{% if vip is defined %}Dear {{ title }}{% elif n > 2 %}Many{% else %}One{% endif %}\n"
        "{% if a and not b %} <both> {% endif %}{{ 'con' ~ 'stant' }}"
    )
    assert not turned.left
    assert same(
        turned,
        'Hi <parameter name="user.name" length="8"/>, <parameter name="tone" length="8" scaffold="kind"/>!\n'
        '<union><module name="vip">Dear <parameter name="title" length="8"/></module>'
        '<module name="n-gt-2">Many</module><module name="vip-else">One</module></union>\n'
        '<module name="a-and-not-b"> &lt;both> </module>constant',
    )


def test_what_is_constant_is_unfolded() -> None:
    turned = turn(
        "{% set sizes = ['small', 'large'] %}{% for size in sizes %}{{ loop.index }} {{ size | upper }}"
        "{% if loop.last %}.{% endif %}{% endfor %}{% if false %}never{% endif %}{% block foot %}Bye{% endblock %}"
    )
    assert not turned.left
    assert same(
        turned,
        '<module name="small">1 SMALL</module><module name="large">2 LARGE.</module><module name="foot">Bye</module>',
    )


def test_includes_are_files(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "plain.txt").write_text("1 < 2\n")
    (tmp_path / "more.jinja").write_text("Hello {{ who }}")
    (tmp_path / "loop.jinja").write_text("{% include 'loop.jinja' %}")
    turned = turn(
        "{% include 'parts/plain.txt' %}{% include 'more.jinja' %}\n{% include 'none.txt' %}\n"
        "{% include 'none.txt' ignore missing %}{% include name %}\n{% include '../x' %}{% include 'loop.jinja' %}",
        tmp_path,
    )
    told = [str(left) for left in turned.left]
    assert [left.line for left in turned.left if left.file == "t.jinja"] == [2, 3, 4]
    assert any("none.txt can't be read" in each for each in told)
    assert any("../x is outside" in each for each in told)
    assert any(each.startswith("loop.jinja:1:") and "includes itself" in each for each in told)
    inside = (
        '<module name="plain.txt" src="parts/plain.txt"/>'
        '<module name="more.jinja">Hello <parameter name="who" length="8"/></module>\n\n\n<module name="loop.jinja"/>'
    )
    assert same(turned, inside, tmp_path)


def test_what_can_not_be_turned_is_told_with_its_line() -> None:
    turned = turn(
        "{{ x | tojson }}\n{% for d in docs %}{{ d }}{% endfor %}\n{% macro m() %}y{% endmacro %}\n"
        "{{ f(1) }}\n{% for m in messages %}{{ m.content }}{% endfor %}\n{% set v = w %}{{ v }}\n"
        "a\n<|im_start|>user\n{{ raise_exception('no') }}"
    )
    told = {left.line: left.what for left in turned.left}
    assert list(told) == [1, 2, 3, 4, 5, 6, 8, 9]
    for line, word in {1: "|tojson", 2: "'docs'", 3: "macro", 4: "'f'", 5: "turns", 6: "'v'", 8: "<system>"}.items():
        assert word in told[line]
    assert [node.name for node in turned.nodes if isinstance(node, Parameter)] == ["x", "docs", "f", "v"]


def test_a_broken_template_names_its_line() -> None:
    with pytest.raises(PMLError, match=r"^t\.jinja:2: not a Jinja template"):
        turn("a\n{% if %}")


WORDS = st.sampled_from(["one ", "two\n", " <three> & ", "{# not text #}", "é"])
PIECES = st.recursive(
    WORDS | st.sampled_from(["{{ p }}", "{{ q.r }}", "{{ 'c' }}"]),
    lambda inner: (
        st.builds(
            lambda test, parts, other: f"{{% if {test} %}}{''.join(parts)}{other}{{% endif %}}",
            st.sampled_from(["a", "not a", "b and a", "b != a"]),
            st.lists(inner, min_size=1, max_size=3),
            st.builds("".join, st.lists(inner, max_size=2)).map(lambda text: f"{{% else %}}{text}" if text else ""),
        )
        | st.builds(
            lambda parts: f"{{% for x in ['x', 'y'] %}}{{{{ x }}}}{''.join(parts)}{{% endfor %}}", st.lists(inner)
        )
    ),
    max_leaves=12,
)


def reading_of(scope: Schema | Module, chosen: dict[str, bool], values: dict[str, str]) -> str:
    """The text of a template's schema, each branch taken by the condition that it is named after."""
    text = ""
    for node in scope.children:
        if isinstance(node, Text):
            text += node.text
        elif isinstance(node, Parameter):
            text += values[node.name.rstrip("-0123456789")]
        elif isinstance(node, Module | Union):
            members = node.members if isinstance(node, Union) else (node,)
            for member in members:
                name = member.name.rstrip("-0123456789")
                if name in ("x", "y") or chosen[name]:
                    text += reading_of(member, chosen, values)
                    break
    return text


@tries(100)
@given(st.lists(PIECES, min_size=1, max_size=5), st.booleans(), st.booleans())
def test_a_template_reads_as_what_jinja_renders(pieces: list[str], a: bool, b: bool) -> None:
    source = "Begin " + "".join(pieces) + "."
    turned = turn(source)
    schema = parse_schema(write_schema("t", turned.nodes))
    conditions = {"a": a, "not-a": not a, "b-and-a": b and a, "b-is-not-a": b != a}
    # The name of an `else` is that of its condition.
    conditions |= {f"{name}-else": not value for name, value in conditions.items()}
    rendered = jinja2.Environment().from_string(source).render(a=a, b=b, p="P", q={"r": "R"})
    assert reading_of(schema, conditions, {"p": "P", "q.r": "R"}) == rendered


# ---- files -----------------------------------------------------------------------------------------------------------
def gather(folder: Path, *patterns: str, **how: Any) -> Gathered:
    return from_files(folder, patterns or ("**/*.md",), base=folder, **how)


def test_files_in_order_without_what_git_ignores(tmp_path: Path) -> None:
    files = {
        "b.md": "b",
        "a/z.md": "z",
        "a/c.md": "c",
        "a/out.md": "x",
        "a/deep/out.md": "x",
        "build/d.md": "x",
        "build/keep.md": "x",
        "k/out.md": "back",
        "empty.md": " \n",
        "binary.md": "x\0y",
        "note.txt": "x",
        ".git/e.md": "x",
        ".gitignore": "build/\nout.md\n",
        "k/.gitignore": "!out.md\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.md").write_bytes(b"\xe9")
    found = gather(tmp_path)
    assert [node.src for node in found.nodes] == ["a/c.md", "a/z.md", "b.md", "k/out.md"]  # type: ignore[union-attr]
    assert [node.name for node in found.nodes] == ["a-c.md", "a-z.md", "b.md", "k-out.md"]  # type: ignore[union-attr]
    assert found.left == {
        "binary.md": "is not a text: it contains U+0000",
        "empty.md": "is empty",
        "latin.md": "is not UTF-8 text",
    }
    # A folder of a repository is ignored by what lies above it as well.
    assert [node.src for node in gather(tmp_path / "a").nodes] == ["c.md", "z.md"]  # type: ignore[union-attr]
    schema = parse_schema(write_schema("s", found.nodes, folder=tmp_path), folder=tmp_path)
    assert [module.children[0].text for module in schema.children] == ["c", "z", "b", "back"]  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"no file matches \*\.rst"):
        gather(tmp_path, "*.rst")


def test_a_budget_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    for name, size in {"a": 5, "b": 6, "c": 3, "d": 3}.items():
        (tmp_path / f"{name}.md").write_text("x" * size)
    found = gather(tmp_path, budget=11, count=len)
    assert found.tokens == {"a.md": 5, "b.md": 6}
    assert found.left == dict.fromkeys(("c.md", "d.md"), "has 3 tokens; 0 of the budget are left")
    assert gather(tmp_path, budget=9, count=len).tokens == {"a.md": 5, "c.md": 3}


def test_a_link_out_of_the_folder_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.md").write_text("secret")
    (tmp_path / "in" / "a.md").write_text("a")
    (tmp_path / "in" / "b.md").symlink_to(tmp_path / "secret.md")
    assert gather(tmp_path / "in").left == {"b.md": "is outside the schema's folder"}


# ---- recorded requests -----------------------------------------------------------------------------------------------
RULES = "You answer for a shop.\n\nBe polite & brief, always."
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks up", "parameters": {"type": "object"}},
}
CLAUDE_TOOL = {"name": "look_up", "description": "Looks up", "input_schema": {"type": "object"}}


def openai(question: str, day: int = 0) -> dict[str, Any]:
    system = f"{RULES}\n\nIt is day {day}."
    return {"tools": [TOOL], "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}


def anthropic(question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    return {"system": [{"type": "text", "text": RULES}], "tools": [CLAUDE_TOOL], "messages": messages}


def repeated(folder: Path, *requests: Any, least: int = 2) -> Repetition:
    (folder / "r.json").write_text(json.dumps(requests))
    return from_messages(recorded(folder / "r.json"), len, least=least)


def test_what_repeats_is_found_in_both_forms(tmp_path: Path) -> None:
    found = repeated(tmp_path, openai("What is there?", 1), openai("And now?", 2), anthropic("Hm?"))
    assert [(module.name, module.role, module.times) for module in found.modules] == [
        ("tool-look_up", "system", 3),
        ("you-answer-for-a-shop", "system", 3),
    ]
    written = write_schema("m", found.nodes)
    assert canonical(written, file="m.xml") == written
    prompt = '<prompt schema="m"><tool-look_up/><you-answer-for-a-shop/></prompt>'
    assert text_of(prompt, written) == f"⟨system⟩{json.dumps(TOOL)}\n{RULES}\n⟨/⟩"
    # Two of three times it need not have been evaluated.
    assert found.saved == sum(2 * module.tokens for module in found.modules) < found.tokens


def test_earlier_turns_are_no_modules(tmp_path: Path) -> None:
    first = openai("A long enough question about nothing?")
    answer = {"role": "assistant", "content": "A long enough answer to that."}
    more = {"role": "user", "content": "Another long enough question?"}
    second = {**first, "messages": [*first["messages"], answer, more]}
    one = repeated(tmp_path, first, second)
    assert (one.requests, one.conversations) == (2, 1)
    assert {module.role for module in one.modules} == {"system"}
    both = repeated(tmp_path, first, second, openai("A long enough question about nothing?", 5))
    assert both.conversations == 2
    assert {module.role for module in both.modules} == {"system", "user"}


def test_how_logs_keep_requests(tmp_path: Path) -> None:
    one, two = openai("a"), openai("b")
    (tmp_path / "log.jsonl").write_text(
        "\n".join(
            json.dumps(each) for each in ({"time": 1, "request": one}, {"body": json.dumps(two)}, two["messages"])
        )
    )
    assert [each.where.rpartition(":")[2] for each in recorded(tmp_path / "log.jsonl")] == ["1", "2", "3"]
    for text, wrong in {
        "{": "not JSON",
        '{"a": 1}': "it contains no request",
        '{"messages": [5]}': r"messages\[0\]",
    }.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=rf"bad\.json.*{wrong}"):
            recorded(tmp_path / "bad.json")
    with pytest.raises(InputError, match="no text of 20 characters or more occurs in 3"):
        repeated(tmp_path, one, {"messages": [{"role": "user", "content": "x" * 30}]}, least=3)


@tries(100)
@given(st.text(max_size=200), st.sampled_from(["if", "case"]), st.booleans())
def test_any_text_gives_a_name(text: str, otherwise: str, tag: bool) -> None:
    name = slug(text, otherwise=otherwise, tag=tag)
    assert flaw(name, as_tag=tag, as_attribute=not tag) is None
    assert slug(text, otherwise=otherwise, tag=tag) == name

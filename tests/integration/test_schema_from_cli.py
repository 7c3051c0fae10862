"""``schema from-jinja``, ``from-files``, ``from-messages`` and ``@cpucache.prompt`` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest

from cpucache import Engine, MaxTokens, Sampling, prompt, system, user
from tests.support.command import cpucache

pytestmark = pytest.mark.usefixtures("folder")

TEMPLATE = "You are {{ who | default('Ann') }}.\n{% if short %}Be short.{% endif %}\n{{ rows | join(', ') }}\n"


def is_fine(*files: str) -> bool:
    """Whether files pass ``schema check``, and ``schema fmt`` leaves them as they are."""
    checked, formatted = cpucache("schema", "check", *files), cpucache("schema", "fmt", "--check", *files)
    return (checked.status, formatted.status) == (0, 0)


def test_from_jinja(folder: Path) -> None:
    (folder / "t.jinja").write_text(TEMPLATE)

    shown = cpucache("schema", "from-jinja", "t.jinja", "--length", "4")
    piped = cpucache("schema", "from-jinja", "-", "--length", "4", "--name", "t", stdin=TEMPLATE)
    written = cpucache("schema", "from-jinja", "t.jinja", "--length", "4", "-o", "t.xml")

    assert (shown.status, written.status, written.out) == (0, 0, "")
    assert shown.out == piped.out == (folder / "t.xml").read_text()
    assert '<parameter name="who" length="4" scaffold="Ann"/>' in shown.out
    assert shown.err == written.err
    assert shown.err.splitlines() == ["t.jinja:3: |join is not applied to the argument 'rows': pass the filtered text"]
    assert is_fine("t.xml")


def test_from_jinja_says_what_is_wrong(folder: Path) -> None:
    (folder / "bad.jinja").write_text("fine\n{{ }}")
    broken = cpucache("schema", "from-jinja", "bad.jinja")
    missing = cpucache("schema", "from-jinja", "none.jinja")
    name = cpucache("schema", "from-jinja", "-", "--name", "a b", stdin="x")
    empty = cpucache("schema", "from-jinja", "-", stdin="{# nothing #}")
    assert {each.status for each in (broken, missing, name, empty)} == {2}
    assert broken.err.startswith("cpucache: bad.jinja:2: not a Jinja template")
    assert missing.err == "cpucache: none.jinja: No such file or directory\n"
    assert "--name 'a b'" in name.err
    assert "is empty" in empty.err
    assert not broken.out


def test_from_files(model: Path, folder: Path) -> None:
    docs = folder / "docs"
    (docs / "more").mkdir(parents=True)
    for name, text in {"b.md": "x " * 9, "a.md": "one", "more/c.md": "two & <three>", "skip.md": "no"}.items():
        (docs / name).write_text(text)
    (docs / ".gitignore").write_text("skip.md\n")

    shown = cpucache("schema", "from-files", "docs", "--glob", "**/*.md")
    written = cpucache("schema", "from-files", "docs", "--glob", "**/*.md", "-o", "docs/s.xml", "-m", model)
    again = cpucache("schema", "from-files", "docs", "-o", "docs/s.xml", "--glob", "**/*.md", "--glob", "*.xml")
    spare = cpucache("schema", "from-files", "docs", "--glob", "**/*.md", "-m", model, "--budget", "15", "--name", "x")
    outside = cpucache("schema", "from-files", "docs", "-o", "docs/more/s.xml")
    budget = cpucache("schema", "from-files", "docs", "--budget", "9")

    assert shown.out == (
        '<schema name="docs">\n  <module name="a.md" src="docs/a.md"/>\n  <module name="b.md" src="docs/b.md"/>\n'
        '  <module name="more-c.md" src="docs/more/c.md"/>\n</schema>\n'
    )
    assert shown.err == "3 files\n"
    assert (written.status, again.status) == (0, 0)
    assert (docs / "s.xml").read_text() == shown.out.replace("docs/", "")
    assert is_fine("docs/s.xml")
    assert 'name="b.md"' not in spare.out
    assert "left out: b.md: " in spare.err
    assert spare.err.splitlines()[-1].startswith("2 files, ")
    assert outside.status == budget.status == 2
    assert "write it to docs/s.xml" in outside.err
    assert "--budget needs -m" in budget.err


def test_from_messages(model: Path, folder: Path) -> None:
    rules = "You answer for a shop, politely.\n\nYou never promise anything."
    requests = [
        {"messages": [{"role": "system", "content": f"{rules}\n\nDay {day}"}, {"role": "user", "content": f"{day}?"}]}
        for day in range(3)
    ]
    (folder / "log").mkdir()
    for number, request in enumerate(requests):
        (folder / "log" / f"{number}.json").write_text(json.dumps(request))

    about = cpucache("schema", "from-messages", "log", COLUMNS="90")
    done = cpucache("schema", "from-messages", "log/0.json", "log/1.json", "log", "-m", model, "-o", "m.xml")
    nothing = cpucache("schema", "from-messages", "log/0.json")

    assert (about.status, done.status, nothing.status) == (0, 0, 2)
    assert about.out == (folder / "m.xml").read_text()
    assert about.out == (
        '<schema name="messages">\n  <system>\n    <module name="you-answer-for-a-shop">'
        f"{rules}\n    </module>\n  </system>\n</schema>\n"
    )
    assert about.err.splitlines()[-1].startswith("3 requests: about ")
    assert "about" not in done.err
    assert "would not have been evaluated again" in done.err
    assert is_fine("m.xml")
    assert nothing.err.startswith("cpucache: no text of")


@prompt
def shop(name: Annotated[str, MaxTokens(8)] = "Ann", summer: bool = True) -> None:
    with system():
        "You answer for a shop."
        if summer:
            "There is ice cream."
        else:
            "There is soup."
    with user():
        f"I am {name}."


def test_the_engine_takes_a_function(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with Engine(tiny("llama"), store=tmp_path / "store") as engine:
        layout = engine.add_schema(shop)
        engine.encode("shop")
        by_function = engine.generate(shop("Bo", summer=False), max_tokens=4, sampling=Sampling(temperature=0))
        assert by_function.metrics.cached_tokens
        # The same schema as PML finds the same slices: nothing is evaluated again.
        (tmp_path / "shop.xml").write_text(shop.schema())
        assert engine.add_schema(tmp_path / "shop.xml").length == layout.length
        assert engine.encode("shop").tokens == 0
        by_file = engine.generate(shop("Bo", summer=False), max_tokens=4, sampling=Sampling(temperature=0))
        assert by_file.text == by_function.text

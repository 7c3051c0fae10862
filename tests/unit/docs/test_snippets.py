"""Snippets of the documentation are what they say: commands with options that there are, and documents that parse."""

from __future__ import annotations

import ast
import json
import sys
from contextlib import suppress
from pathlib import Path

import click
import pytest

from cpucache.cli.main import cli
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.canonical import parse_pml
from cpucache.pml.tree import Prompt, Schema
from tests.support.pages import DOCS, PAGES, Snippet, snippets

SHELL = [snippet for page in PAGES for snippet in snippets(page, "sh")]


def check(words: list[str]) -> None:
    """Parse the arguments of ``cpucache`` as the command does, without running it."""
    with suppress(click.exceptions.Exit):  # --version and --help
        context = cli.make_context("cpucache", words[1:])
        while isinstance(context.command, click.Group):
            rest = [*getattr(context, "_protected_args", ()), *context.args]
            name, command, rest = context.command.resolve_command(context, rest)
            assert command is not None, words
            context = command.make_context(name, rest, parent=context)


def test_there_are_snippets() -> None:
    commands = [words for snippet in SHELL for words in snippet.commands if words[0] == "cpucache"]
    assert len(commands) > 60
    assert len({tuple(words[:2]) for words in commands}) >= 14


@pytest.mark.parametrize("snippet", SHELL, ids=str)
def test_commands_and_options_exist(snippet: Snippet) -> None:
    for words in snippet.commands:
        if words[0] == "cpucache":
            try:
                check(words)
            except click.UsageError as error:
                pytest.fail(f"{snippet}: {' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("words", [["cpucache", "no-such"], ["cpucache", "run", "x", "--no-such"], ["cpucache", "run"]])
def test_the_check_finds_mistakes(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        check(words)


@pytest.mark.parametrize("snippet", [each for page in PAGES for each in snippets(page, "xml")], ids=str)
def test_pml_parses(snippet: Snippet, tmp_path: Path) -> None:
    for other in snippets(snippet.page):
        (tmp_path / Path(other.title or "none").name).write_text(other.text)
    assert isinstance(parse_pml(snippet.text, file=str(snippet), folder=tmp_path), Schema | Prompt)


def test_the_prompt_of_the_language_page_fits_its_schema() -> None:
    schema, prompt = snippets(DOCS / "pml.md", "xml")
    parsed = parse_schema(schema.text)
    assert isinstance(parsed, Schema)
    assert resolve(parse_prompt(prompt.text), parsed).items


@pytest.mark.parametrize("snippet", [each for page in PAGES for each in snippets(page, "json", "toml")], ids=str)
def test_settings_parse(snippet: Snippet) -> None:
    if snippet.language == "json":
        assert json.loads(snippet.text)
    elif sys.version_info >= (3, 11):
        import tomllib

        assert tomllib.loads(snippet.text)


@pytest.mark.parametrize("snippet", [each for page in PAGES for each in snippets(page, "python")], ids=str)
def test_python_compiles(snippet: Snippet) -> None:
    tree = ast.parse(snippet.text, str(snippet))
    compile(tree, str(snippet), "exec")
    assert tree.body, "a snippet that runs nothing"


def test_every_language_is_looked_at() -> None:
    known = {"sh", "xml", "json", "toml", "python", "text", ""}
    assert {each.language for page in PAGES for each in snippets(page)} <= known

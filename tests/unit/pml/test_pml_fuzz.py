"""Hostile and broken documents, and what comes of changing them: trees or ``PMLError``, in short time and few words."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.errors import PMLError
from cpucache.pml import Limits, parse_prompt, parse_schema, resolve
from cpucache.pml.tree import Prompt, Schema
from tests.support.documents import CORPUS, changed
from tests.support.kitchen import PROMPT, SCHEMA
from tests.support.tries import tries

PATIENCE = 10
"""Seconds of CPU time for one document, on however slow a machine: most take a millisecond."""


def checked(data: bytes, folder: Path) -> list[Schema | Prompt]:
    """What a document whose writer can't be trusted is taken for, when everything is done with it."""
    begun = time.process_time()
    found: list[Schema | Prompt] = []
    for parse in (lambda: parse_schema(data, folder=folder), lambda: parse_prompt(data)):
        try:
            found.append(parse())
        except PMLError as error:
            for each in (error, *error.others):
                assert len(str(each).splitlines()) == 1
                assert len(str(each)) < 1000
                assert str(each).isprintable()
    kitchen = parse_schema(SCHEMA)
    for tree in found:
        try:
            resolve(tree, kitchen) if isinstance(tree, Prompt) else resolve(parse_prompt(PROMPT), tree)
        except PMLError as error:
            assert len(str(error)) < 1000
    assert time.process_time() - begun < PATIENCE
    return found


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_is_refused_or_taken(path: Path, tmp_path: Path) -> None:
    checked(path.read_bytes(), tmp_path)
    with pytest.raises(PMLError):
        parse_schema(path.read_bytes(), folder=tmp_path)


@tries(300)
@given(st.composite(changed)())
def test_a_changed_document_gives_one_tree_or_a_pml_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    found = checked(data, tmp_path_factory.getbasetemp())
    assert len(found) <= 1, "no document is both a schema and a prompt"


@tries(200)
@given(st.composite(changed)(), st.integers(0, 300), st.integers(0, 6), st.integers(0, 3))
def test_no_limit_is_passed(data: bytes, size: int, tags: int, depth: int) -> None:
    try:
        parse_schema(data, limits=Limits(document=size, tags=tags, depth=depth))
    except PMLError:
        return
    assert len(data) <= size
    assert tags > 0 and depth > 0

"""Documents that are too large, too many, or no files at all: refused at once, in one sentence."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cpucache.errors import PMLError
from cpucache.pml import Limits, load_prompt, load_schema, parse_prompt, parse_schema, resolve
from cpucache.pml.names import hint

PATIENCE = 20
"""Seconds of CPU time that nothing here takes, on however slow a machine: what each test guards against took longer."""


@pytest.fixture(autouse=True)
def _in_time() -> object:
    begun = time.process_time()
    yield
    assert time.process_time() - begun < PATIENCE


def refused(parse: Callable[[], object]) -> str:
    with pytest.raises(PMLError) as caught:
        parse()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def modules(count: int, name: str = "m") -> str:
    return "".join(f"<module name='{name}{index}'/>" for index in range(count))


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """Two gigabytes that take no room on the disk."""
    return sparse(tmp_path / "huge.txt", 2 << 30)


def test_a_huge_file_is_refused_before_it_is_read(huge: Path) -> None:
    tracemalloc.start()
    try:
        by_src = refused(
            lambda: parse_schema("<schema name='s'>\n<module name='m' src='huge.txt'/></schema>", folder=huge.parent)
        )
        as_schema = refused(lambda: load_schema(huge))
        as_prompt = refused(lambda: load_prompt(huge))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert most < 1 << 20
    assert by_src.startswith("<schema>:2: src='huge.txt' has more than the maximum of 16,777,216 bytes")
    assert as_schema.startswith(f"{huge}: has more than the maximum of 16,777,216 bytes")
    assert "src files" in as_schema
    assert as_prompt.startswith(f"{huge}: has more than")


def test_src_files_have_a_limit_together(tmp_path: Path) -> None:
    sparse(tmp_path / "part.txt", 100)
    source = (
        "<schema name='s'>" + "".join(f"\n<module name='m{index}' src='part.txt'/>" for index in range(3)) + "</schema>"
    )

    assert parse_schema(source, folder=tmp_path, limits=Limits(source=100, sources=300))
    assert "<schema>:4: src='part.txt' brings all src files to more than 299 bytes" in refused(
        lambda: parse_schema(source, folder=tmp_path, limits=Limits(source=100, sources=299))
    )
    assert "more than the maximum of 99 bytes" in refused(
        lambda: parse_schema(source, folder=tmp_path, limits=Limits(source=99))
    )


def test_every_limit_holds_where_it_says(tmp_path: Path) -> None:
    source = "<schema name='s'><!-- c --><module name='m' cache='true'><![CDATA[<a><b>]]></module></schema>"
    fits = Limits(document=len(source), tags=4, attributes=2, depth=2)
    (tmp_path / "s.xml").write_text(source)

    assert parse_schema(source, limits=fits)
    assert load_schema(tmp_path / "s.xml", limits=fits)
    for limits, words in (
        (Limits(document=len(source) - 1), f"more than the maximum of {len(source) - 1} bytes"),
        (Limits(tags=3), "more than 3 tags"),
        (Limits(attributes=1), "<module> has more than 1 attributes"),
        (Limits(depth=1), "nested more than 1 deep"),
    ):
        assert words in refused(partial(parse_schema, source, limits=limits))
    assert "more than the maximum of 5 bytes" in refused(
        lambda: load_schema(tmp_path / "s.xml", limits=Limits(document=5))
    )
    assert "more than 1 tags" in refused(
        lambda: parse_prompt("<prompt schema='s'><a/></prompt>", limits=Limits(tags=1))
    )


def test_bytes_are_counted_and_not_characters() -> None:
    source = f"<schema name='s'>{'é' * 100}</schema>"
    assert "bytes" in refused(lambda: parse_schema(source, limits=Limits(document=len(source) + 50)))


@pytest.mark.parametrize("parse", [load_schema, load_prompt])
def test_what_is_no_file_is_refused_at_once(parse: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "not a regular file" in refused(partial(parse, path))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (f"<schema name='s'>{modules(700_000)}</schema>", "more than 100,000 tags"),
        (f"<schema name='s'>{'<!---->' * 2_000_000}</schema>", "more than 100,000 tags and comments"),
        ("<schema name='s'>" + "<!--" * 4_000_000, "Double hyphen within comment"),
        ("<schema name='s'>" + "<![CDATA[" * 1_500_000, "CData section too big"),
        ("<schema name='s'>" + "<a>" * 90_000, "nested too deep"),
        ("<" * 16_000_000, "more than 100,000 tags"),
        ("<?xml " + "a" * 15_000_000, "the declaration <?xml ...?>"),
        ("<schema " + " ".join(f"a{index}=''" for index in range(1_200_000)) + "/>", "more than 10 million characters"),
        (f"<schema name='s'>{'<?a?>' * 300_000}</schema>", "the processing instruction <?a ...?>"),
    ],
    ids=[
        "modules",
        "comments",
        "open comments",
        "open cdata",
        "depth",
        "brackets",
        "declaration",
        "attributes",
        "targets",
    ],
)
def test_floods_are_refused_in_time(source: str, words: str) -> None:
    assert words in refused(lambda: parse_schema(source))


def test_many_modules_are_taken_in_time() -> None:
    scaffolds = "".join(f"<scaffold modules='m{index} m{index + 1}'/>" for index in range(40_000))
    assert len(parse_schema(f"<schema name='s'>x{modules(50_000)}{scaffolds}</schema>").scaffolds) == 40_000


def test_paths_of_deep_modules_are_not_all_built() -> None:
    opened = f"<module name='{'n' * 90}'>" * 90
    inside = f"{opened}{modules(10_000)}{'</module>' * 90}"
    source = f"<schema name='s'>{inside}<scaffold modules='a b'/></schema>"
    tracemalloc.start()
    try:
        assert "no module 'a'" in refused(lambda: parse_schema(source))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 60 << 20


def test_a_typo_against_many_names_is_told_in_time() -> None:
    schema = parse_schema(f"<schema name='s'>{modules(90_000)}</schema>")
    typos = parse_prompt(f"<prompt schema='s'>{''.join(f'<n{index}/>' for index in range(50))}</prompt>")

    assert "there is no module 'n0'" in refused(lambda: resolve(typos, schema))
    assert hint("m17O", (f"m{index}" for index in range(10**6))).startswith("; did you mean 'm17'")
    assert hint("zz", (f"m{index}" for index in range(10**6))).endswith("and many more)")
    assert hint("ab" * 45 + "x", ["ba" * 48] * 10**5)

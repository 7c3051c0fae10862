"""What a repository needs besides code: links that resolve, one version, tables that say what was measured."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import cpucache
from tests.support.pages import DOCS, PAGES, ROOT, anchors, links

ELSEWHERE = ("contributing.md", "changelog.md", "results.md")
"""Pages of the site that stand elsewhere in the repository, see scripts/docs_hooks.py."""


@pytest.mark.parametrize("page", [*PAGES, ROOT / "bench" / "RESULTS.md"], ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        if page.parent == DOCS and name.startswith("plots/"):
            continue  # drawn when the site is built
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"(\w[\w-]*\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted([*(page.name for page in DOCS.glob("*.md")), *ELSEWHERE])


def test_the_version_is_written_once() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == cpucache.__version__


def test_tables_say_what_was_measured() -> None:
    report = runpy.run_path(str(ROOT / "bench" / "report.py"))
    assert len(report["PAGES"]) >= 3
    for page in report["PAGES"]:
        text = page.read_text(encoding="utf-8")
        assert "<!-- table " in text, page
        assert report["filled"](text) == text, f"{page}: run `python bench/report.py`"


def test_the_page_of_all_commands_has_each_of_them() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "docs_commands.py"))["helps"]()
    headings = re.findall(r"^#+ (cpucache.*)$", page, re.MULTILINE)
    assert {"cpucache", "cpucache run", "cpucache cache export", "cpucache schema check"} <= set(headings)
    assert len(headings) == len(set(headings)) == page.count("Usage: ") > 30
    assert "--max-tokens" in page


def test_the_readme_is_one_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 70
    assert "make demo" in text
    assert "make test" in text


def test_pages_name_no_folder_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:home|work|root|Users)/", page.read_text(encoding="utf-8")), page

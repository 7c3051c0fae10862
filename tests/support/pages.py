"""The pages of the documentation: their snippets, links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
]
_FENCE = re.compile(
    r"^(?P<marks>`{3,})(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^(?P=marks)$",
    re.DOTALL | re.MULTILINE,
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    """The name of the file that it is, if it is one."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each line of a shell snippet, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def snippets(page: Path, *languages: str) -> list[Snippet]:
    """The snippets of a page in these languages, in order; all of them if none is named."""
    text = page.read_text(encoding="utf-8")
    found = [
        Snippet(page, text.count("\n", 0, match.start()) + 1, match["language"], match["title"] or "", match["text"])
        for match in _FENCE.finditer(text)
    ]
    return [each for each in found if not languages or each.language in languages]


def links(page: Path) -> list[str]:
    """The targets of all links and images of a page."""
    return _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}

"""Hooks of MkDocs (``hooks`` in mkdocs.yml), which add pages, help and plots from outside docs/ to the site.

Pages that people look for at the root of the repository stay there, and the site has them too. Each build writes the
help of every command, and plots of bench/results/.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from docs_commands import helps  # noqa: E402
from docs_plots import plots  # noqa: E402

PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "results.md": "bench/RESULTS.md"}
"""Pages of the site that are outside docs/, each with its path in the repository."""
_COMMANDS = "<!-- commands -->"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and plots that are not in docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, drawing in plots().items():
        files.append(File.generated(config, f"plots/{name}.svg", content=drawing))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Converts a page of the repository into a page of the site: its links, and the help of the commands."""
    folder = Path(PAGES.get(page.file.src_uri, "docs/page.md")).parent
    return with_links_of_the_site(markdown, folder).replace(_COMMANDS, helps())


def with_links_of_the_site(text: str, folder: Path) -> str:
    """Returns a page with links between pages of the site. Links to other files become their paths.

    Args:
        text: Markdown of the page.
        folder: Folder of the page, relative to the root of the repository.
    """
    pages = {source: page for page, source in PAGES.items()}

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        source = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
        page = pages.get(source) or (source.removeprefix("docs/") if source.startswith("docs/") else "")
        if not page:
            return words if source in words else f"{words} (`{source}`)"
        return f"[{words}]({page}{mark}{anchor})"

    return _LINK.sub(link, text)

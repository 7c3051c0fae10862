"""Writes the tables of bench/RESULTS.md and of the pages in docs/ from the raw results in bench/results/.

    python bench/report.py            write the tables
    python bench/report.py --check    exit 1 if the tables differ from the results

A table is the text between ``<!-- table NAME -->`` and ``<!-- end -->``. NAME.json is the output of a benchmark with
``--json``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from cpucache.bench.report import table as markdown

HERE = Path(__file__).parent
_DOCS = HERE.parent / "docs"
PAGES = (HERE / "RESULTS.md", _DOCS / "benchmarks.md", _DOCS / "fidelity.md")
_TABLE = re.compile(r"(<!-- table (?P<name>\S+?)(?P<short> short)? -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Returns a page with its tables written from the results."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((HERE / "results" / f"{match['name']}.json").read_text(encoding="utf-8"))
        lines = markdown(result, short=bool(match["short"]))
        return "\n".join([match[1].rstrip("\n"), *lines, match[4]])

    return _TABLE.sub(table, text)


def main() -> int:
    """Writes the tables, or with ``--check`` compares them. Returns the exit status."""
    check = sys.argv[1:] == ["--check"]
    stale = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    if check and stale:
        print(f"not what bench/results/ says: {', '.join(stale)}; run `python bench/report.py`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the grammars of PML in RELAX NG's compact syntax, which Emacs reads.

Run it when a ``.rng`` file of ``cpucache/pml/grammar`` has changed, as ``compact_grammar.py COMMAND...``, where
COMMAND runs Trang (https://relaxng.org/jclark/trang.html), such as ``java -jar trang.jar``.
"""

from __future__ import annotations

import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

GRAMMARS = Path(__file__).resolve().parent.parent / "cpucache" / "pml" / "grammar"


def heading(grammar: Path) -> str:
    """The first line of a compact grammar, which names the version of ``grammar`` that it was made of."""
    digest = blake2b(grammar.read_bytes(), digest_size=8).hexdigest()
    return f"# Made of {grammar.name} ({digest}) by scripts/compact_grammar.py.\n"


def main(trang: list[str]) -> None:
    """Write a compact grammar beside each grammar."""
    for grammar in sorted(GRAMMARS.glob("*.rng")):
        compact = grammar.with_suffix(".rnc")
        subprocess.run([*trang, str(grammar), str(compact)], check=True)
        compact.write_text(heading(grammar) + compact.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or ["trang"])

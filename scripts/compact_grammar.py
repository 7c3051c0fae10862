"""Writes the grammars of PML in RELAX NG's compact syntax, which Emacs reads.

Run ``compact_grammar.py COMMAND...`` after a change to a ``.rng`` file in ``cpucache/pml/grammar``. COMMAND runs Trang
(https://relaxng.org/jclark/trang.html), for example ``java -jar trang.jar``; the default is ``trang``.
"""

from __future__ import annotations

import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

GRAMMARS = Path(__file__).resolve().parent.parent / "cpucache" / "pml" / "grammar"


def heading(grammar: Path) -> str:
    """Returns the first line of a compact grammar: the name and a hash of ``grammar``, its source."""
    digest = blake2b(grammar.read_bytes(), digest_size=8).hexdigest()
    return f"# Made of {grammar.name} ({digest}) by scripts/compact_grammar.py.\n"


def main(trang: list[str]) -> None:
    """Writes a compact grammar next to each grammar. ``trang``: command that runs Trang."""
    for grammar in sorted(GRAMMARS.glob("*.rng")):
        compact = grammar.with_suffix(".rnc")
        subprocess.run([*trang, str(grammar), str(compact)], check=True)
        compact.write_text(heading(grammar) + compact.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or ["trang"])

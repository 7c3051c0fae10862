"""Rough treatment at full size: processes killed again and again, bits flipped, one small store for many processes.

What takes a quarter of an hour. ``make stress`` runs it; ``make test`` runs the short versions, which are in
``integration/test_store_in_trouble.py`` and ``integration/test_session_processes.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("script", ["store_stress", "session_stress"])
def test_nothing_comes_of_it(script: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCH / f"{script}.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "nothing is wrong" in done.stdout

"""What a model's memory can do, by architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpucache.runtime import Memory
from tests.support.tiny import ARCHS, RECURRENT_ARCHS, WINDOW_ARCHS
from tests.support.workbench import opened


@pytest.mark.parametrize("arch", ARCHS)
def test_each_architecture(arch: str, tiny: Callable[..., Path]) -> None:
    with opened(tiny(arch)) as context:
        memory = context.memory
    recurrent = arch in RECURRENT_ARCHS
    assert memory == Memory(moves=not recurrent, points=recurrent, window=16 if arch in WINDOW_ARCHS else 0)
    assert memory.cuts != recurrent
    assert memory.fixed == ("keeps a recurrent state" if recurrent else "")


def test_cells_that_cannot_be_moved_can_be_cut() -> None:
    memory = Memory(moves=False)
    assert memory.cuts
    assert "absolute positions" in memory.fixed

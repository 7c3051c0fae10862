"""Disturb a store, and check that no slice is lost and no answer is wrong.

Processes are killed while they save, bits of slice files are flipped, and many processes share a store whose budget is
too small for their slices. Run it in the root folder of the repository: `python bench/store_stress.py` (about six
minutes). The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support import stress
from tests.support.tiny import write_tiny

Rows = Iterable[tuple[str, object]]


def crash(model: Path, folder: Path, kills: int, budget: int) -> tuple[Rows, list[str]]:
    """Kills processes at random moments of encoding and saving, and of evicting if the budget is small.

    Args:
        model: Path of the model.
        folder: Folder of the stores.
        kills: Number of processes to kill.
        budget: Disk budget of a store, in bytes.

    Returns:
        Results with labels, and the faults found.
    """
    seen = stress.crash(model, folder, kills, budget=budget)
    rows = (
        ("processes killed", seen.kills),
        ("of them before they had saved anything", seen.unanswered),
        ("slices reported as saved", seen.saved),
        ("lost", len(seen.lost)),
        ("bad", len(seen.bad)),
        ("harmless, summed over all looks: temporary, not listed yet", f"{seen.leftovers}, {seen.unlisted}"),
    )
    return rows, [f"lost: {key}" for key in seen.lost] + seen.bad


def flip(model: Path, folder: Path, flips: int) -> tuple[Rows, list[str]]:
    """Flips bits in slice files. Returns results with labels, and the faults found."""
    seen = stress.flip(model, folder, flips)
    rows = (
        ("bits flipped", f"{seen.tried} ({', '.join(f'{n} {part}' for part, n in sorted(seen.parts.items()))})"),
        ("slices refused", seen.caught),
        ("slices given out as they were (the bit is not in the state)", seen.harmless),
        ("changed states, other answers", len(seen.wrong)),
    )
    return rows, seen.wrong


def hammer(model: Path, folder: Path, processes: int, rounds: int) -> tuple[Rows, list[str]]:
    """Runs processes on one store whose budget is too small for their slices.

    Args:
        model: Path of the model.
        folder: Folder of the stores.
        processes: Number of processes.
        rounds: Number of prompts that each process asks.

    Returns:
        Results with labels, and the faults found.
    """
    seen = stress.hammer(model, folder, processes, rounds=rounds)
    over = max(0, seen.peak - seen.budget)
    rows = (
        ("processes", seen.processes),
        ("answers", seen.answers),
        ("wrong answers", len(seen.wrong)),
        ("errors, warnings", f"{len(seen.failed)}, {len(seen.warnings)}"),
        ("different slices", seen.keys),
        ("slices encoded, evicted, not kept", f"{seen.encoded}, {seen.evicted}, {seen.unsaved}"),
        ("encoded though they had stayed", len(seen.twice)),
        ("budget, most seen of it (bytes)", f"{seen.budget:,}, {seen.peak:,} in {seen.samples:,} looks"),
        ("over the budget by (bytes; largest slice)", f"{over:,}; {seen.largest:,}"),
    )
    faults = seen.failed + seen.warnings + seen.wrong + seen.twice
    if over > seen.largest:
        faults.append(f"{over:,} bytes over the budget")
    return rows, faults


@click.command(help=__doc__)
@click.option("--kills", default=200, show_default=True, help="Processes to kill.")
@click.option("--flips", default=500, show_default=True, help="Bits to flip.")
@click.option("--processes", default=8, show_default=True, help="Processes that share a store.")
@click.option("--rounds", default=200, show_default=True, help="Prompts that each process asks.")
def main(kills: int, flips: int, processes: int, rounds: int) -> None:
    parts: dict[str, Callable[[Path, Path], tuple[Rows, list[str]]]] = {
        "killed": lambda model, folder: crash(model, folder, kills, stress.PLENTY),
        "killed while evicting": lambda model, folder: crash(model, folder, kills // 2, 600_000),
        "flipped": lambda model, folder: flip(model, folder, flips),
        "hammered": lambda model, folder: hammer(model, folder, processes, rounds),
    }
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny(Path(folder) / "tiny.gguf", "llama")
        for name, part in parts.items():
            rows, found = part(model, Path(folder) / name)
            faults += found
            click.echo(f"\n{name}")
            for label, value in rows:
                click.echo(f"  {label:<62}{value}")
    click.echo("\nnothing is wrong" if not faults else "\nwrong:\n  " + "\n  ".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

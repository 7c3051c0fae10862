"""Kill processes while they save the turns of a conversation, and check what they leave.

Each process continues the conversation that the process before left. Some turns are compared with plain evaluation of
the whole conversation. Run it in the root folder of the repository: `python bench/session_stress.py`. The exit status
is 1 if anything is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support import sessions
from tests.support.tiny import write_tiny


@click.command(help=__doc__)
@click.option("--kills", default=400, show_default=True, help="Processes to kill.")
def main(kills: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = sessions.crash(write_tiny(Path(folder) / "tiny.gguf", "llama"), Path(folder), kills)
    rows = (
        ("processes killed", seen.kills),
        ("of them before they had finished a turn", seen.unanswered),
        ("turns reported as done", seen.turns),
        ("turns found that nobody had reported yet", seen.under_way),
        ("conversations held against the truth", seen.checked),
        ("wrong", len(seen.bad)),
    )
    for label, value in rows:
        click.echo(f"  {label:<62}{value}")
    click.echo("\nnothing is wrong" if not seen.bad else "\nwrong:\n  " + "\n  ".join(seen.bad))
    sys.exit(bool(seen.bad))


if __name__ == "__main__":
    main()

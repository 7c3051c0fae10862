"""``encode --watch`` encodes what an edit invalidates, and nothing else."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.command import PATIENCE, slices, started

SCHEMA = """<schema name="shop">Root text of it all.
<module name="first">Once upon a time there was a shop.</module>
<module name="second" src="second.txt"/>
<module name="third">At six it closes.</module>
</schema>
"""


class Watching:
    """A command that waits for edits, and the lines that it prints."""

    def __init__(self, command: subprocess.Popen[str]) -> None:
        self.command = command
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(command.stdout,))
        self._reader.start()

    def _read(self, pipe: Iterator[str]) -> None:
        for line in pipe:
            self._lines.put(line.rstrip("\n"))

    def line(self) -> str:
        """The next line."""
        return self._lines.get(timeout=PATIENCE)

    def silent(self, seconds: float) -> bool:
        """Whether nothing is printed for so long."""
        time.sleep(seconds)
        return self._lines.empty()

    def end(self) -> int:
        """Press Ctrl-C; gives the exit status."""
        self.command.send_signal(signal.SIGINT)
        status = self.command.wait(PATIENCE)
        self._reader.join()
        return status


@contextmanager
def watching(*arguments: str | Path) -> Iterator[Watching]:
    with started("encode", *arguments, "--watch", "--threads", "1", stderr=subprocess.STDOUT) as command:
        yield Watching(command)


def encoded(line: str) -> tuple[int, int]:
    """Slices and tokens that a pass says it encoded."""
    found = re.fullmatch(r"shop: (\d+) slices, ([\d,]+) tokens in .*", line)
    assert found, line
    return int(found[1]), int(found[2].replace(",", ""))


def test_an_edit_costs_what_it_invalidates(model: Path, tmp_path: Path, store_home: Path) -> None:
    schema, source = tmp_path / "schema.xml", tmp_path / "second.txt"
    schema.write_text(SCHEMA)
    source.write_text("It opens at nine.")

    with watching(schema, "-m", model) as command:
        everything, tokens = encoded(command.line())
        assert everything == 4
        assert command.line() == "waiting for edits of 2 files (Ctrl-C ends)"
        before = slices(store_home)

        # Only the last module.
        schema.write_text(SCHEMA.replace("At six", "At seven"))
        count, last = encoded(command.line())
        assert count == 1
        assert last < tokens / 3

        # A src file, and what follows it.
        source.write_text("It opens at ten.")
        assert encoded(command.line())[0] == 2

        # Another file replaces the schema's file, as editors do.
        (tmp_path / "new").write_text(SCHEMA.replace("Once", "Twice").replace("At six", "At seven"))
        (tmp_path / "new").replace(schema)
        assert encoded(command.line())[0] == 3

        # Nothing that counts.
        schema.write_text(SCHEMA.replace("Once", "Twice").replace("At six", "At seven").replace("\n<", "\n\n  <"))
        assert command.line() == "shop: all its slices are in the store already"
        assert command.silent(1)
        assert command.end() == 0
    assert before < slices(store_home)


def test_what_an_edit_leaves_wrong_is_told_once(model: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.xml"
    schema.write_text(SCHEMA.replace("second.txt", "../x").replace(' src="../x"', ""))

    with watching(schema, "-m", model) as command:
        encoded(command.line())
        assert command.line() == "waiting for edits of 1 file (Ctrl-C ends)"

        schema.write_text(SCHEMA.replace('name="third"', ""))
        told = sorted([command.line(), command.line()])
        assert re.search(r"schema\.xml:3: src='second.txt' does not exist", told[0])
        assert re.search(r"schema\.xml:4: <module> lacks its attribute 'name'", told[1])
        assert command.silent(2.5)

        schema.write_text(SCHEMA)
        assert "second.txt" in command.line()
        # It is no file that was named or read before.
        (tmp_path / "second.txt").write_text("It opens at nine.")
        assert encoded(command.line())[0] > 0
        assert command.end() == 0


def test_standard_input_is_not_watched(model: Path) -> None:
    with started("encode", "-", "--watch", "-m", model) as command:
        out, err = command.communicate(timeout=PATIENCE)
    assert (command.returncode, out) == (2, "")
    assert "can't be watched" in err

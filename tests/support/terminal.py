"""A terminal in which a command runs, with keys that are typed, and what is shown."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyte

from tests.support.command import PATIENCE, START

LINES, COLUMNS = 30, 100
CTRL_C, CTRL_D, ALT_ENTER, BACKSPACE = "\x03", "\x04", "\x1b\r", "\x7f"
UP, DOWN = "\x1b[A", "\x1b[B"
_AT_TERMINAL = f"""
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
{START}"""


def plain(text: str) -> str:
    """What a terminal is told, without colours and moves of the cursor."""
    return re.sub(r"\x1b\[[;?\d]*[A-Za-z]", "", text)


def pasted(text: str) -> str:
    """A text as a terminal sends it that is pasted into it."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """A terminal of a user's, with a command that runs in it."""

    def __init__(self, command: subprocess.Popen[bytes], end: int) -> None:
        self.command = command
        self._end = end
        self._seen = 0
        self._read = b""
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self._screen)

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def until(self, text: str) -> str:
        """Waits for a text after all those that were waited for before; returns what came with it."""
        limit = time.monotonic() + PATIENCE
        while (found := self._shown().find(text, self._seen)) < 0:
            assert time.monotonic() < limit, self._shown()
            self._more(text)
        begin, self._seen = self._seen, found + len(text)
        return self._shown()[begin : self._seen]

    def shows(self, text: str) -> str:
        """Wait until the screen has a text, wherever it was drawn; gives all of the screen."""
        limit = time.monotonic() + PATIENCE
        while text not in (screen := "\n".join(line.rstrip() for line in self._screen.display)):
            assert time.monotonic() < limit, screen
            self._more(text)
        return screen

    def _shown(self) -> str:
        return plain(self._read.decode(errors="replace"))

    def closed(self) -> int:
        """Wait for the command to end; gives its exit status."""
        while self.command.poll() is None:
            self._more("an end")
        return self.command.wait()

    def _more(self, what: str) -> None:
        if not select.select([self._end], [], [], 0.1)[0]:
            assert what == "an end" or self.command.poll() is None, self._shown()
            return
        try:
            self._read += (read := os.read(self._end, 1 << 16))
            self._stream.feed(read)
        except OSError:  # the command has ended
            assert what == "an end", self._shown()
            self.command.wait(PATIENCE)


@contextmanager
def terminal(*arguments: str | Path) -> Iterator[Terminal]:
    """A terminal in which a command runs, which is gone when the block ends."""
    end, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    # Nobody answers where the cursor is.
    environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = subprocess.Popen(
        [sys.executable, "-c", _AT_TERMINAL, *map(str, arguments)],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
        env=environment,
    )
    os.close(inner)
    with command:
        try:
            yield Terminal(command, end)
        finally:
            command.kill()
            os.close(end)

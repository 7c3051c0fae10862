"""Run a command that installs packages, and show how far the compiler is: one line that is updated on a terminal, a
line for each tenth of the way anywhere else.

`python scripts/show_build.py "compiling llama.cpp" pip install -v .` shows the steps that ninja or make counts in the
output of pip, and of everything else what pip says without `-v`. When the command fails its last lines are printed, and
the exit status is that of the command. Needs Python alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import deque

# ninja counts steps, make tells a share: `[57/204] Building CXX object …`, `[ 28%] Building CXX object …`.
_STEP = re.compile(r"\s*\[\s*(\d+)(?:/(\d+)|%)\]")
_WORTH_SHOWING = re.compile(
    r"\s*(Collecting|Downloading|Building wheel|Installing collected|Successfully|ERROR|WARNING)\b"
)
_WIDTH = 30
_LAST = 100
"""Lines that are printed when the command fails."""


class Bar:
    """How far the compiler is, on standard output."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._started = time.monotonic()
        self._tenth = -1
        self._drawn = False
        self._terminal = sys.stdout.isatty()

    def show(self, done: int, total: int) -> None:
        """Tell that ``done`` of ``total`` steps are done."""
        if not self._terminal:
            tenth = done * 10 // total
            if tenth > self._tenth:
                self._tenth = tenth
                print(f"    {self._label}: {tenth * 10}%", flush=True)
            return
        full = min(_WIDTH, done * _WIDTH // total)
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        bar = "#" * full + "." * (_WIDTH - full)
        print(f"\r\x1b[K    {self._label} [{bar}] {done * 100 // total}%  {minutes}:{seconds:02}", end="", flush=True)
        self._drawn = True

    def end(self) -> None:
        """Leave the line to what is printed next."""
        if self._drawn:
            print(flush=True)
            self._drawn = False


def main(label: str, command: list[str]) -> int:
    """Run ``command``; gives its exit status."""
    last: deque[str] = deque(maxlen=_LAST)
    bar: Bar | None = None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as running:
        assert running.stdout
        try:
            for line in running.stdout:
                last.append(line)
                if step := _STEP.match(line):
                    bar = bar or Bar(label)
                    total = int(step[2] or 100)
                    bar.show(min(int(step[1]), total), max(total, 1))
                elif _WORTH_SHOWING.match(line):
                    if bar:
                        bar.end()
                    print(line.rstrip(), flush=True)
        except KeyboardInterrupt:
            running.wait()
        finally:
            if bar:
                bar.end()
    if running.returncode:
        sys.stdout.writelines(["\n", *last])
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

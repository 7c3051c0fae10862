"""Runs a command that installs packages, and shows the progress of the compiler.

On a terminal the progress is one line that is updated; elsewhere it is a line for each tenth of the steps.

`python scripts/show_build.py "compiling llama.cpp" pip install -v .` shows the steps that ninja or make counts in the
output of pip, and otherwise only what pip prints without `-v`. If the command fails, its last lines are printed. The
exit status is that of the command. The script needs only Python's standard library.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import deque

# ninja prints steps, make a percentage: `[57/204] Building CXX object …`, `[ 28%] Building CXX object …`.
_STEP = re.compile(r"\s*\[\s*(\d+)(?:/(\d+)|%)\]")
# Indented lines are details of a build, except for those on its beginning and end.
_WORTH_SHOWING = re.compile(r"(Collecting|  Building wheel|Installing collected|Successfully|ERROR|WARNING)\b")
_WIDTH = 30
_LAST = 100
"""Lines that are printed when the command fails."""


class Bar:
    """Progress bar of the compiler, on standard output."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._started = time.monotonic()
        self._tenth = -1
        self._drawn = False
        self._terminal = sys.stdout.isatty()

    def show(self, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` steps are done."""
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
        """Ends the line of the bar, so that other output begins on a new line."""
        if self._drawn:
            print(flush=True)
            self._drawn = False


def main(label: str, command: list[str]) -> int:
    """Runs ``command``, and returns its exit status."""
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

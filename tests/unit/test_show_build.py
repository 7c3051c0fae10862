"""How far a build is, in what the command that installs prints."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "show_build.py"
# What pip -v prints, with the steps of ninja, or of make.
PIP = """
print("Collecting llama-cpp-python", "Link requires a different Python", sep="\\n")
print("  Building wheel for llama-cpp-python", flush=True)
for step in range(1, 205):
    progress = f"{step}/204" if {ninja} else f"{step * 100 // 204:3}%"
    print(f"  [{progress}] Building CXX object x.o")
print("warning: something of the compiler")
print("Successfully installed llama-cpp-python-0.3.36", flush=True)
raise SystemExit({status})
"""
AROUND = ["Collecting llama-cpp-python", "  Building wheel for llama-cpp-python"]
TENTHS = [f"    compiling: {share}%" for share in range(0, 101, 10)]
DONE = "Successfully installed llama-cpp-python-0.3.36"


def command(*, ninja: bool = True, status: int = 0) -> list[str]:
    pip = PIP.replace("{ninja}", str(ninja)).replace("{status}", str(status))
    return [sys.executable, str(SCRIPT), "compiling", sys.executable, "-c", pip]


def test_a_line_for_each_tenth_where_nobody_looks() -> None:
    for ninja in (True, False):
        done = subprocess.run(command(ninja=ninja), capture_output=True, encoding="utf-8", check=True)
        assert (done.stdout.splitlines(), done.stderr) == ([*AROUND, *TENTHS, DONE], "")


def test_what_fails_is_shown() -> None:
    done = subprocess.run(command(status=7), capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 7
    assert done.stdout.endswith(f"[204/204] Building CXX object x.o\nwarning: something of the compiler\n{DONE}\n")


def test_one_line_on_a_terminal() -> None:
    end, inner = pty.openpty()
    with subprocess.Popen(command(), stdout=inner) as running:
        os.close(inner)
        read = b""
        try:
            while more := os.read(end, 1 << 16):
                read += more
        except OSError:  # the command has ended
            pass
        os.close(end)
    assert running.returncode == 0
    lines = read.decode().replace("\r\n", "\n").split("\n")
    assert [*lines[:2], *lines[3:]] == [*AROUND, DONE, ""]
    drawn = lines[2].split("\r\x1b[K")
    assert len(drawn) == 205
    assert drawn[102].startswith("    compiling [###############...............] 50%  0:0")

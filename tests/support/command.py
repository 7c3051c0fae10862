"""The command line as a user runs it, here or in a process of its own, and a small schema to run it on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from cpucache.cli.main import cli
from cpucache.store.slicefile import SliceFiles

PATIENCE = 300
"""Seconds until a command counts as hanging, on however slow a machine."""


SCHEMA = """
<schema name="shop">
  <system>
    You answer for a shop.
    <module name="hours">It opens at <parameter name="opens" length="8" scaffold="nine"/> and closes at six.</module>
    <union>
      <module name="summer">In summer there is ice cream of eleven kinds.</module>
      <module name="winter">In winter there is soup, and hot chocolate.</module>
    </union>
    <module name="news" cache="false">Today the lift is broken.</module>
  </system>
</schema>
"""
PROMPT = '<prompt schema="shop"><hours opens="ten"/><summer/><user>What is there to eat?</user></prompt>'

START = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("cpucache.cli.main", run_name="__main__")
"""
"""Python that runs the command line. Commands in the background of a script would inherit that Ctrl-C is ignored."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


def cpucache(*arguments: str | Path, stdin: str = "", cwd: Path | None = None, **environment: str) -> Outcome:
    """Run ``cpucache`` with arguments, text on standard input, and additional environment variables."""
    # Bytes, for text mode would change the line ends of what a random model says.
    done = subprocess.run(
        [sys.executable, "-m", "cpucache.cli.main", *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def invoke(*arguments: str | Path, stdin: str | None = None) -> str:
    """Run a command here, which must succeed; gives what it prints on standard output."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@contextmanager
def started(*arguments: str | Path, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """A command under way, which is gone when the block ends. ``subprocess.STDOUT``: both outputs in one pipe."""
    command = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        encoding="utf-8",
    )
    with command:
        try:
            yield command
        finally:
            command.kill()


def until(reached: Callable[[], bool], command: subprocess.Popen[str]) -> None:
    """Wait for something that a running command does."""
    end = time.monotonic() + PATIENCE
    while not reached():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def slices(folder: Path) -> set[str]:
    """Keys of the slices on disk, each of which must be sound."""
    files = SliceFiles(folder / "slices")
    keys = set(files)
    assert all(files.check(key) for key in keys)
    return keys

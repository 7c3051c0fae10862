"""The first minute of a user who has installed nothing but the package: ``demo`` offers to fetch its model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
QUESTION = "fetch it now? [Y/n]"


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


def typed(text: bytes, command: list[str]) -> tuple[int, str]:
    """The exit status of a command, and what it writes to a terminal of its own where its question is answered so."""
    end, inner = pty.openpty()
    read = b""
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
            until = time.monotonic() + PATIENCE
            with contextlib.suppress(OSError):  # the command has ended
                while time.monotonic() < until:
                    if select.select([end], [], [], 1)[0]:
                        read += os.read(end, 1 << 16)
                    elif b"[Y/n]" in read:
                        # Again, for a Ctrl-C that comes while the line editor starts is noticed with the next key.
                        os.write(end, text)
            running.wait(PATIENCE)
        finally:
            running.kill()
            os.close(end)
    return running.returncode, read.decode()


def _controlled() -> None:
    """Sets standard input as the terminal that Ctrl-C is typed at."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_yes_fetches_it_and_goes_on(command: list[str], weights: bytes, tmp_path: Path) -> None:
    _, shown = typed(b"\n", command)
    assert QUESTION in shown
    assert (tmp_path / "weights" / f"{NAME}.gguf").read_bytes() == weights
    # The demo has begun: this model is too small for its prompt, or takes it.
    assert "models pull" not in shown
    assert "tokens" in shown


@pytest.mark.parametrize(
    ("text", "status", "last"),
    [
        (b"n\n", 2, f"cpucache: {NAME} has not been fetched yet: run `cpucache models pull {NAME}`"),
        (b"\x03", 130, "cpucache: interrupted"),
    ],
)
def test_no_and_ctrl_c_end_it(text: bytes, status: int, last: str, command: list[str], tmp_path: Path) -> None:
    ended, shown = typed(text, command)
    assert ended == status, shown
    # The terminal may echo the text once more after the last line, for ``typed`` writes it until the command has ended.
    echoed = shown.replace("^C", "").strip().removesuffix(text.decode().strip()).rstrip()
    assert echoed.endswith(last)
    assert "Traceback" not in shown
    assert not (tmp_path / "weights" / f"{NAME}.gguf").exists()


def test_without_a_terminal_it_says_the_command(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cpucache: {NAME} has not been fetched yet: run `cpucache models pull {NAME}`\n"

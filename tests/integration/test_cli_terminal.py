"""What others wrote reaches a terminal as something to read, never as something to obey."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cpucache.cli.console import safe
from cpucache.sessions import Entry, Transcripts
from tests.support.command import PATIENCE, cpucache

EVIL = "a\x1b]0;title\x07b\x9b2Jc\x08\x7f"
PLAIN = "a�]0;title�b�2Jc��"
# What rich and the terminal's line discipline say themselves: colours, the cursor, and the ends of lines.
OURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


def on_terminal(*arguments: str | Path, stdin: str = "", **environment: str) -> str:
    """What a command writes to a terminal, but for what it tells that itself."""
    end, inner = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "cpucache.cli.main", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=inner,
        stderr=inner,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "150", **environment},
    ) as command:
        os.close(inner)
        assert command.stdin
        command.stdin.write(stdin.encode())
        command.stdin.close()
        read = b""
        try:
            while more := os.read(end, 1 << 16):
                read += more
        except OSError:  # the command has ended
            pass
        os.close(end)
        command.wait(PATIENCE)
    return OURS.sub("", read.decode(errors="surrogateescape"))


def controls(text: str) -> set[str]:
    return {char for char in text if char != safe(char)}


def test_what_is_safe() -> None:
    assert safe(EVIL) == PLAIN
    assert safe("a\tb\nc — é 日本 👩‍👩‍👧\r") == "a\tb\nc — é 日本 👩‍👩‍👧�"
    assert not controls("".join(map(safe, EVIL)))


WILD = ("--temp", "9", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "3", "-n", "300", "--threads", "1")


def test_run(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("anything")
    piped = cpucache("run", tmp_path / "q.txt", "-m", model, *WILD)
    assert controls(piped.out), "no such answer: try another seed"
    shown = on_terminal("run", tmp_path / "q.txt", "-m", model, *WILD)
    assert not controls(shown)
    assert safe(piped.out).strip() in shown


@pytest.mark.parametrize("options", [(), ("--plain",)])
def test_chat(options: tuple[str, ...], model: Path) -> None:
    piped = cpucache("chat", "piped", "-m", model, *WILD, *options, stdin=f"{EVIL}\n")
    assert controls(piped.out)
    shown = on_terminal("chat", "shown", "-m", model, *WILD, *options, stdin=f"{EVIL}\n/nosuch\x07\n")
    assert "�" in shown
    assert not controls(shown)
    # Opened again, it shows what was said last.
    again = on_terminal("chat", "shown", "-m", model, *options, stdin="/stats\n")
    assert "> a�]0;title" in again
    assert not controls(again)


def test_lists_of_conversations() -> None:
    transcripts = Transcripts()
    talk = transcripts.open("talk", fingerprint="f", model=f"model {EVIL}")
    talk.put(0, [Entry("user", EVIL, {"parts": [], "pending": []})])
    transcripts.close()
    shown = on_terminal("sessions", "ls")
    assert shown.count("a�]0;title") == 2
    assert not controls(shown + on_terminal("sessions", "export", "talk"))
    assert EVIL in cpucache("sessions", "export", "talk").out


def test_names_of_slices(tiny: Callable[..., Path], model: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("anything " * 300)
    evil = tmp_path / "m\x1b]0;t\x07.gguf"
    evil.write_bytes(model.read_bytes())
    assert not controls(on_terminal("run", tmp_path / "q.txt", "-m", evil, "-n", "1", "--threads", "1"))
    for command in (("cache", "ls"), ("cache", "stats"), ("models", "list")):
        shown = on_terminal(*command, CPUCACHE_MODELS=str(tmp_path))
        assert "m�]0;t" in shown
        assert not controls(shown)


def test_errors() -> None:
    assert not controls(on_terminal("run", f"{EVIL}.xml") + on_terminal("sessions", "rm", EVIL))

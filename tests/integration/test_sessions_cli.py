"""``sessions``: what it lists, deletes and exports."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from cpucache.sessions import Entry, Transcripts, default_sessions
from tests.support.command import cpucache, invoke
from tests.support.sessions import message

PIECES = {"parts": [[1, 2]], "pending": []}
WORDS = "What is [bold]there[/bold] to eat?"


@pytest.fixture(autouse=True)
def conversations() -> None:
    """``soup`` with four messages after a system text, ``half`` with which it shares two, and ``empty``."""
    transcripts = Transcripts()
    with_soup = transcripts.open("soup", fingerprint="f", model="small")
    answered = {"tokens": 20, "finish": "stop"}
    with_soup.put(
        0,
        [
            Entry("system", "You cook.", PIECES, metrics={"tokens": 5}),
            Entry("user", WORDS, PIECES, metrics={"tokens": 10}),
            Entry("assistant", "# Soup\n\n```\nwith onions\n```\n", PIECES, metrics=answered),
        ],
    )
    with_soup.fork("half")
    last = Entry("assistant", "In an", PIECES, metrics={"tokens": 3, "finish": "interrupted"})
    with_soup.put(3, [Entry("user", "When?", PIECES, metrics={"tokens": 4}), last])
    with_soup.close()
    begun = transcripts.open("empty", fingerprint="f", model="small")
    begun.put(0, [Entry("system", "You are quiet.", PIECES, metrics={"tokens": 5})])
    begun.close()
    transcripts.open("nothing said", fingerprint="f", model="small").close()
    transcripts.close()


def names() -> set[str]:
    return {each["name"] for each in json.loads(invoke("sessions", "ls", "--json"))}


def test_ls_lists_the_latest_first() -> None:
    empty, soup, half = json.loads(invoke("sessions", "ls", "--json"))

    assert [each["name"] for each in (empty, soup, half)] == ["empty", "soup", "half"]
    assert (soup["model"], soup["messages"], soup["tokens"], soup["start"]) == ("small", 4, 42, WORDS)
    assert (half["messages"], half["tokens"]) == (2, 35)
    assert (empty["messages"], empty["start"]) == (0, "")
    assert datetime.fromisoformat(soup["used"]) >= datetime.fromisoformat(soup["created"])


def test_ls_draws_a_table() -> None:
    done = cpucache("sessions", "ls", COLUMNS="120")

    assert done.status == 0
    lines = [line.strip() for line in done.out.splitlines()]
    row = next(number for number, line in enumerate(lines) if line.startswith("soup"))
    assert lines[row].split()[:4] == ["soup", "small", "4", "42"]
    assert lines[row + 1] == WORDS


def test_without_any_it_says_how_to_begin(tmp_path: Path) -> None:
    done = cpucache("sessions", "ls", CPUCACHE_SESSIONS=str(tmp_path))

    assert (done.status, done.out) == (0, "no conversations yet: `cpucache chat` begins one\n")
    assert json.loads(cpucache("sessions", "ls", "--json", CPUCACHE_SESSIONS=str(tmp_path)).out) == []


def test_rm_deletes_and_leaves_what_others_share() -> None:
    invoke("sessions", "rm", "soup", "empty", "--yes")

    assert names() == {"half"}
    assert WORDS in invoke("sessions", "export", "half")


def test_rm_asks() -> None:
    invoke("sessions", "rm", "soup", "half", stdin="n\ny\n")

    assert names() == {"soup", "empty"}


def test_rm_deletes_none_when_it_does_not_know_one() -> None:
    done = cpucache("sessions", "rm", "soup", "soap", "--yes")

    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "no conversation 'soap'" in done.err
    assert names() == {"soup", "half", "empty"}


def test_one_that_is_open_is_not_deleted() -> None:
    transcripts = Transcripts()
    transcripts.open("soup").close()
    opened = transcripts.open("soup")

    done = cpucache("sessions", "rm", "soup", "--yes")

    opened.close()
    transcripts.close()
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "open" in done.err


def test_export_as_markdown_keeps_what_was_said(tmp_path: Path) -> None:
    text = invoke("sessions", "export", "soup")

    assert text.startswith("# soup\n\nWith small, begun 2")
    parts = ("## System\n\nYou cook.\n", f"## You\n\n{WORDS}\n", "## Answer\n\n# Soup\n\n```\nwith onions\n```\n")
    positions = [text.index(part) for part in (*parts, "## You\n\nWhen?\n", "## Answer (interrupted)\n\nIn an\n")]
    assert positions == sorted(positions)
    assert invoke("sessions", "export", "soup", "-o", tmp_path / "soup.md") == ""
    assert (tmp_path / "soup.md").read_text() == text


def test_a_file_that_is_exported_is_for_its_owner_only(tmp_path: Path) -> None:
    (tmp_path / "there.md").touch(0o644)
    for name in ("there.md", "new.md"):
        invoke("sessions", "export", "soup", "-o", tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_conversations_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "sessions"
    before = os.umask(0)
    try:
        transcripts = Transcripts(folder)
        talk = transcripts.open("talk")
        talk.put(0, [Entry("user", "A secret.", PIECES)])
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(list(folder.iterdir())) == 4  # with the log, and a lock
    assert modes == {0o600}
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    talk.close()
    transcripts.close()


def spoil(name: str) -> None:
    """Have the entries of a conversation follow one another in a circle."""
    database = sqlite3.connect(default_sessions() / "sessions.sqlite")
    with contextlib.closing(database), database:
        last = database.execute("SELECT last FROM sessions WHERE name = ?", (name,)).fetchone()[0]
        database.execute("UPDATE entries SET before = ? WHERE id = ?", (last, last))


def test_a_damaged_one_is_named_and_the_others_listed() -> None:
    assert invoke("sessions", "verify") == ""
    spoil("empty")
    listed = cpucache("sessions", "ls", "--json")
    assert listed.status == 0
    assert [each["name"] for each in json.loads(listed.out)] == ["soup", "half"]
    assert "warning: conversation 'empty' is damaged (entry 6 follows entry 6" in listed.err
    found = cpucache("sessions", "verify")
    assert found.status == 1
    assert found.out.startswith("empty: entry 6 follows")
    assert found.err == "cpucache: damaged conversations: 1; `cpucache sessions rm NAME` deletes one\n"
    for command in (("sessions", "export", "empty"), ("chat", "empty")):
        refused = cpucache(*command)
        assert (refused.status, refused.out, refused.err.count("\n")) == (1, "", 1)
        assert "conversation 'empty' is damaged" in refused.err
    assert cpucache("sessions", "rm", "empty", stdin="y\n").err.startswith("delete conversation 'empty' (damaged)?")
    assert invoke("sessions", "verify") == ""
    assert names() == {"soup", "half"}


def test_export_as_json_has_times_and_counts() -> None:
    conversation = json.loads(invoke("sessions", "export", "soup", "--format", "json"))

    assert (conversation["name"], conversation["model"]) == ("soup", "small")
    messages = conversation["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == WORDS
    assert messages[2]["metrics"] == {"tokens": 20, "finish": "stop"}
    times = [datetime.fromisoformat(message["created"]) for message in messages]
    assert times == sorted(times)
    assert all(time.tzinfo for time in times)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("export", "soap"), "no conversation 'soap'"),
        (("export", "soup", "-o", "nowhere/soup.md"), "nowhere/soup.md: No such file"),
        (("export", "soup", "--format", "pdf"), "'pdf'"),
        (("rm",), "NAME"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: tuple[str, ...], part: str) -> None:
    done = cpucache("sessions", *arguments)

    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert part in done.err


def test_looking_at_conversations_loads_no_llama_cpp() -> None:
    code = "from cpucache.cli.main import cli; cli.main(['sessions', 'ls'], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('llama_cpp' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "soup" in done.stdout
    assert done.stdout.split()[-1] == "False"


def test_what_chat_wrote_is_exported(tiny: Callable[..., Path]) -> None:
    done = cpucache("chat", "new", "-m", tiny("llama"), "-n", "8", "--temp", "0", "--threads", "1", stdin="hello\n")

    conversation = json.loads(invoke("sessions", "export", "new", "--format", "json"))

    assert done.status == 0
    user, assistant = conversation["messages"]
    assert user["content"] == "hello"
    assert f"{assistant['content']}\n" == done.out
    assert assistant["metrics"]["completion_tokens"] == 8


def test_a_document_that_a_prompt_held_is_spliced_into_a_message(tiny: Callable[..., Path], tmp_path: Path) -> None:
    document = " ".join(message(number, 40) for number in range(4))
    path = tmp_path / "document.txt"
    path.write_text(document)
    common = ("-m", tiny("llama"), "-n", "2", "--temp", "0", "--threads", "1")
    assert cpucache("run", path, *common).status == 0

    spliced = {}
    for reuse in ("anywhere", "exact"):
        chat = ("chat", reuse, "--system", "Be short.", "--reuse", reuse, *common)
        assert cpucache(*chat, stdin=f"hello\n{document}\n").status == 0
        answer = json.loads(invoke("sessions", "export", reuse, "--format", "json"))["messages"][-1]
        spliced[reuse] = answer["metrics"]["clean_tokens"] + answer["metrics"]["foreign_tokens"]

    assert spliced["exact"] == 0
    assert spliced["anywhere"] > 100


def test_fidelity_without_anything_to_apply_to_is_refused(tiny: Callable[..., Path]) -> None:
    done = cpucache("chat", "new", "-m", tiny("llama"), "--fidelity", "fast", stdin="hello\n")
    assert done.status == 2
    assert "--reuse anywhere" in done.err

"""Transcripts: written whole or not at all, shared by forks, and open once at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpucache.errors import CpucacheError, InputError
from cpucache.sessions import Damaged, Entry, Transcripts
from cpucache.sessions.records import default_sessions
from tests.support.sessions import patience


@pytest.fixture
def transcripts(tmp_path: Path) -> Iterator[Transcripts]:
    opened = Transcripts(tmp_path)
    yield opened
    opened.close()


def entry(text: str, role: str = "user", **rest: object) -> Entry:
    return Entry(role, text, {"parts": [[1, 2]], "pending": [3]}, **rest)  # type: ignore[arg-type]


def texts(transcripts: Transcripts, name: str) -> list[str]:
    return [each.text for each in transcripts.read(name)]


def rows(folder: Path) -> int:
    database = sqlite3.connect(folder / "sessions.sqlite")
    count: int = database.execute("SELECT count(*) FROM entries").fetchone()[0]
    database.close()
    return count


def test_what_was_put_is_there_for_the_next(tmp_path: Path) -> None:
    first = Transcripts(tmp_path)
    talk = first.open("talk", fingerprint="f", model="m")
    talk.put(0, [entry("One", "system"), entry("Two", left_out=1, metrics={"tokens": 4})])
    talk.put(2, [entry("Three", "assistant")])
    assert [each.text for each in talk.entries] == ["One", "Two", "Three"]
    talk.close()
    first.close()
    second = Transcripts(tmp_path)
    found = second.open("talk", fingerprint="f", model="m").entries
    assert found == talk.entries
    assert (found[1].role, found[1].left_out, found[1].metrics) == ("user", 1, {"tokens": 4})
    assert found[1].pieces == {"parts": [[1, 2]], "pending": [3]}
    assert len({each.id for each in found}) == 3
    assert "talk" in second
    assert "other" not in second
    second.close()


def test_going_back_leaves_what_was_there(tmp_path: Path, transcripts: Transcripts) -> None:
    talk = transcripts.open("talk")
    talk.put(0, [entry("a"), entry("b"), entry("c")])
    talk.fork("whole")
    talk.put(1, [entry("d")])
    assert texts(transcripts, "talk") == ["a", "d"]
    assert texts(transcripts, "whole") == ["a", "b", "c"]
    assert rows(tmp_path) == 4


def test_all_of_a_turn_is_written_or_nothing(transcripts: Transcripts) -> None:
    talk = transcripts.open("talk")
    talk.put(0, [entry("a")])
    with pytest.raises(TypeError):
        talk.put(1, [entry("b"), Entry("assistant", "c", {"parts": object()})])
    assert [each.text for each in talk.entries] == ["a"]
    assert texts(transcripts, "talk") == ["a"]
    # And there is no transaction left that would keep others waiting.
    talk.put(1, [entry("d")])
    assert texts(transcripts, "talk") == ["a", "d"]


HALF_A_TURN = """
import os, sys
from pathlib import Path
from cpucache.sessions import Entry, Transcripts
transcripts = Transcripts(Path(sys.argv[1]))
talk = transcripts.open("talk")
talk.put(0, [Entry("user", "whole", {"parts": [], "pending": []})])
with transcripts._change() as database:
    database.execute(
        "INSERT INTO entries (before, role, text, pieces, left_out, metrics, created) "
        "VALUES (1, '', 'half', '', 0, '', 0)"
    )
    database.execute("UPDATE sessions SET last = 2")
    os._exit(9)
"""


def test_a_process_that_dies_within_a_turn_leaves_the_one_before(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HALF_A_TURN, tmp_path], check=False)
    assert done.returncode == 9
    transcripts = Transcripts(tmp_path)
    assert [each.text for each in transcripts.open("talk").entries] == ["whole"]
    assert rows(tmp_path) == 1
    transcripts.close()


# ---- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\tb", "\x00", "a\x1b[31m", "x" * 101])
def test_what_can_name_nothing(name: str, transcripts: Transcripts) -> None:
    with pytest.raises(InputError, match="can't name a conversation: use 1 to 100 printable characters"):
        transcripts.open(name)
    talk = transcripts.open("good")
    with pytest.raises(InputError, match="can't name"):
        talk.fork(name)
    assert [each.name for each in transcripts.summaries()] == ["good"]


def test_any_other_name_will_do(tmp_path: Path, transcripts: Transcripts) -> None:
    names = [
        "../../up",
        "C:\\con",
        "a/b",
        "A",
        "a",
        "Über Wien & Rom",
        "日本",
        "--help",
        "'; DROP TABLE sessions",
        "x" * 100,
    ]
    for name in names:
        transcripts.open(name).put(0, [entry(name)])
    assert sorted(each.name for each in transcripts.summaries()) == sorted(names)
    assert all(texts(transcripts, name) == [name] for name in names)
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))


def test_a_name_nobody_has(transcripts: Transcripts) -> None:
    for call in (transcripts.read, transcripts.summary, transcripts.remove):
        with pytest.raises(InputError, match="no conversation 'nobody'"):
            call("nobody")
    assert transcripts.summaries() == []


def test_another_model_is_refused_and_nothing_is_locked(transcripts: Transcripts) -> None:
    talk = transcripts.open("talk", fingerprint="one", model="first")
    talk.put(0, [entry("a")])
    talk.close()
    for _ in range(2):
        with pytest.raises(InputError, match="'talk' is with first, not second: open it with first, or begin"):
            transcripts.open("talk", fingerprint="two", model="second")
    transcripts.open("talk", fingerprint="one", model="renamed").close()


def test_one_in_which_nothing_was_said_leaves_no_trace(transcripts: Transcripts) -> None:
    transcripts.open("talk", fingerprint="one", model="first").close()
    assert "talk" not in transcripts
    transcripts.open("talk", fingerprint="two", model="second").close()


# ---- several at once -------------------------------------------------------------------------------------------------
def test_a_conversation_is_open_only_once(tmp_path: Path, transcripts: Transcripts) -> None:
    other = Transcripts(tmp_path)
    talk = transcripts.open("talk")
    for folder in (transcripts, other):
        with pytest.raises(CpucacheError, match="'talk' is open in another window or program; close it there, or fork"):
            folder.open("talk")
        with pytest.raises(CpucacheError, match="is open in another"):
            folder.remove("talk")
    # It may be read meanwhile, and others may be opened.
    talk.put(0, [entry("a")])
    assert texts(other, "talk") == ["a"]
    other.open("talking").close()
    talk.close()
    assert [each.text for each in other.open("talk").entries] == ["a"]
    other.close()


def test_many_write_to_one_file(tmp_path: Path) -> None:
    def write(name: str) -> None:
        own = Transcripts(tmp_path)
        talk = own.open(name)
        for number in range(20):
            talk.put(number, [entry(f"{name} {number}")])
        own.close()

    threads = [threading.Thread(target=write, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    transcripts = Transcripts(tmp_path)
    for i in range(4):
        assert texts(transcripts, f"t{i}") == [f"t{i} {number}" for number in range(20)]
    transcripts.close()


# ---- removed ---------------------------------------------------------------------------------------------------------
def test_removing_deletes_what_no_other_shares(tmp_path: Path, transcripts: Transcripts) -> None:
    talk = transcripts.open("talk")
    talk.put(0, [entry("a"), entry("b"), entry("c")])
    talk.fork("short", 2)
    talk.fork("nothing", 0)
    talk.put(3, [entry("d")])
    talk.close()
    transcripts.remove("talk")
    assert texts(transcripts, "short") == ["a", "b"]
    assert texts(transcripts, "nothing") == []
    assert rows(tmp_path) == 2
    transcripts.remove("nothing")
    assert rows(tmp_path) == 2
    transcripts.remove("short")
    assert rows(tmp_path) == 0
    assert transcripts.summaries() == []
    # The name is free again.
    assert transcripts.open("talk").entries == []


def test_a_removed_branch_does_not_take_the_trunk_along(tmp_path: Path, transcripts: Transcripts) -> None:
    talk = transcripts.open("talk")
    talk.put(0, [entry("a"), entry("b")])
    talk.fork("branch")
    branch = transcripts.open("branch")
    branch.put(1, [entry("x"), entry("y")])
    branch.close()
    transcripts.remove("branch")
    assert texts(transcripts, "talk") == ["a", "b"]
    assert rows(tmp_path) == 2


# ---- lists -----------------------------------------------------------------------------------------------------------
def test_summaries(transcripts: Transcripts) -> None:
    old = transcripts.open("old", fingerprint="f", model="m")
    old.put(
        0, [entry("Be brief", "system", metrics={"tokens": 5}), entry("What\n is  it? " * 9, metrics={"tokens": 7})]
    )
    new = transcripts.open("new", fingerprint="f", model="m")
    assert [each.name for each in transcripts.summaries()] == ["new", "old"]
    old.put(2, [entry("It is.", "assistant", metrics={"tokens": 2})])
    first, second = transcripts.summaries()
    assert (first.name, first.model, first.fingerprint, first.messages, first.tokens) == ("old", "m", "f", 2, 14)
    assert first.start == ("What is it? " * 9)[:60]
    assert first.created <= first.used
    assert (second.messages, second.tokens, second.start) == (0, 0, "")
    assert transcripts.summary("old") == first
    assert new.entries == []


# ---- what it takes ---------------------------------------------------------------------------------------------------
class Reading:
    """Counts statements, and characters of text that are read, on the connection of some transcripts."""

    def __init__(self, transcripts: Transcripts) -> None:
        self.statements = self.characters = self.steps = 0
        database = transcripts._database
        decode = database.text_factory
        database.set_trace_callback(self._ran)
        database.set_progress_handler(self._stepped, 1)
        database.text_factory = lambda content: self._read(decode(content))

    def _ran(self, _statement: str) -> None:
        self.statements += 1

    def _stepped(self) -> int:
        self.steps += 1
        return 0

    def _read(self, text: str) -> str:
        self.characters += len(text)
        return text

    def since(self) -> tuple[int, int, int]:
        counted = (self.statements, self.characters, self.steps)
        self.statements = self.characters = self.steps = 0
        return counted


def test_a_turn_of_a_long_conversation_costs_what_the_first_does(transcripts: Transcripts) -> None:
    talk = transcripts.open("talk")
    talk.put(0, [entry("You are brief.", "system")])
    reading = Reading(transcripts)
    costs = []
    for number in range(300):
        talk.put(1 + 2 * number, [entry(f"What is {number}?"), entry("A number.", "assistant")])
        costs.append(reading.since())
    statements, characters, steps = costs[0]
    assert {count for count, _, _ in costs} == {statements}
    assert {count for _, count, _ in costs} == {characters} == {0}
    # A tree of pages grows by its logarithm.
    assert max(count for _, _, count in costs) < steps + 20
    assert talk.entries == transcripts.read("talk")


def test_a_list_reads_neither_tokens_nor_what_was_said(transcripts: Transcripts) -> None:
    for name, words in (("short", 1), ("long", 5000)):
        talk = transcripts.open(name)
        pieces = {"parts": [[1, 2] * words], "pending": []}
        talk.put(0, [Entry("user", "Begun so.", pieces)])
        talk.put(1, [Entry("user", "word " * words, pieces, metrics={"tokens": 2}) for _ in range(30)])
    reading = Reading(transcripts)
    costs = []
    for name in ("short", "long"):
        summary = transcripts.summary(name)
        assert (summary.messages, summary.tokens, summary.start) == (31, 60, "Begun so.")
        costs.append(reading.since())
    assert costs[1][1] == costs[0][1] - 1  # the name is a letter shorter
    assert costs[1][2] < costs[0][2] + 20


# ---- damaged ---------------------------------------------------------------------------------------------------------
FAULTS = {
    "UPDATE entries SET before = 3 WHERE id = 1": "entry 1 follows entry 3",
    "UPDATE entries SET before = 2 WHERE id = 2": "entry 2 follows entry 2",
    "UPDATE entries SET before = 'x' WHERE id = 2": "entry 2 follows entry 'x'",
    "DELETE FROM entries WHERE id = 2": "entry 3 follows entry 2",
    "DELETE FROM entries WHERE id = 3": "its last entry, 3, is missing",
    "UPDATE sessions SET last = 'x' WHERE name = 'bad'": "its last entry, 'x', is missing",
    "UPDATE sessions SET used = 'x' WHERE name = 'bad'": "its times",
    "UPDATE entries SET role = 'chief' WHERE id = 2": "entry 2 has an unknown role: 'chief'",
    "UPDATE entries SET metrics = '{' WHERE id = 2": "entry 2: metrics: not JSON",
    "UPDATE entries SET metrics = '[]' WHERE id = 2": "entry 2 has no metrics",
    'UPDATE entries SET metrics = \'{"tokens": "x"}\' WHERE id = 2': "entry 2 has no metrics",
}
HIDDEN_FAULTS = {
    "UPDATE entries SET pieces = '{' WHERE id = 2": "entry 2: pieces: not JSON",
    f"UPDATE entries SET pieces = '{'[' * 100_000}' WHERE id = 2": "entry 2: pieces: not JSON",
    "UPDATE entries SET pieces = '[]' WHERE id = 2": "entry 2 has no valid tokens",
    'UPDATE entries SET pieces = \'{"parts": [["x"]], "pending": []}\' WHERE id = 2': "entry 2 has no valid tokens",
    'UPDATE entries SET pieces = \'{"parts": [[-1]], "pending": []}\' WHERE id = 2': "entry 2 has no valid tokens",
    "UPDATE entries SET role = 'prompt' WHERE id = 1": "entry 1 has no valid tokens",
    "UPDATE entries SET text = X'FF' WHERE id = 2": "entry 2 has no text in 'text'",
    "UPDATE entries SET text = CAST(X'FF' AS TEXT) WHERE id = 2": "entry 2 has no text in 'text'",
    "UPDATE entries SET left_out = 7 WHERE id = 2": "entry 2 has an impossible number of entries left out: 7 of 1",
    "UPDATE entries SET created = 1e300 WHERE id = 2": "entry 2 has no valid time",
}


def spoil(folder: Path, statement: str) -> None:
    """A good conversation of three entries, and a bad one."""
    opened = Transcripts(folder)
    for name in ("bad", "good"):
        talk = opened.open(name)
        talk.put(0, [entry("a"), entry("b", "assistant"), entry("c")])
        talk.close()
    opened.close()
    database = sqlite3.connect(folder / "sessions.sqlite")
    database.execute(statement)
    database.commit()
    database.close()


@pytest.mark.parametrize("statement", FAULTS | HIDDEN_FAULTS)
def test_one_that_is_damaged_is_named_and_can_be_removed(
    statement: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(tmp_path, statement)
    transcripts = Transcripts(tmp_path)
    with patience(20):
        listed = [each.name for each in transcripts.summaries()]
        assert "good" in listed
        if statement in FAULTS:
            assert listed == ["good"]
            assert FAULTS[statement] in caplog.text
        for read in (transcripts.open, transcripts.read):
            with pytest.raises(Damaged, match="conversation 'bad' is damaged") as raised:
                read("bad")
            assert (FAULTS | HIDDEN_FAULTS)[statement] in raised.value.flaw
        assert [each.name for each in transcripts.verify()] == ["bad"]
        transcripts.remove("bad")
        assert list(transcripts.verify()) == []
        assert texts(transcripts, "good") == ["a", "b", "c"]
    assert rows(tmp_path) == 3
    transcripts.close()


@pytest.mark.parametrize("name", ["X'6261FF'", "CAST(X'6261FF' AS TEXT)"])
def test_one_whose_name_is_no_text_is_removed_by_what_is_shown(name: str, tmp_path: Path) -> None:
    spoil(tmp_path, f"UPDATE sessions SET name = {name} WHERE name = 'bad'")
    transcripts = Transcripts(tmp_path)
    assert [each.name for each in transcripts.verify()] == ["ba\N{REPLACEMENT CHARACTER}"]
    transcripts.remove("ba\N{REPLACEMENT CHARACTER}")
    assert list(transcripts.verify()) == []
    assert texts(transcripts, "good") == ["a", "b", "c"]
    transcripts.close()


# ---- trouble ---------------------------------------------------------------------------------------------------------
def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "sessions.sqlite").write_bytes(b"This is no database, but some text. " * 100)
    with pytest.raises(CpucacheError, match=f"can't save conversations in {tmp_path}: "):
        Transcripts(tmp_path)
    # It is somebody's: it stays.
    assert (tmp_path / "sessions.sqlite").read_bytes().startswith(b"This is no database")


def damaged(folder: Path) -> None:
    transcripts = Transcripts(folder)
    talk = transcripts.open("talk")
    for number in range(300):
        talk.put(number, [entry(f"message {number} " * 10)])
    talk.close()
    transcripts.close()
    path = folder / "sessions.sqlite"
    content = bytearray(path.read_bytes())
    page = 4096
    # The schema on the first page is whole: it opens.
    for begin in range(page, len(content), page):
        content[begin : begin + page] = bytes(255 for _ in range(len(content[begin : begin + page])))
    path.write_bytes(content)


def test_a_damaged_file(tmp_path: Path) -> None:
    damaged(tmp_path)
    with pytest.raises(CpucacheError, match=r"sessions|conversations"):
        transcripts = Transcripts(tmp_path)
        transcripts.open("talk")


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CpucacheError, match="can't save conversations in"):
        Transcripts(tmp_path / "file" / "sessions")


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CPUCACHE_SESSIONS", str(tmp_path / "here"))
    assert default_sessions() == tmp_path / "here"
    opened = Transcripts()
    assert opened.folder == tmp_path / "here"
    opened.close()
    monkeypatch.delenv("CPUCACHE_SESSIONS")
    assert default_sessions().name == "sessions"

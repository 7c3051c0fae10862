"""What may happen to the file of the conversations: one is damaged, and named; the others are as they were."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpucache.errors import CpucacheError
from cpucache.sessions import Entry, Transcripts
from cpucache.sessions.export import as_json, as_markdown
from tests.support.changes import changes
from tests.support.sessions import patience
from tests.support.tries import tries

PATIENCE = 60
COLUMNS = ("id", "before", "role", "left_out", "metrics", "created", "text", "pieces")
PIECES = {"parts": [[1, 2]], "pending": [3]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["parts", "pending", "spans", "tokens", "key", "role", "open", "asks"]), inner
        )
    ),
    max_leaves=6,
)
VALUES = (
    st.none()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.integers(0, 8)
    | st.floats()
    | st.binary(max_size=8)
    | st.text(max_size=8)
    | st.sampled_from(["system", "user", "assistant", "prompt", "[" * 100_000, "\x1b[2J", "\udcff", "good"])
    | JSON.map(json.dumps)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three conversations: ``bad``, of entries 1 to 4, ``good``, and ``fork``, which begins as ``good`` does."""
    created = tmp_path_factory.mktemp("good")
    transcripts = Transcripts(created)
    for name in ("bad", "good"):
        with contextlib.closing(transcripts.open(name, fingerprint="f", model="m")) as talk:
            talk.put(0, [Entry("system", "s", PIECES), Entry("user", "a", PIECES), Entry("assistant", "b", PIECES, 1)])
            if name == "good":
                talk.fork("fork")
            talk.put(3, [Entry("user", f"last of {name}", PIECES, metrics={"tokens": 3})])
    transcripts.close()
    return created


def change(draw: st.DrawFn) -> Callable[[sqlite3.Connection], None]:
    """A change of a row of ``bad``."""
    number, value, other = draw(st.integers(1, 4)), draw(VALUES), draw(VALUES)
    column = draw(st.sampled_from(COLUMNS))
    statement, values = draw(
        st.sampled_from(
            [
                (f"UPDATE entries SET {column} = ? WHERE id = ?", (value, number)),
                (f"UPDATE entries SET {column} = ? WHERE id = ?", (value, number)),
                ("DELETE FROM entries WHERE id = ?", (number,)),
                ("UPDATE sessions SET last = ? WHERE name = 'bad'", (value,)),
                ("UPDATE sessions SET used = ?, model = ? WHERE name = 'bad'", (value, other)),
                ("UPDATE sessions SET created = ?, fingerprint = ? WHERE name = 'bad'", (value, other)),
                ("UPDATE sessions SET name = ? WHERE name = 'bad'", (value,)),
                ("INSERT INTO entries VALUES (?, ?, 'user', 0, '{}', 0, '', '{}')", (value, other)),
            ]
        )
    )

    def apply(database: sqlite3.Connection) -> None:
        # What the file itself refuses can't have happened to it.
        with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
            database.execute(statement, values)

    return apply


def used(transcripts: Transcripts, name: str) -> None:
    """Everything that commands do with a conversation."""
    entries, summary = transcripts.read(name), transcripts.summary(name)
    json.dumps(as_json(entries, summary))
    as_markdown(entries, summary).encode()
    with contextlib.closing(transcripts.open(name)) as talk:
        talk.put(len(talk.entries), [Entry("user", "more", PIECES)])


@tries(100)
@given(st.lists(st.composite(change)(), min_size=1, max_size=4))
def test_changed_rows_cost_no_other_conversation(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, steps: list[Callable[[sqlite3.Connection], None]]
) -> None:
    copied = tmp_path_factory.getbasetemp() / "rows"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder, copied)
    with contextlib.closing(sqlite3.connect(copied / "sessions.sqlite", isolation_level=None)) as database:
        for step in steps:
            step(database)
        names = [row[0] for row in database.execute("SELECT name FROM sessions")]
    with contextlib.closing(Transcripts(copied)) as transcripts, patience(PATIENCE):
        assert {"good", "fork"} <= {each.name for each in transcripts.summaries()}
        damaged = {each.name for each in transcripts.verify()}
        for name in (name for name in names if isinstance(name, str) and name not in ("good", "fork")):
            try:
                used(transcripts, name)
            except CpucacheError:
                continue
            assert name not in damaged
        for name in damaged - {"good", "fork"}:
            transcripts.remove(name)
        assert {each.name for each in transcripts.verify()} <= damaged
        for name, last in (("good", "last of good"), ("fork", "b")):
            assert [each.text for each in transcripts.read(name)][-1] == last
            used(transcripts, name)


@example([lambda good: good.replace(b"TABLE sessions", b"TABLE sess\x1cons")])
@tries(100)
@given(st.lists(changes(), min_size=1, max_size=3))
def test_a_changed_file_is_read_or_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, steps: list[Callable[[bytes], bytes]]
) -> None:
    copied = tmp_path_factory.getbasetemp() / "bytes"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder, copied)
    content = (copied / "sessions.sqlite").read_bytes()
    for step in steps:
        content = step(content)
    (copied / "sessions.sqlite").write_bytes(content)
    read: set[str] = set()
    damaged: set[str] = set()
    told: list[str] = []
    try:
        with patience(PATIENCE), contextlib.closing(Transcripts(copied)) as transcripts:
            names = [summary.name for summary in transcripts.summaries()]
            damaged = {each.name for each in transcripts.verify()}
            for name in names:
                try:
                    used(transcripts, name)
                    read.add(name)
                except CpucacheError as error:
                    told.append(str(error))
    except CpucacheError as error:
        told.append(str(error))
    assert read.isdisjoint(damaged), "what verify calls damaged is refused"
    assert all(message and len(message.splitlines()) == 1 for message in told)

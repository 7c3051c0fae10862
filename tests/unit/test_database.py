"""SQLite files opened by several processes at the same moment."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cpucache import database
from cpucache.database import open_database

SCHEMA = "CREATE TABLE IF NOT EXISTS things (name TEXT)"
OPEN = """
import sys
from pathlib import Path
from cpucache.database import open_database
print("ready", flush=True)
for number in sys.stdin.readline().split():
    path = Path(sys.argv[1], number)
    open_database(path, "CREATE TABLE IF NOT EXISTS things (name TEXT)", synchronous="NORMAL").close()
"""


def test_processes_may_create_one_file_at_the_same_moment(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        files = " ".join(str(number) for number in range(60))
        for process in processes:
            assert process.stdin
            process.stdin.write(files + "\n")
            process.stdin.flush()
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert errors == ["", "", "", ""]


@pytest.fixture
def writing(tmp_path: Path) -> sqlite3.Connection:
    """Somebody in the middle of writing to a new file that has no log yet."""
    somebody = sqlite3.connect(tmp_path / "file", isolation_level=None, check_same_thread=False)
    somebody.execute("CREATE TABLE others (name TEXT)")
    somebody.execute("BEGIN EXCLUSIVE")
    return somebody


def test_a_file_that_is_locked_is_waited_for(tmp_path: Path, writing: sqlite3.Connection) -> None:
    done = threading.Timer(0.2, writing.execute, ["COMMIT"])
    done.start()
    opened = open_database(tmp_path / "file", SCHEMA, synchronous="FULL")
    done.join()
    assert opened.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert opened.execute("PRAGMA synchronous").fetchone() == (2,)
    assert opened.execute("SELECT count(*) FROM things").fetchone() == (0,)
    opened.close()
    writing.close()


def test_not_for_ever(tmp_path: Path, writing: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WAIT", 0.1)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        open_database(tmp_path / "file", SCHEMA, synchronous="NORMAL")
    writing.close()


def test_what_is_no_database_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no database at all, and long enough to be read as one" * 20)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_database(tmp_path / "file", SCHEMA, synchronous="NORMAL")

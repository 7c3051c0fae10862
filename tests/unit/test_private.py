"""Files and folders that only their owner may read, whatever the umask."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpucache.database import open_database
from cpucache.private import private_file, private_folder

SCHEMA = "CREATE TABLE IF NOT EXISTS things (name TEXT)"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture(params=[0o000, 0o022], ids=oct, autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_folders_that_are_created(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    private_folder(tmp_path / "a/b/c")
    private_folder(tmp_path / "a/b/c")
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3
    assert not caplog.records


def test_a_folder_that_is_there_is_left_and_spoken_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    for _ in range(2):
        private_folder(there)
    private_folder(there / "below")
    assert (mode(there), mode(there / "below")) == (0o755, 0o700)
    assert [record.getMessage() for record in caplog.records] == [
        f"other users can see which files are in {there}; `chmod 700 {there}` keeps them out"
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = tmp_path / "there"
    there.mkdir(0o700)
    os.chown(there, 12345, 12345)
    private_folder(there)
    assert "belongs to another user" in caplog.text


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        private_folder(tmp_path / "file")


def test_files(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("as it was")
    old.chmod(0o666)
    for file in (old, new):
        private_file(file)
        private_file(file)
    assert (mode(old), mode(new), old.read_text(), new.read_text()) == (0o600, 0o600, "as it was", "")


def test_what_is_no_file_stays_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = mode(tmp_path / "fifo")
    private_file(tmp_path / "fifo")
    assert mode(tmp_path / "fifo") == before


def test_databases(tmp_path: Path) -> None:
    """New ones and those of a careless past, with their logs."""
    tmp_path.chmod(0o755)
    old = sqlite3.connect(tmp_path / "old")
    old.executescript(f"PRAGMA journal_mode = WAL; {SCHEMA}")
    assert mode(tmp_path / "old") & 0o044
    opened = [open_database(tmp_path / name, SCHEMA, synchronous="NORMAL") for name in ("old", "new")]
    for database in opened:
        database.execute("INSERT INTO things VALUES ('one')")
    modes = {path.name: mode(path) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("old", "old-wal", "old-shm", "new", "new-wal", "new-shm"), 0o600)
    for database in (old, *opened):
        database.close()

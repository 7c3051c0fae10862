"""``cpucache cache``: what it lists and counts, and what it does to the store."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from cpucache.cli.main import cli
from cpucache.errors import CpucacheError
from cpucache.store import Fingerprints, Kept, SliceInfo, Store, slice_key
from cpucache.store.slicefile import SliceFiles, file_size
from tests.support.command import PROMPT, SCHEMA, cpucache, invoke

DAY = 86400.0
NOBODY = 65534
INFO = SliceInfo("fp", "m", "s", "a", 2, 0, "f", "c", 1.0)


class Shop:
    """A store with five slices: a schema for two models, and another schema."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = SliceFiles(folder / "slices")
        self.keys: dict[str, str] = {}
        with self.store() as store:
            for number, name in enumerate(
                ("small/shop/", "small/shop/a", "small/shop/b", "large/shop/a", "small/docs/x")
            ):
                self.keys[name] = self.put(store, name, number)

    def store(self, **settings: Any) -> Store:
        return Store(self.folder, ram_budget=0, **settings)

    def put(self, store: Store, name: str, number: int) -> str:
        model, schema, module = name.split("/")
        tokens = np.arange(number + 1, dtype=np.int32)
        key = slice_key(f"hash of {model}", "format", "context", tokens, 0)
        info = SliceInfo(f"hash of {model}", model, schema, module, number + 1, 0, "format", "context", number + 1.0)
        store.put(key, np.full(1000 * (number + 1), number, np.uint8), tokens, info)
        store.flush()
        return key

    def use(self, **times: int) -> None:
        """Use the slices of ``small``, by module: ``a=3``."""
        with self.store() as store:
            for module, count in times.items():
                for _ in range(count):
                    assert store.get(self.keys[f"small/shop/{module}"]) is not None

    def age(self, name: str, days: float) -> None:
        """Sets the last use of a slice to so many days ago."""
        with self.store() as store:
            assert store.index is not None
            store.index._database.execute(
                "UPDATE slices SET used = ? WHERE key = ?", (time.time() - days * DAY, self.keys[name])
            )

    @property
    def there(self) -> set[str]:
        """Names of the slices that are listed, each of which has its file, and the other way round."""
        with self.store() as store:
            assert store.index is not None
            keys = {row.key for row in store.index.rows()}
        assert keys == set(self.files)
        return {name for name, key in self.keys.items() if key in keys}


@pytest.fixture
def shop(store_home: Path) -> Shop:
    return Shop(store_home)


def cache(*arguments: str | Path, status: int = 0) -> str:
    """Run a command here; gives what it prints."""
    result: Result = CliRunner().invoke(cli, ["cache", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.stdout


def listed(*arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(cache("ls", "--json", *arguments))
    return rows


def names(*arguments: str) -> list[str]:
    return [f"{row['model']}/{row['schema']}/{row['module']}" for row in listed(*arguments)]


# ---- ls --------------------------------------------------------------------------------------------------------------


def test_ls_json_has_everything(shop: Shop) -> None:
    shop.use(a=2)
    row = next(row for row in listed() if row["key"] == shop.keys["small/shop/a"])
    assert abs(row.pop("used") - time.time()) < 600
    assert abs(row.pop("created") - time.time()) < 600
    assert row == {
        "key": shop.keys["small/shop/a"],
        "schema": "shop",
        "module": "a",
        "model": "small",
        "tokens": 2,
        "start": 0,
        "bytes": shop.files.path(shop.keys["small/shop/a"]).stat().st_size,
        "hits": 2,
        "pinned": False,
        "seconds": 2.0,
        "state_format": "format",
    }


def test_ls_sorts(shop: Shop) -> None:
    shop.use(b=3, a=1)
    shop.age("large/shop/a", 3)
    every = set(shop.keys)
    for order in ("used", "created", "bytes", "tokens", "hits", "module"):
        assert set(names("--sort", order)) == every
    assert names("--sort", "hits")[:2] == ["small/shop/b", "small/shop/a"]
    by_size = ["small/docs/x", "large/shop/a", "small/shop/b", "small/shop/a", "small/shop/"]
    assert names("--sort", "bytes") == names("--sort", "tokens") == names("--sort", "created") == by_size
    assert names("--sort", "module") == ["large/shop/a", "small/docs/x", "small/shop/", "small/shop/a", "small/shop/b"]
    assert names()[-1] == names("--sort", "used")[-1] == "large/shop/a"


def test_ls_selects(shop: Shop) -> None:
    shop.age("small/shop/b", 31)
    shop.age("small/docs/x", 29)
    assert set(names("--schema", "docs")) == {"small/docs/x"}
    assert set(names("-m", "large")) == {"large/shop/a"}
    assert set(names("--schema", "shop", "-m", "small")) == {"small/shop/", "small/shop/a", "small/shop/b"}
    assert names("--older", "30d") == ["small/shop/b"]
    assert set(names("--older", "48h")) == {"small/shop/b", "small/docs/x"}
    assert names("--older", "48h", "--schema", "docs") == ["small/docs/x"]
    assert names("--schema", "no such") == []


def test_ls_prints_a_table(shop: Shop) -> None:
    shop.use(a=1234)
    shop.age("small/docs/x", 3)
    cache("pin", "docs")
    done = cpucache("cache", "ls", "--sort", "bytes", COLUMNS="120")
    assert (done.status, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines() if line.strip()]
    assert lines[0] == ["schema", "module", "model", "tokens", "size", "hits", "used"]
    assert lines[2] == ["docs", "(pinned)", "x", "small", "5", "5.5", "kB", "0", "3", "d", "ago"]
    assert lines[5] == ["shop", "a", "small", "2", "2.5", "kB", "1,234", "just", "now"]
    assert lines[6][:3] == ["shop", "(schema)", "small"]
    assert lines[7] == ["5", "slices,", "17.6", "kB"]


def test_an_empty_store_is_no_error() -> None:
    assert listed() == []
    assert "0 slices" in cache("ls")
    assert "no look-ups yet" in cache("stats")
    assert cache("verify").strip() == "0 slices, 0 damaged or missing"
    assert "0 bytes freed" in cache("gc")


# ---- stats -----------------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(shop: Shop) -> None:
    shop.use(a=5, b=2)
    with shop.store() as store:
        store.missed(3)
    cache("gc", "--disk", "20000")
    with shop.store(disk_budget=20_000) as store:
        shop.put(store, "large/big/x", 8)  # 9000 bytes
    result = json.loads(cache("stats", "--json"))
    rows = listed()
    assert result.pop("budget") > 20_000
    assert result.pop("evicted") == 6 - len(rows) >= 1
    assert result.pop("models") == {
        model: sum(row["bytes"] for row in rows if row["model"] == model) for model in ("small", "large")
    }
    assert result == {
        "slices": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
        "hits": 7,
        "misses": 3,
        "hit_rate": 0.7,
        "seconds_saved": 5 * 2.0 + 2 * 3.0,
    }
    text = cache("stats")
    assert "70.0% of 10 look-ups" in text
    assert "16 s" in text


def test_stats_of_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "schema.xml").write_text(SCHEMA)
    (tmp_path / "prompt.xml").write_text(PROMPT)
    run = (
        "run",
        tmp_path / "prompt.xml",
        "-s",
        tmp_path / "schema.xml",
        "-m",
        tiny("llama"),
        "-n",
        "2",
        "--threads",
        "1",
    )
    invoke(*run)
    first = json.loads(cache("stats", "--json"))
    assert first["slices"] == first["misses"] > 0
    invoke(*run)
    second = json.loads(cache("stats", "--json"))
    assert second["misses"] == first["misses"]
    assert second["hits"] > first["hits"]
    assert second["seconds_saved"] > first["seconds_saved"]
    assert {row["schema"] for row in listed()} == {"shop"}
    assert cache("verify").endswith(" 0 damaged or missing\n")


# ---- verify and gc ---------------------------------------------------------------------------------------------------


def test_verify_finds_and_repairs(shop: Shop) -> None:
    damaged = shop.files.path(shop.keys["small/shop/a"])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    shop.files.drop(shop.keys["small/shop/b"])
    with shop.store() as store:
        assert store.index is not None
        store.index.remove([shop.keys["small/docs/x"]])
    (damaged.parent / ".temporary").write_bytes(b"x" * 100)

    def kinds(text: str) -> list[str]:
        return sorted(line.split(":")[0] for line in text.splitlines()[:-1])

    for _ in range(2):  # looking changes nothing
        text = cache("verify", status=1)
        assert kinds(text) == ["damaged", "leftover", "missing", "unlisted"]
        assert shop.keys["small/shop/a"] in text and "content has changed" in text
        assert text.endswith("2 damaged or missing\n")
    assert kinds(cache("verify", "--repair")) == ["damaged", "leftover", "missing", "unlisted"]
    assert shop.there == {"small/shop/", "large/shop/a", "small/docs/x"}
    # What was set aside is left for inspection, and no fault.
    assert kinds(cache("verify")) == ["leftover", "leftover"]


def test_slices_of_another_version_are_no_damage(shop: Shop) -> None:
    path = shop.files.path(shop.keys["small/shop/a"])
    path.write_bytes(path.read_bytes().replace(b"cpucache-slice-", b"cpucache-slide-"))
    for arguments in ((), ("--repair",)):
        text = cache("verify", *arguments)
        assert text.startswith("outdated: ") and "a slice of another version of cpucache" in text
    assert cache("verify") == "4 slices, 0 damaged or missing\n"
    assert not path.exists()


def test_gc_clears_up(shop: Shop) -> None:
    folder = shop.files.path(shop.keys["small/docs/x"]).parent
    old, young, aside = folder / ".old", folder / ".young", folder / "x.damaged"
    for path, size in ((old, 300), (young, 100), (aside, 200)):
        path.write_bytes(b"x" * size)
    os.utime(old, (1, 1))
    shop.files.drop(shop.keys["small/shop/b"])
    with shop.store() as store:
        assert store.index is not None
        store.index.remove([shop.keys["large/shop/a"]])
    assert cache("gc").strip() == "500 bytes freed"
    assert [path.exists() for path in (old, young, aside)] == [False, True, False]
    assert shop.there == set(shop.keys) - {"small/shop/b"}


# ---- rm and pin ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "left"),
    [
        (("--schema", "docs"), {"small/shop/", "small/shop/a", "small/shop/b", "large/shop/a"}),
        (("-m", "small"), {"large/shop/a"}),
        (("--schema", "shop", "-m", "large"), {"small/shop/", "small/shop/a", "small/shop/b", "small/docs/x"}),
        (("--older", "30d"), {"small/shop/", "small/shop/a", "large/shop/a", "small/docs/x"}),
        (("--all",), set()),
        (
            ("--older", "90d", "-m", "small"),
            {"small/shop/", "small/shop/a", "small/shop/b", "large/shop/a", "small/docs/x"},
        ),
    ],
    ids=["schema", "model", "schema and model", "older", "all", "older and model"],
)
def test_rm_deletes_what_is_named(which: tuple[str, ...], left: set[str], shop: Shop) -> None:
    shop.age("small/shop/b", 31)
    cache("pin", "docs")
    assert cache("rm", *which).startswith(f"{5 - len(left)} slices deleted")
    assert shop.there == left


def test_pinned_slices_stay_until_they_are_unpinned(shop: Shop) -> None:
    assert cache("pin", "shop", "-m", "small").strip() == "3 slices pinned"
    assert {row["module"] for row in listed("-m", "small") if row["pinned"]} == {"", "a", "b"}
    cache("gc", "--disk", "17500")
    with shop.store(disk_budget=17_500) as store:
        shop.put(store, "small/big/x", 8)
    assert shop.there == {"small/shop/", "small/shop/a", "small/shop/b"}
    assert cache("pin", "shop", "--off").strip() == "3 slices unpinned"
    with shop.store(disk_budget=17_500) as store:
        shop.put(store, "small/big/y", 15)
    assert shop.there == set()


# ---- packs -----------------------------------------------------------------------------------------------------------


def test_a_schema_goes_from_store_to_store(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = tmp_path / "shop.pack"
    assert cache("export", "shop", "-m", "small", "-o", pack).startswith(f"{pack}: 3 slices for small, ")
    monkeypatch.setenv("CPUCACHE_HOME", str(tmp_path / "other"))
    assert cache("import", pack) == "3 slices for small, 3 of them new\n"
    assert cache("import", pack) == "3 slices for small, 0 of them new\n"
    assert set(names()) == {"small/shop/", "small/shop/a", "small/shop/b"}
    assert cache("verify") == "3 slices, 0 damaged or missing\n"


def test_a_pack_can_be_bound_to_a_model(tiny: Callable[..., Path], tmp_path: Path, store_home: Path) -> None:
    model = tiny("llama")
    key = slice_key(fingerprint := Fingerprints(None).of(model), "f", "c", np.arange(2, dtype=np.int32), 0)
    with Store(store_home, ram_budget=0) as store:
        info = SliceInfo(fingerprint, model.stem, "s", "m", 2, 0, "f", "c", 1.0)
        store.put(key, np.zeros(10, np.uint8), np.arange(2, dtype=np.int32), info)
    cache("export", "s", "-o", tmp_path / "s.pack")
    cache("rm", "--all")
    refused = cpucache("cache", "import", tmp_path / "s.pack", "-m", tiny("qwen2"))
    assert (refused.status, refused.out) == (2, "")
    assert "the pack is for another model" in refused.err
    assert listed() == []
    assert "1 of them new" in cache("import", tmp_path / "s.pack", "-m", model)


def test_a_model_goes_by_its_path_and_by_its_name_in_the_catalogue(
    tiny: Callable[..., Path], tmp_path: Path, store_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``encode -m`` takes it."""
    model, twin = tiny("llama"), tmp_path / tiny("llama").name
    shutil.copy(tiny("qwen2"), twin)  # another model in a file of the same name
    with Store(store_home, ram_budget=0) as store:
        tokens = np.arange(2, dtype=np.int32)
        for number, path in enumerate((model, twin)):
            info = SliceInfo(Fingerprints(None).of(path), path.stem, "s", f"m{number}", 2, 0, "f", "c", 1.0)
            store.put(slice_key(info.fingerprint, "f", "c", tokens, 0), np.zeros(10, np.uint8), tokens, info)
    assert [row["module"] for row in listed("-m", str(model))] == ["m0"]
    assert [row["module"] for row in listed("-m", str(twin))] == ["m1"]
    assert len(listed("-m", model.stem)) == 2
    assert "1 slices for" in cache("export", "s", "-m", model, "-o", tmp_path / "s.pack")
    monkeypatch.setenv("CPUCACHE_MODELS", str(model.parent))
    assert [row["module"] for row in listed("-m", model.name)] == ["m0"]


def test_export_says_what_is_missing(store_home: Path, tmp_path: Path) -> None:
    tokens = np.arange(2, dtype=np.int32)

    def put(store: Store, schema: str, number: int) -> str:
        key = slice_key("fp", "f", "c", tokens, number)
        info = SliceInfo("fp", "m", schema, f"m{number}", 2, number, "f", "c", 1.0)
        store.put(key, np.zeros(1 << 20, np.uint8), tokens, info)
        return key

    # Their names are equally long, and so are their files.
    size = file_size("0" * 32, SliceInfo("fp", "m", "s", "m0", 2, 0, "f", "c", 1.0), 1 << 20)
    with Store(store_home, ram_budget=0, disk_budget=3 * size) as store:
        keys = [put(store, "s", number) for number in range(7)]
        kept = store.kept(keys)
        assert kept == Kept(3, 3 * size, 4, 7 * size)
    done = cpucache("cache", "export", "s", "-o", tmp_path / "s.pack")
    assert (done.status, done.out.split(": ")[1][:8]) == (0, "3 slices")
    assert "4 slices of s are not in it: they were evicted, or did not fit" in done.err
    assert "encode it again with --disk 8MiB" in done.err
    with Store(store_home, ram_budget=0, disk_budget=kept.budget) as store:
        for number in range(7):
            put(store, "s", number)
        assert store.kept(keys).missing == 0
    done = cpucache("cache", "export", "s", "-o", tmp_path / "s.pack")
    assert (done.status, done.err) == (0, "")


def test_packs_are_signed_and_checked(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (tmp_path / "key.pub").write_bytes(public)
    pack = tmp_path / "shop.pack"
    assert cache("export", "docs", "-o", pack, "--sign", tmp_path / "key").endswith(", signed\n")
    monkeypatch.setenv("CPUCACHE_HOME", str(tmp_path / "other"))
    assert cache("import", pack, "--key", tmp_path / "key.pub") == "1 slices for small, 1 of them new\n"
    monkeypatch.setenv("CPUCACHE_HOME", str(shop.folder))
    cache("export", "docs", "-o", pack)
    done = cpucache("cache", "import", pack, "--key", tmp_path / "key.pub")
    assert (done.status, done.out) == (2, "")
    assert "it is not signed; nothing was imported" in done.err


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ls", "--older", "soon"), "'soon' is not an age; write for example 12h or 30d"),
        (("ls", "--sort", "colour"), "is not one of"),
        (("rm",), "select slices with --schema, -m, --older, or --all"),
        (("pin", "no such"), "there are no slices of schema 'no such'"),
        (("export", "no such", "-o", "out"), "encode the schema first"),
        (("export", "shpo", "-o", "out"), "there are no slices of schema 'shpo' (did you mean 'shop'?)"),
        (("export", "shop", "-m", "smal", "-o", "out"), "model 'smal' (did you mean 'small'?)"),
        (("export", "shop", "-o", "out"), "belong to 2 models; name one with -m"),
        (("import", "not there"), "there is no such file"),
        (("import", "nonsense"), "not a pack"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_mistakes_are_told_in_one_line(arguments: tuple[str, ...], message: str, shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("no pack")
    done = cpucache("cache", *arguments, cwd=tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert shop.there == set(shop.keys)


def test_deleting_what_is_not_there_is_a_failure(shop: Shop) -> None:
    for arguments, message in (
        (("--schema", "shpo"), "there are no slices of schema 'shpo' (did you mean 'shop'?)"),
        (("-m", "large", "--schema", "docs"), "there are no slices of schema 'docs' and model 'large'"),
        (("-m", "medium"), "there are no slices of model 'medium'"),
    ):
        done = cpucache("cache", "rm", *arguments)
        assert (done.status, done.out) == (1, "")
        assert message in done.err
    assert shop.there == set(shop.keys)


@pytest.fixture
def as_nobody() -> Iterator[Callable[[Path], AbstractContextManager[None]]]:
    """Lets a folder be read, by a user who may write nothing there."""

    @contextmanager
    def reading(folder: Path) -> Iterator[None]:
        there = [folder, *folder.rglob("*")]
        for path in there:
            path.chmod(0o500 if path.is_dir() else 0o400)
            if os.geteuid() == 0:
                os.chown(path, NOBODY, -1)
        above = [path for path in folder.parents if path.stat().st_mode & 0o077 == 0] if os.geteuid() == 0 else []
        for path in above:
            path.chmod(0o711)
        was = os.geteuid()
        if was == 0:
            os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(was)
            for path in above:
                path.chmod(0o700)
            for path in there:
                path.chmod(0o700 if path.is_dir() else 0o600)

    yield reading


@pytest.mark.parametrize("log", [False, True], ids=["closed", "in use by others"])
def test_a_store_that_can_only_be_read(log: bool, shop: Shop, as_nobody: Any, caplog: pytest.LogCaptureFixture) -> None:
    other = shop.store() if log else None
    state = np.zeros(10, np.uint8)
    with as_nobody(shop.folder):
        assert set(names()) == set(shop.keys)
        assert json.loads(cache("stats", "--json"))["slices"] == 5
        assert cache("verify") == "5 slices, 0 damaged or missing\n"
        with shop.store() as store:
            assert store.get(shop.keys["small/shop/a"]) is not None
        assert not caplog.messages, "nothing was to be written"
        for arguments in (("gc",), ("rm", "--all"), ("pin", "shop"), ("verify", "--repair")):
            result = CliRunner().invoke(cli, ["cache", *arguments])
            assert isinstance(result.exception, CpucacheError)
            assert "can't be written" in str(result.exception)
        with shop.store() as store:
            for key in ("ab" * 16, "cd" * 16):
                store.put(key, state, np.arange(2, dtype=np.int32), INFO)
            assert not store.writable
        assert ["can't save slices in" in message for message in caplog.messages] == [True]
    if other:
        other.close()
    assert shop.there == set(shop.keys)


def test_a_fingerprint_is_found_in_an_index_that_can_only_be_read(store_home: Path, as_nobody: Any) -> None:
    path = store_home / "model"
    path.write_bytes(b"x" * 100)
    first = Fingerprints(store_home / "index.sqlite").of(path)
    read: list[int] = []
    with as_nobody(store_home):
        assert Fingerprints(store_home / "index.sqlite").of(path, read.append) == first
    assert read == []


# ---- names -----------------------------------------------------------------------------------------------------------
NAMES = ("schema \x1b]0;owned\x07", "[red]module[/red] [/]", "two\nlines \x9b31m")


def test_names_give_a_terminal_no_commands(store_home: Path) -> None:
    tokens = np.arange(2, dtype=np.int32)
    with Store(store_home, ram_budget=0) as store:
        info = SliceInfo("fp", NAMES[2], NAMES[0], NAMES[1], 2, 0, "f", "c", 1.0)
        store.put(slice_key("fp", "f", "c", tokens, 0), np.zeros(10, np.uint8), tokens, info)
    for command in ("ls", "stats", "verify"):
        text = on_a_terminal("cache", command)
        assert not {"\x1b]", "\x9b", "\x07"} & {text[at : at + size] for at in range(len(text)) for size in (1, 2)}
        assert "[red]module[/red] [/]" in text or command != "ls"
        assert "two\r\nlines" not in text
    assert listed()[0]["schema"] == NAMES[0]


def on_a_terminal(*arguments: str) -> str:
    """What a command prints on a terminal."""
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "cpucache.cli.main", *arguments]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env={**os.environ, "COLUMNS": "150"}) as process:
        os.close(terminal)
        said = b""
        with contextlib.suppress(OSError):  # the terminal is gone
            while piece := os.read(main, 1 << 16):
                said += piece
        assert process.wait(60) == 0
    os.close(main)
    return said.decode()


def test_narrow_terminals_keep_the_names(store_home: Path) -> None:
    tokens = np.arange(2, dtype=np.int32)
    with Store(store_home, ram_budget=0) as store:
        info = SliceInfo("fp", "model-135m", "support", "answers.refund", 2, 0, "f", "c", 1.0)
        store.put(slice_key("fp", "f", "c", tokens, 0), np.zeros(10, np.uint8), tokens, info)
    for width, gone in (
        (120, ()),
        (80, ()),
        (60, ("hits", "tokens", "used")),
        (40, ("hits", "tokens", "used", "size")),
    ):
        text = cpucache("cache", "ls", COLUMNS=str(width)).out
        assert all(len(line) <= width for line in text.splitlines())
        heads = text.split("\n")[1].split()
        assert heads == [
            name for name in ("schema", "module", "model", "tokens", "size", "hits", "used") if name not in gone
        ]
        joined = "".join(text.split())
        assert all(name in joined for name in ("support", "model-135m"))
    shown = cpucache("models", "list", COLUMNS="40").out
    assert all(name in shown for name in ("smollm2-135m-instruct *", "qwen2.5-coder-1.5b-instruct"))
    assert all(len(line) <= 40 for line in shown.splitlines() if "folder of the weights: " not in line)


def test_a_store_that_can_t_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for command in ("ls", "stats", "verify", "gc"):
        done = cpucache("cache", command, CPUCACHE_HOME=str(tmp_path / "file"))
        assert (done.status, done.out) == (1, ""), command
        assert "can't be opened" in done.err

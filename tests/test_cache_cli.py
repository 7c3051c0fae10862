"""``cpucache cache``: what it lists and counts, and what it does to the store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cpucache.cli.main import cli
from cpucache.store import Fingerprints, SliceInfo, Store, slice_key
from cpucache.store.slicefile import SliceFiles
from tests.support.command import PROMPT, SCHEMA, cpucache, invoke

DAY = 86400.0


class Shop:
    """A store with five slices: a schema for two models, and another schema."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.files = SliceFiles(home / "slices")
        self.keys: dict[str, str] = {}
        with self.store() as store:
            for number, name in enumerate(
                ("small/shop/", "small/shop/a", "small/shop/b", "large/shop/a", "small/docs/x")
            ):
                self.keys[name] = self.put(store, name, number)

    def store(self, **settings: Any) -> Store:
        return Store(self.home, ram_budget=0, **settings)

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
        """Make a slice one that was used so long ago."""
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
        "bytes": 2000,
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
    assert lines[2] == ["docs", "(pinned)", "x", "small", "5", "5.0", "kB", "0", "3", "d", "ago"]
    assert lines[5] == ["shop", "a", "small", "2", "2.0", "kB", "1,234", "just", "now"]
    assert lines[6][:3] == ["shop", "(schema)", "small"]
    assert lines[7] == ["5", "slices,", "15.0", "kB"]


def test_an_empty_store_is_no_error() -> None:
    assert listed() == []
    assert "0 slices" in cache("ls")
    assert "nothing looked up yet" in cache("stats")
    assert cache("verify").strip() == "0 slices, 0 of them bad"
    assert "0 bytes freed" in cache("gc")


# ---- stats -----------------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(shop: Shop) -> None:
    shop.use(a=5, b=2)
    with shop.store() as store:
        store.missed(3)
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
    assert cache("verify").endswith(" 0 of them bad\n")


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
        assert text.endswith("2 of them bad\n")
    assert kinds(cache("verify", "--repair")) == ["damaged", "leftover", "missing", "unlisted"]
    assert shop.there == {"small/shop/", "large/shop/a", "small/docs/x"}
    # What was set aside is left for inspection, and no fault.
    assert kinds(cache("verify")) == ["leftover", "leftover"]


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
        (("--schema", "no such"), {"small/shop/", "small/shop/a", "small/shop/b", "large/shop/a", "small/docs/x"}),
    ],
    ids=str,
)
def test_rm_deletes_what_is_named(which: tuple[str, ...], left: set[str], shop: Shop) -> None:
    shop.age("small/shop/b", 31)
    cache("pin", "docs")
    assert cache("rm", *which).startswith(f"{5 - len(left)} slices deleted")
    assert shop.there == left


def test_pinned_slices_stay_until_they_are_unpinned(shop: Shop) -> None:
    assert cache("pin", "shop", "-m", "small").strip() == "3 slices pinned"
    assert {row["module"] for row in listed("-m", "small") if row["pinned"]} == {"", "a", "b"}
    with shop.store(disk_budget=15_000) as store:
        shop.put(store, "small/big/x", 8)
    assert shop.there == {"small/shop/", "small/shop/a", "small/shop/b"}
    assert cache("pin", "shop", "--off").strip() == "3 slices unpinned"
    with shop.store(disk_budget=15_000) as store:
        shop.put(store, "small/big/y", 14)
    assert shop.there == set()


# ---- packs -----------------------------------------------------------------------------------------------------------


def test_a_schema_goes_from_store_to_store(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = tmp_path / "shop.pack"
    assert cache("export", "shop", "-m", "small", "-o", pack).startswith(f"{pack}: 3 slices for small, ")
    monkeypatch.setenv("CPUCACHE_HOME", str(tmp_path / "other"))
    assert cache("import", pack) == "3 slices for small, 3 of them new\n"
    assert cache("import", pack) == "3 slices for small, 0 of them new\n"
    assert set(names()) == {"small/shop/", "small/shop/a", "small/shop/b"}
    assert cache("verify") == "3 slices, 0 of them bad\n"


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
    assert "it was made for another model" in refused.err
    assert listed() == []
    assert "1 of them new" in cache("import", tmp_path / "s.pack", "-m", model)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ls", "--older", "soon"), "'soon' is no age; write for example 12h or 30d"),
        (("ls", "--sort", "colour"), "is not one of"),
        (("rm",), "say which: --schema, -m, --older, or --all"),
        (("pin", "no such"), "there are no slices of a schema 'no such'"),
        (("export", "no such", "-o", "out"), "encode the schema first"),
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


def test_a_store_that_can_t_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for command in ("ls", "stats", "verify", "gc"):
        done = cpucache("cache", command, CPUCACHE_HOME=str(tmp_path / "file"))
        assert (done.status, done.out) == (1, ""), command
        assert "can't be opened" in done.err

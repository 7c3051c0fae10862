"""Packs: the slices of a schema go from one store to another, or are refused whole."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache import Engine
from cpucache.errors import InputError
from cpucache.store import SliceInfo, Store, slice_key
from cpucache.store.pack import export_pack, import_pack
from cpucache.store.slicefile import SliceFiles
from tests.support.command import PROMPT, SCHEMA
from tests.support.workbench import PLENTY

TOKENS = np.array([5, 6, 7], np.int32)


def put(store: Store, number: int, fingerprint: str = "fp", size: int = 5000) -> str:
    key = slice_key(fingerprint, "format", "context", TOKENS, number)
    state = np.random.default_rng(number).integers(0, 256, size, np.uint8)
    store.put(key, state, TOKENS, SliceInfo(fingerprint, "model", "s", f"m{number}", 3, number, "format", "context", 1))
    store.flush()
    return key


def content(home: Path) -> dict[str, bytes]:
    """Everything below a store's folder but its index."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and not path.name.startswith("index.sqlite")
    }


class Packed:
    """A pack of three slices, and a store that has another one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "pack.tar"
        with Store(folder / "from", ram_budget=0) as store:
            self.keys = [put(store, number) for number in range(3)]
            self.foreign = put(store, 9, "another")
            self.files = store.files
            export_pack(store, self.keys, self.path)
        self.home = folder / "to"
        with Store(self.home, ram_budget=0) as store:
            self.own = put(store, 7)

    def members(self) -> list[tuple[tarfile.TarInfo, bytes]]:
        with tarfile.open(self.path) as tar:
            return [(entry, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]

    def write(self, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        with tarfile.open(self.path, "w") as tar:
            for entry, data in members:
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))

    def add(self, fingerprint: str | None = None) -> int:
        with Store(self.home, ram_budget=0) as store:
            return import_pack(store, self.path, fingerprint=fingerprint)[1]

    def expect_refused(self, match: str, fingerprint: str | None = None) -> None:
        """The pack is refused, and the store is as it was."""
        before = content(self.home)
        with pytest.raises(InputError, match=match) as caught:
            self.add(fingerprint)
        assert "\n" not in str(caught.value)
        assert content(self.home) == before
        with Store(self.home, ram_budget=0) as store:
            assert store.index is not None
            assert [row.key for row in store.index.rows()] == [self.own]
            assert store.index.unfinished(-1) == []
        assert not [path for path in self.folder.rglob("*") if path.name.startswith((".import", "evil"))]


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    return Packed(tmp_path)


def test_slices_come_through_unchanged(packed: Packed) -> None:
    assert packed.add("fp") == 3
    assert packed.add() == 0
    with Store(packed.home, ram_budget=0) as store:
        assert store.files is not None and store.index is not None and packed.files is not None
        assert {row.key for row in store.index.rows()} == {*packed.keys, packed.own}
        for key in packed.keys:
            assert store.files.check(key)
            assert store.files.path(key).read_bytes() == packed.files.path(key).read_bytes()
            assert store.files.info(key) == packed.files.info(key)
    assert not list(packed.home.glob(".import*"))


def test_an_engine_answers_from_imported_slices(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "schema.xml").write_text(SCHEMA)
    settings: dict[str, Any] = {"n_ctx": 1024, "threads": 1, "ram_budget": PLENTY}
    with Engine(tiny("llama"), store=tmp_path / "from", **settings) as engine:
        engine.add_schema(tmp_path / "schema.xml")
        engine.encode("shop")
        first = engine.generate(PROMPT, max_tokens=8)
        engine.store.flush()
        assert engine.store.index is not None
        pack = export_pack(engine.store, [row.key for row in engine.store.index.rows()], tmp_path / "shop.pack")
    assert pack.model == tiny("llama").stem
    with Engine(tiny("llama"), store=tmp_path / "to", **settings) as engine:
        engine.add_schema(tmp_path / "schema.xml")
        assert import_pack(engine.store, tmp_path / "shop.pack") == (pack, len(pack.keys))
        again = engine.generate(PROMPT, max_tokens=8)
        assert (again.text, again.metrics.cached_tokens) == (first.text, first.metrics.cached_tokens)
        assert again.metrics.encoded_tokens == 0 < again.metrics.cached_tokens
        assert engine.encode("shop").slices == 0


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/evil", "../evil", "../../evil", "x/../../evil", "C:\\evil", "evil"])
@pytest.mark.parametrize("instead", [True, False], ids=["instead of a slice", "besides the slices"])
def test_a_name_that_is_no_slice_of_the_pack(name: str, instead: bool, packed: Packed) -> None:
    members = packed.members()
    packed.write([*members[: -1 if instead else None], (tarfile.TarInfo(name), members[-1][1])])
    packed.expect_refused("does not belong into a pack")
    assert not Path("/evil").exists()


@pytest.mark.parametrize("prefix", ["/", "../", "./", "ab/"])
def test_a_slice_under_a_path(prefix: str, packed: Packed) -> None:
    members = packed.members()
    members[2][0].name = prefix + members[2][0].name
    packed.write(members)
    packed.expect_refused("does not belong into a pack")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE],
    ids=["symlink", "hard link", "folder", "fifo", "device"],
)
@pytest.mark.parametrize("instead", [True, False], ids=["instead of a slice", "besides the slices"])
def test_a_member_that_is_no_file(kind: bytes, instead: bool, packed: Packed) -> None:
    members = packed.members()
    entry = tarfile.TarInfo(members[1][0].name if instead else "evil")
    entry.type, entry.linkname = kind, members[2][0].name
    packed.write([*members[:1], (entry, b""), *members[2 if instead else 1 :]])
    packed.expect_refused("does not belong into a pack")


def test_a_manifest_that_is_a_link(packed: Packed) -> None:
    members = packed.members()
    entry = tarfile.TarInfo("pack.json")
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    packed.write([(entry, b""), *members[1:]])
    packed.expect_refused("does not begin with pack.json")


def test_a_slice_twice(packed: Packed) -> None:
    members = packed.members()
    packed.write([*members, members[1]])
    packed.expect_refused("does not belong into a pack")


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_missing_slice(which: int, packed: Packed) -> None:
    members = packed.members()
    packed.write(members[:which] + members[which + 1 :])
    packed.expect_refused("1 of its slices are missing")


def test_a_slice_of_another_model(packed: Packed) -> None:
    assert packed.files is not None
    members = packed.members()
    manifest = json.loads(members[0][1])
    manifest["slices"][1] = packed.foreign
    entry = tarfile.TarInfo(f"{packed.foreign}.safetensors")
    foreign = packed.files.path(packed.foreign).read_bytes()
    packed.write([(members[0][0], json.dumps(manifest).encode()), members[1], (entry, foreign), members[3]])
    packed.expect_refused("belongs to another model")


def test_a_slice_under_the_name_of_another(packed: Packed) -> None:
    members = packed.members()
    packed.write([members[0], (members[1][0], members[2][1]), (members[2][0], members[1][1]), members[3]])
    packed.expect_refused("a slice is damaged")


def test_tokens_that_are_not_those_of_the_key(packed: Packed) -> None:
    members = packed.members()
    data = bytearray(members[1][1])
    at = data.index(TOKENS.tobytes())
    data[at] ^= 1
    packed.write([members[0], (members[1][0], bytes(data)), *members[2:]])
    packed.expect_refused("a slice is damaged")


def test_a_flipped_byte_anywhere_in_a_state(packed: Packed) -> None:
    good = packed.path.read_bytes()
    state = np.random.default_rng(2).integers(0, 256, 5000, np.uint8).tobytes()
    begin = good.index(state)
    for at in (begin, begin + 2500, begin + 4999):
        packed.path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        packed.expect_refused("a slice is damaged")


def test_a_pack_for_another_model_than_asked_for(packed: Packed) -> None:
    packed.expect_refused(r"it was made for another model \(model\)", fingerprint="another")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "cpucache-pack-2"},
        {"fingerprint": "another"},
        {"slices": None},
        {"slices": "abc"},
        {"slices": ["../../evil"]},
        {"slices": [1]},
    ],
    ids=str,
)
def test_a_manifest_that_is_wrong(change: dict[str, Any], packed: Packed) -> None:
    members = packed.members()
    manifest = json.dumps(json.loads(members[0][1]) | change).encode()
    packed.write([(members[0][0], manifest), *members[1:]])
    packed.expect_refused(r"pack.json|another model")


@pytest.mark.parametrize(
    "manifest", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000], ids=lambda text: text[:4]
)
def test_a_manifest_that_is_none(manifest: bytes, packed: Packed) -> None:
    members = packed.members()
    packed.write([(members[0][0], manifest), *members[1:]])
    packed.expect_refused("pack.json can't be read")


def test_a_truncated_pack(packed: Packed) -> None:
    good = packed.path.read_bytes()
    whole = sum(512 + -(-len(data) // 512) * 512 for _, data in packed.members())
    for length in (0, 1, 511, 512, 700, 1024, 1500, 2000, whole // 2, whole - 512, whole - 1000):
        packed.path.write_bytes(good[:length])
        packed.expect_refused(r"pack|missing|truncated")


def test_what_is_no_archive_at_all(packed: Packed) -> None:
    for data in (b"no archive", b"\0" * 10240, b"\x1f\x8b" + b"x" * 5000):
        packed.path.write_bytes(data)
        packed.expect_refused("pack")


def test_a_sparse_member_does_not_fill_the_disk(packed: Packed) -> None:
    members = packed.members()
    entry = tarfile.TarInfo(members[1][0].name)
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    with tarfile.open(packed.path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in [members[0], (entry, b"0\n".ljust(512, b"\0")), *members[2:]]:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    packed.expect_refused("does not belong into a pack")


# ---- exporting, and budgets ------------------------------------------------------------------------------------------


def test_only_whole_slices_of_one_model_are_exported(packed: Packed) -> None:
    target = packed.folder / "new.tar"
    with Store(packed.folder / "from", ram_budget=0) as store:
        assert store.files is not None
        for keys, match in (
            ([], "encode the schema first"),
            ([*packed.keys, "ab" * 16], "encode the schema first"),
            ([*packed.keys, packed.foreign], "belong to 2 models"),
        ):
            with pytest.raises(InputError, match=match):
                export_pack(store, keys, target)
        path = store.files.path(packed.keys[0])
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(InputError, match="cache verify --repair"):
            export_pack(store, packed.keys, target)
    assert not [path for path in packed.folder.iterdir() if path.name.startswith("new.tar")]


def test_memory_alone_has_no_packs(packed: Packed) -> None:
    store = Store(None, ram_budget=PLENTY)
    with pytest.raises(InputError, match="in memory"):
        export_pack(store, packed.keys, packed.folder / "new.tar")
    with pytest.raises(InputError, match="in memory"):
        import_pack(store, packed.path)


def test_a_pack_does_not_evict_itself(packed: Packed) -> None:
    with Store(packed.home, ram_budget=0, disk_budget=11_000) as store:
        assert store.files is not None and store.index is not None
        assert import_pack(store, packed.path)[1] == 2
        assert set(store.files) == {row.key for row in store.index.rows()} == set(packed.keys[:2])


def test_staging_files_are_slice_files(tmp_path: Path, packed: Packed) -> None:
    with Store(tmp_path / "other", ram_budget=0) as store:
        staged = SliceFiles(tmp_path / "staged")
        assert store.adopt(packed.keys[0], staged) is False
        assert packed.files is not None
        assert store.adopt(packed.keys[0], packed.files) is True
        assert store.adopt(packed.keys[0], packed.files) is False
        assert store.get(packed.keys[0]) is not None

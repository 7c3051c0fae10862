"""Packs: the slices of a schema go from one store to another, or are refused whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from cpucache import Engine
from cpucache.errors import CpucacheError, InputError
from cpucache.store import SliceInfo, Store, slice_key
from cpucache.store.pack import export_pack, import_pack
from cpucache.store.slicefile import SliceFiles
from cpucache.store.startup import STAGING
from cpucache.store.upkeep import remove
from tests.support.changes import changes
from tests.support.command import PROMPT, SCHEMA
from tests.support.tries import tries

TOKENS = np.array([5, 6, 7], np.int32)
PLENTY = 1 << 30


def put(store: Store, number: int, fingerprint: str = "fp", size: int = 5000) -> str:
    key = slice_key(fingerprint, "format", "context", TOKENS, number)
    state = np.random.default_rng(number).integers(0, 256, size, np.uint8)
    store.put(key, state, TOKENS, SliceInfo(fingerprint, "model", "s", f"m{number}", 3, number, "format", "context", 1))
    store.flush()
    return key


def content(folder: Path) -> dict[str, bytes]:
    """Everything below a store's folder but its index."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
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
        self.target = folder / "to"
        with Store(self.target, ram_budget=0) as store:
            self.own = put(store, 7)

    def members(self) -> list[tuple[tarfile.TarInfo, bytes]]:
        with tarfile.open(self.path) as tar:
            return [(entry, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]

    def write_with_manifest(self, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        """Writes members with a manifest that describes them, as in a new pack."""
        manifest = json.loads(members[0][1])
        manifest["slices"] = [
            {"key": entry.name[:32], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for entry, data in members[1:]
        ]
        self.write([(members[0][0], json.dumps(manifest).encode()), *members[1:]])

    def write(self, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        with tarfile.open(self.path, "w") as tar:
            for entry, data in members:
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))

    def add(self, fingerprint: str | None = None, key: Path | None = None) -> int:
        with Store(self.target, ram_budget=0) as store:
            return import_pack(store, self.path, fingerprint=fingerprint, key=key)[1]

    def expect_refused(self, match: str, fingerprint: str | None = None) -> None:
        """The pack is refused, and the store is as it was."""
        before = content(self.target)
        with pytest.raises(InputError, match=match) as caught:
            self.add(fingerprint)
        assert "\n" not in str(caught.value)
        assert content(self.target) == before
        with Store(self.target, ram_budget=0) as store:
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
    with Store(packed.target, ram_budget=0) as store:
        assert store.files is not None and store.index is not None and packed.files is not None
        assert {row.key for row in store.index.rows()} == {*packed.keys, packed.own}
        for key in packed.keys:
            assert store.files.check(key)
            assert store.files.path(key).read_bytes() == packed.files.path(key).read_bytes()
            assert store.files.info(key) == packed.files.info(key)
    assert not list(packed.target.glob(".import*"))


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
    packed.expect_refused("does not belong in a pack")
    assert not Path("/evil").exists()


@pytest.mark.parametrize("prefix", ["/", "../", "./", "ab/"])
def test_a_slice_under_a_path(prefix: str, packed: Packed) -> None:
    members = packed.members()
    members[2][0].name = prefix + members[2][0].name
    packed.write(members)
    packed.expect_refused("does not belong in a pack")


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
    packed.expect_refused("does not belong in a pack")


def test_a_manifest_that_is_a_link(packed: Packed) -> None:
    members = packed.members()
    entry = tarfile.TarInfo("pack.json")
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    packed.write([(entry, b""), *members[1:]])
    packed.expect_refused("does not begin with pack.json")


def test_a_slice_twice(packed: Packed) -> None:
    members = packed.members()
    packed.write([*members, members[1]])
    packed.expect_refused("does not belong in a pack")


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_missing_slice(which: int, packed: Packed) -> None:
    members = packed.members()
    packed.write(members[:which] + members[which + 1 :])
    packed.expect_refused("1 of its slices are missing")


def test_a_slice_of_another_model(packed: Packed) -> None:
    assert packed.files is not None
    members = packed.members()
    foreign = packed.files.path(packed.foreign).read_bytes()
    members[2] = (tarfile.TarInfo(f"{packed.foreign}.safetensors"), foreign)
    packed.write_with_manifest(members)
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
    packed.expect_refused(r"the pack is for another model \(model\)", fingerprint="another")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "cpucache-pack-1"},
        {"fingerprint": "another"},
        {"slices": None},
        {"slices": "abc"},
        {"slices": ["../../evil"]},
        {"slices": [1]},
        {"slices": [{"key": "ab" * 16, "bytes": -1, "sha256": "ab" * 32}]},
        {"slices": [{"key": "ab" * 16, "bytes": 1 << 70, "sha256": "ab" * 32}]},
        {"slices": [{"key": "ab" * 16, "bytes": 10.0, "sha256": "ab" * 32}]},
        {"slices": [{"key": "ab" * 16, "bytes": 10, "sha256": None}]},
        {"slices": [{"key": ["ab"] * 32, "bytes": 10, "sha256": "ab" * 32}]},
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


@tries(150)
@given(steps=st.lists(changes(), min_size=1, max_size=3))
def test_a_pack_brings_what_was_packed_or_nothing(steps: list[Callable[[bytes], bytes]], packed: Packed) -> None:
    whole = packed.path.read_bytes()
    before = content(packed.target)
    changed = whole
    for step in steps:
        changed = step(changed)
    packed.path.write_bytes(changed)
    try:
        packed.add()
        assert packed.files is not None
        added = SliceFiles(packed.target / "slices")
        for key in packed.keys:
            assert added.path(key).read_bytes() == packed.files.path(key).read_bytes()
        with Store(packed.target, ram_budget=0) as store:
            remove(store, packed.keys)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        packed.path.write_bytes(whole)
    assert content(packed.target) == before


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
    packed.expect_refused("does not belong in a pack")


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


def test_a_store_in_memory_only_has_no_packs(packed: Packed) -> None:
    store = Store(None, ram_budget=PLENTY)
    with pytest.raises(InputError, match="in memory"):
        export_pack(store, packed.keys, packed.folder / "new.tar")
    with pytest.raises(InputError, match="in memory"):
        import_pack(store, packed.path)


def test_a_pack_does_not_evict_itself(packed: Packed) -> None:
    with Store(packed.target, ram_budget=0, disk_budget=17_000) as store:
        assert store.files is not None and store.index is not None
        store.index.pin([packed.own], pinned=True)
        assert import_pack(store, packed.path)[1] == 2
        assert set(store.files) == {row.key for row in store.index.rows()} == {packed.own, *packed.keys[:2]}


def test_a_pack_fits_a_store_whose_budget_is_the_size_of_its_slices(packed: Packed) -> None:
    """What a store counts, a pack counts, too."""
    with Store(packed.folder / "from", ram_budget=0) as store:
        kept = store.kept(packed.keys)
    small = Store(packed.folder / "small", ram_budget=0, disk_budget=kept.bytes - 1)
    with small, pytest.raises(InputError, match="the store's budget is"):
        import_pack(small, packed.path)
    with Store(packed.folder / "enough", ram_budget=0, disk_budget=kept.bytes) as store:
        assert import_pack(store, packed.path)[1] == 3
        assert store.kept(packed.keys).bytes == kept.bytes


def test_a_pack_larger_than_the_budget_is_refused_before_anything_is_written(packed: Packed) -> None:
    with Store(packed.target, ram_budget=0, disk_budget=11_000) as store:
        assert store.files is not None
        with pytest.raises(InputError, match=r"its slices take 16\.\d kB; the store's budget is 11\.0 kB"):
            import_pack(store, packed.path)
        assert set(store.files) == {packed.own}


def test_a_pack_that_says_to_be_larger_than_it_is_or_than_the_disk(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever would be written goes no further than this.
    monkeypatch.setattr(SliceFiles, "prepared", lambda self, key: pytest.fail("something was written"))
    members = packed.members()
    manifest = json.loads(members[0][1])
    manifest["slices"][0]["bytes"] = 6_500_000_000
    packed.write([(members[0][0], json.dumps(manifest).encode()), *members[1:]])
    packed.expect_refused(r"its slices take 6\.5 GB, the file has 20\.5 kB")
    # A file of holes takes no room, and is as large as it says.
    room = shutil.disk_usage(packed.target).free
    manifest["slices"][0]["bytes"] = 2 * room
    packed.write([(members[0][0], json.dumps(manifest).encode()), *members[1:]])
    with packed.path.open("r+b") as file:
        file.truncate(2 * room + 100_000)
    packed.expect_refused("the store's budget is")
    store = Store(packed.target, ram_budget=0, disk_budget=4 * room)
    with store, pytest.raises(InputError, match=r"the disk has .* free; make room"):
        import_pack(store, packed.path)


def test_a_file_longer_than_the_manifest_says(packed: Packed) -> None:
    members = packed.members()
    members[1] = (members[1][0], members[1][1] + b"x" * 5000)
    packed.write(members)
    packed.expect_refused(r"not as long as pack\.json says")


def test_a_header_that_is_an_extension_is_not_read(packed: Packed) -> None:
    """A long name of gigabytes would be read into memory."""
    good = packed.path.read_bytes()
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE):
        entry = tarfile.TarInfo("pack.json")
        entry.type, entry.size = kind, 1 << 33
        packed.path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + good)
        packed.expect_refused("does not begin with pack.json")


def test_a_pipe_is_no_pack(packed: Packed) -> None:
    packed.path.unlink()
    os.mkfifo(packed.path)
    packed.expect_refused("not a pack")


NAMES = ["\x1b]0;owned\x07", "two\nlines", "\x9b31m", "right \u202e left", "x" * 1000]


@pytest.mark.parametrize("field", ["model", "schema", "module"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_can_t_be_shown(name: str, field: str, packed: Packed) -> None:
    with Store(packed.folder / "from", ram_budget=0) as store:
        tokens = TOKENS[:2]
        key = slice_key("fp", "format", "context", tokens, 0)
        known = {"model": "model", "schema": "s", "module": "m", field: name}
        info = SliceInfo("fp", known["model"], known["schema"], known["module"], 2, 0, "format", "context", 1)
        store.put(key, np.zeros(10, np.uint8), tokens, info)
        store.flush()
        assert store.files is not None
        members = packed.members()[:2]
        members[1] = (tarfile.TarInfo(f"{key}.safetensors"), store.files.path(key).read_bytes())
    packed.write_with_manifest(members)
    packed.expect_refused("is not a valid name of a model, a schema or a module")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_manifest_with_a_name_that_can_t_be_shown(name: str, packed: Packed) -> None:
    members = packed.members()
    manifest = json.loads(members[0][1]) | {"model": name}
    packed.write([(members[0][0], json.dumps(manifest).encode()), *members[1:]])
    packed.expect_refused("is not a valid name of a model, a schema or a module")


# ---- interrupted, and at the same time -------------------------------------------------------------------------------
KILLED = """
import os, sys
from pathlib import Path
from cpucache.store import Store
from cpucache.store.pack import import_pack
from cpucache.store.store import Store
Store.adopt = lambda self, key, staged: os.kill(os.getpid(), 9) if sys.argv[3] == "killed" else input("waiting")
store = Store(Path(sys.argv[1]), ram_budget=0)
import_pack(store, Path(sys.argv[2]))
"""


def test_what_a_killed_import_leaves_is_cleared_by_the_next_start(packed: Packed) -> None:
    subprocess.run([sys.executable, "-c", KILLED, packed.target, packed.path, "killed"], check=False, timeout=60)
    staging = packed.target / "slices" / STAGING
    assert len(list(staging.rglob("*.safetensors"))) == 3
    Store(packed.target, ram_budget=0).close()
    assert not staging.exists()
    assert packed.add() == 3


def test_an_import_under_way_is_not_cleared(packed: Packed) -> None:
    command = [sys.executable, "-c", KILLED, str(packed.target), str(packed.path), "waiting"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.read(7) == b"waiting"
            with pytest.raises(CpucacheError, match="another import into this store is under way"):
                packed.add()
            assert len(list((packed.target / "slices" / STAGING).rglob("*.safetensors"))) == 3
        finally:
            process.kill()
    assert packed.add() == 3


# ---- signatures ------------------------------------------------------------------------------------------------------


def write_keys(folder: Path, form: str, name: str) -> tuple[Path, Path]:
    """A private and a public key, as openssl or ssh-keygen write them."""
    private = Ed25519PrivateKey.generate()
    kinds = {
        "PEM": (PrivateFormat.PKCS8, Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "OpenSSH": (PrivateFormat.OpenSSH, Encoding.OpenSSH, PublicFormat.OpenSSH),
    }
    private_format, encoding, public_format = kinds[form]
    paths = folder / name, folder / f"{name}.pub"
    paths[0].write_bytes(private.private_bytes(Encoding.PEM, private_format, NoEncryption()))
    paths[1].write_bytes(private.public_key().public_bytes(encoding, public_format))
    return paths


@pytest.mark.parametrize("form", ["PEM", "OpenSSH"])
def test_a_signed_pack_is_told_from_all_others(form: str, packed: Packed) -> None:
    private, public = write_keys(packed.folder, form, "ours")
    _, other = write_keys(packed.folder, form, "theirs")
    with pytest.raises(InputError, match="it is not signed; nothing was imported"):
        packed.add(key=public)
    with Store(packed.folder / "from", ram_budget=0) as store:
        assert export_pack(store, packed.keys, packed.path, key=private).signed
    with pytest.raises(InputError, match=r"it is not signed with the key in .*theirs"):
        packed.add(key=other)
    members = packed.members()
    for at, change in ((0, members[0][1].replace(b'"model"', b'"model" ')), (1, bytes(64)), (1, b"short")):
        changed = [*members]
        changed[at] = (members[at][0], change)
        packed.write(changed)
        with pytest.raises(InputError, match="it is not signed with the key in"):
            packed.add(key=public)
    packed.write(members)
    assert packed.add(key=public) == 3


def test_a_signature_covers_every_byte_of_the_slices(packed: Packed) -> None:
    """A state can be forged so that everything fits it but the signature."""
    private, public = write_keys(packed.folder, "PEM", "ours")
    with Store(packed.folder / "from", ram_budget=0) as store:
        export_pack(store, packed.keys, packed.path, key=private)
    with Store(packed.folder / "forged", ram_budget=0) as store:
        assert store.files is not None
        info = SliceInfo("fp", "model", "s", "m0", 3, 0, "format", "context", 1)
        store.files.put(packed.keys[0], np.zeros(5000, np.uint8), TOKENS, info)
        forged = store.files.path(packed.keys[0]).read_bytes()
    members = packed.members()
    members[2] = (members[2][0], forged)
    packed.write(members)
    for key in (public, None):
        with pytest.raises(InputError, match=r"not as long|a slice is damaged"):
            packed.add(key=key)
    # Without a key, a pack of any origin is accepted.
    packed.write_with_manifest([members[0], *members[2:]])
    with pytest.raises(InputError, match="it is not signed"):
        packed.add(key=public)
    assert packed.add() == 3


def test_a_signed_pack_may_be_taken_unasked(packed: Packed) -> None:
    private, _ = write_keys(packed.folder, "PEM", "ours")
    with Store(packed.folder / "from", ram_budget=0) as store:
        export_pack(store, packed.keys, packed.path, key=private)
    assert packed.add() == 3


def test_keys_that_are_of_no_use(packed: Packed) -> None:
    private, public = write_keys(packed.folder, "PEM", "ours")
    nonsense, locked, rsa = (packed.folder / name for name in ("nonsense", "locked", "rsa"))
    nonsense.write_text("no key")
    key = Ed25519PrivateKey.generate()
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    other = X25519PrivateKey.generate()
    rsa.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with Store(packed.folder / "from", ram_budget=0) as store:
        for path, match in (
            (nonsense, "no private key in PEM or OpenSSH format"),
            (public, "no private key in PEM or OpenSSH format"),
            (locked, "a passphrase protects this key"),
            (rsa, "the key is not an Ed25519 key"),
            (packed.folder / "missing", "the key can't be read"),
        ):
            with pytest.raises(InputError, match=match):
                export_pack(store, packed.keys, packed.path, key=path)
        export_pack(store, packed.keys, packed.path, key=private)
    for path in (nonsense, private):
        with pytest.raises(InputError, match="no public key in PEM or OpenSSH format"):
            packed.add(key=path)


def test_signatures_need_a_package(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_keys(packed.folder, "PEM", "ours")
    with Store(packed.folder / "from", ram_budget=0) as store:
        export_pack(store, packed.keys, packed.path, key=private)
        monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
        with pytest.raises(InputError, match=r"pip install 'cpucache\[sign\]'"):
            export_pack(store, packed.keys, packed.path, key=private)
        with pytest.raises(InputError, match=r"pip install 'cpucache\[sign\]'"):
            packed.add(key=public)


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_packs_and_what_they_bring_are_for_their_owner_only(mask: int, packed: Packed) -> None:
    before = os.umask(mask)
    try:
        packed.path.unlink()
        with Store(packed.folder / "from", ram_budget=0) as store:
            export_pack(store, packed.keys, packed.path)
        shutil.rmtree(packed.target)
        packed.add()
    finally:
        os.umask(before)
    assert packed.path.stat().st_mode & 0o777 == 0o600
    for path in [packed.target, *packed.target.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_staging_files_are_slice_files(tmp_path: Path, packed: Packed) -> None:
    with Store(tmp_path / "other", ram_budget=0) as store:
        staged = SliceFiles(tmp_path / "staged")
        assert store.adopt(packed.keys[0], staged) is False
        assert packed.files is not None
        assert store.adopt(packed.keys[0], packed.files) is True
        assert store.adopt(packed.keys[0], packed.files) is False
        assert store.get(packed.keys[0]) is not None

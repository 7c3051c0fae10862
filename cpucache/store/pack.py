"""Packs: the slices of a schema for one model in one file.

A pack is written on a fast machine and shipped with an offline application. It is an uncompressed tar (f16 states do
not compress). Its first file is ``pack.json``: the model's fingerprint, and every slice with its size and SHA-256. A
signed pack then has ``pack.json.sig``, the Ed25519 signature of ``pack.json``. The slice files of the store follow.

The hashes detect damage, not forgery: from the bytes of a state nobody can tell which text it was evaluated from. Only
a signature, checked with the public key of its origin, proves where a pack comes from.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.filesize import decimal

from cpucache.errors import CpucacheError, InputError
from cpucache.private import private_file
from cpucache.store.claims import Claims
from cpucache.store.signature import is_signed, sign
from cpucache.store.slicefile import Damaged, NoFile, SliceFiles, open_regular
from cpucache.store.startup import STAGING
from cpucache.store.store import Store

_FORMAT = "cpucache-pack-2"
_MANIFEST = "pack.json"
_SIGNATURE = "pack.json.sig"
_MANIFEST_LIMIT = 64 << 20
_NAME_LIMIT = 200  # characters
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Pack:
    """Contents of a pack's manifest. ``signed``: whether it has a signature, checked or not."""

    fingerprint: str
    model: str
    keys: tuple[str, ...]
    signed: bool = False


@dataclass(frozen=True)
class _Entry:
    """A slice file in a pack; ``bytes`` is the size of the file."""

    key: str
    bytes: int
    sha256: str

    @property
    def sound(self) -> bool:
        """Whether size, key and hash have the right form: they come from a file of unknown origin."""
        fine = type(self.bytes) is int and 0 < self.bytes < 1 << 63
        return fine and _is_hex(self.key, 32) and _is_hex(self.sha256, 64)


def export_pack(store: Store, keys: Iterable[str], path: Path, *, key: Path | None = None) -> Pack:
    """Writes slices to a pack, which appears at ``path`` when it is complete.

    Args:
        store: The store that has the slices.
        keys: Keys of the slices.
        path: The pack; an existing file is replaced.
        key: File with the private key to sign with; ``None`` leaves the pack unsigned.

    Returns:
        The manifest.

    Raises:
        InputError: There are no slices, one is missing or damaged, they belong to several models, or the private key
            can't be used.
    """
    files = store.files
    if files is None:
        raise InputError("a store in memory has no slices to export")
    keys = tuple(keys)
    try:
        known = {each: files.info(each) if files.check(each) else None for each in keys}
    except Damaged as damaged:
        raise InputError(f"{damaged}; run `cpucache cache verify --repair`, then encode the schema again") from damaged
    models = {(found[0].fingerprint, found[0].model) for found in known.values() if found}
    if not models or None in known.values():
        raise InputError("there are no such slices in the store; encode the schema first")
    if len(models) > 1:
        raise InputError(f"these slices belong to {len(models)} models; name one with -m")
    pack = Pack(*models.pop(), keys, signed=key is not None)
    _check_name(pack.model, path)
    slices = [vars(_entry(each, files.path(each))) for each in keys]
    said = {"format": _FORMAT, "fingerprint": pack.fingerprint, "model": pack.model, "slices": slices}
    head = {_MANIFEST: json.dumps(said).encode()}
    if key is not None:
        head[_SIGNATURE] = sign(head[_MANIFEST], key)
    partial = path.with_name(path.name + ".part")
    try:
        private_file(partial)
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in head.items():
                _add(tar, name, len(data), io.BytesIO(data))
            for each in slices:
                with open_regular(files.path(each["key"])) as file:
                    _add(tar, f"{each['key']}.safetensors", each["bytes"], file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return pack


def _entry(key: str, path: Path) -> _Entry:
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return _Entry(key, size, digest.hexdigest())


def _add(tar: tarfile.TarFile, name: str, size: int, file: IO[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    tar.addfile(entry, file)


def import_pack(
    store: Store, path: Path, *, fingerprint: str | None = None, key: Path | None = None
) -> tuple[Pack, int]:
    """Adds the slices of a pack to a store.

    Everything is checked before a slice is added: the signature, names (slice files only: no folders, links or paths),
    each slice's hashes and key, and its model. Free disk space and the store's budget are checked before a byte is
    written.

    Args:
        store: The store that receives the slices.
        path: The pack.
        fingerprint: Hash of the model's file that the pack must be for; ``None`` accepts any model.
        key: File with the public key that must have signed the pack; ``None`` accepts any pack.

    Returns:
        The manifest, and the number of slices that were added: neither in the store before nor without room.

    Raises:
        InputError: A check failed; nothing was added.
        CpucacheError: Another import into this store is running.
    """
    if store.files is None or store.index is None or store.home is None:
        raise InputError("a store in memory can't import a pack")
    try:
        with open_regular(path) as file, _staging(store.home, store.files) as staged:
            pack, entries = _manifest(file, path, key)
            if fingerprint is not None and pack.fingerprint != fingerprint:
                raise InputError(f"{path}: the pack is for another model ({pack.model})")
            _check_room(store, file, entries, path)
            _extract(file, pack, entries, staged, path)
            with store.using(pack.keys):
                return pack, sum(store.adopt(each, staged) for each in pack.keys)
    except (tarfile.TarError, EOFError, NoFile) as error:
        raise InputError(f"{path}: not a pack, or truncated ({error})") from error


@contextmanager
def _staging(home: Path, files: SliceFiles) -> Iterator[SliceFiles]:
    """A folder on the disk of the slices, so that adding one is a rename. ``open_index`` deletes it after a crash."""
    claims = Claims(home / "claims")
    if not claims.take(STAGING):
        raise CpucacheError("another import into this store is under way; try again when it is done")
    folder = files.folder / STAGING
    try:
        yield SliceFiles(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        claims.release([STAGING])


def _next(file: IO[bytes]) -> tarfile.TarInfo | None:
    """Next entry of a tar, ``None`` at the end. Reads plain headers only, no extensions of the format."""
    block = file.read(tarfile.BLOCKSIZE)
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape") if block.strip(b"\0") else None


def _read(file: IO[bytes], entry: tarfile.TarInfo) -> Iterator[bytes]:
    """Bytes of an entry, in chunks; skips the padding after them. Raises ``EOFError``."""
    left = entry.size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError("it ends within a file")
        left -= len(chunk)
        yield chunk
    file.read(-entry.size % tarfile.BLOCKSIZE)


def _manifest(file: IO[bytes], path: Path, key: Path | None) -> tuple[Pack, list[_Entry]]:
    """Reads and checks the manifest, and the signature if ``key`` is given. Raises ``InputError``."""
    entry = _next(file)
    if entry is None or entry.name != _MANIFEST or not entry.isreg() or entry.size > _MANIFEST_LIMIT:
        raise InputError(f"{path}: not a pack: it does not begin with {_MANIFEST}")
    data = b"".join(_read(file, entry))
    try:
        said = json.loads(data)
        if said["format"] != _FORMAT:
            raise InputError(f"{path}: its {_MANIFEST} has the format of another version")
        entries = [_Entry(each["key"], each["bytes"], each["sha256"]) for each in said["slices"]]
        pack = Pack(str(said["fingerprint"]), str(said["model"]), tuple(each.key for each in entries))
        fine = all(each.sound for each in entries) and len(set(pack.keys)) == len(pack.keys)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: its {_MANIFEST} can't be read ({error})") from error
    if not fine:
        raise InputError(f"{path}: its {_MANIFEST} can't be read (an invalid slice)")
    _check_name(pack.model, path)
    signature = _signature(file)
    if key is not None:
        if signature is None:
            raise InputError(f"{path}: it is not signed; nothing was imported")
        if not is_signed(data, signature, key):
            raise InputError(f"{path}: it is not signed with the key in {key}; nothing was imported")
    return Pack(pack.fingerprint, pack.model, pack.keys, signature is not None), entries


def _signature(file: IO[bytes]) -> bytes | None:
    """Signature after the manifest; ``None``, with the file position unchanged, where there is none."""
    here = file.tell()
    entry = _next(file)
    if entry is not None and entry.name == _SIGNATURE and entry.isreg() and entry.size <= tarfile.BLOCKSIZE:
        return b"".join(_read(file, entry))
    file.seek(here)
    return None


def _check_name(name: str, path: Path) -> None:
    """Raises ``InputError`` for a long or unprintable name: names are printed on terminals, one a line."""
    if not name.isprintable() or len(name) > _NAME_LIMIT:
        raise InputError(f"{path}: {name[:40]!a} is not a valid name of a model, a schema or a module")


def _check_room(store: Store, file: IO[bytes], entries: list[_Entry], path: Path) -> None:
    """Raises ``InputError`` when slices exceed the pack file's size, the store's budget or the free disk space."""
    size, there = sum(each.bytes for each in entries), os.fstat(file.fileno()).st_size
    if size > there:
        raise InputError(f"{path}: truncated: its slices take {decimal(size)}, the file has {decimal(there)}")
    if size > store.disk_budget:
        raise InputError(f"{path}: its slices take {decimal(size)}; the store's budget is {decimal(store.disk_budget)}")
    free = shutil.disk_usage(store.home or ".").free
    if size > free:
        raise InputError(f"{path}: its slices take {decimal(size)}, the disk has {decimal(free)} free; make room")


def _extract(file: IO[bytes], pack: Pack, entries: list[_Entry], staged: SliceFiles, path: Path) -> None:
    """Copies the slices to the staging folder, under names derived from their keys and not from the archive."""
    expected = {f"{each.key}.safetensors": each for each in entries}
    while (entry := _next(file)) is not None:
        here = expected.pop(entry.name, None)
        if here is None or not entry.isreg():
            raise InputError(f"{path}: {entry.name[:80]!a} does not belong in a pack; nothing was imported")
        if entry.size != here.bytes:
            raise InputError(f"{path}: slice {here.key} is not as long as {_MANIFEST} says; nothing was imported")
        digest = hashlib.sha256()
        target = staged.prepared(here.key)
        private_file(target)
        with target.open("wb") as out:
            for chunk in _read(file, entry):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != here.sha256:
            raise InputError(f"{path}: a slice is damaged ({here.key}); nothing was imported")
        _check(staged, here.key, pack, path)
    if expected:
        raise InputError(f"{path}: {len(expected)} of its slices are missing; nothing was imported")


def _check(staged: SliceFiles, key: str, pack: Pack, path: Path) -> None:
    """Raises ``InputError`` unless a staged file is the slice of its key, for the pack's model."""
    try:
        staged.check(key)
        found = staged.info(key)
    except Damaged as damaged:
        raise InputError(f"{path}: a slice is damaged ({damaged}); nothing was imported") from damaged
    if found is None or found[0].fingerprint != pack.fingerprint:
        raise InputError(f"{path}: slice {key} belongs to another model; nothing was imported")
    for name in (found[0].model, found[0].schema, found[0].module):
        _check_name(name, path)


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and set(text) <= set("0123456789abcdef")

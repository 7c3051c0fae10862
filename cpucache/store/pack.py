"""Packs: the slices of a schema for one model in one file.

They are made on a fast machine and shipped with an offline application. A pack is an uncompressed tar (f16 state does
not compress): first ``pack.json``, which names the model's fingerprint and every slice, then the slice files as they
lie in a store.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cpucache.errors import InputError
from cpucache.store.slicefile import Damaged, SliceFiles
from cpucache.store.store import Store

_FORMAT = "cpucache-pack-1"
_MANIFEST = "pack.json"
_MANIFEST_LIMIT = 64 << 20


@dataclass(frozen=True)
class Pack:
    """What a pack says of itself."""

    fingerprint: str
    model: str
    keys: tuple[str, ...]


def export_pack(store: Store, keys: Iterable[str], path: Path) -> Pack:
    """Write slices to a pack; it appears at ``path`` when it is whole.

    Raises ``InputError`` when there are none, or when they belong to several models.
    """
    files = store.files
    if files is None:
        raise InputError("a store in memory has no slices to export")
    keys = tuple(keys)
    try:
        known = {key: files.info(key) if files.check(key) else None for key in keys}
    except Damaged as damaged:
        raise InputError(f"{damaged}; run `cpucache cache verify --repair`, then encode the schema again") from damaged
    models = {(found[0].fingerprint, found[0].model) for found in known.values() if found}
    if not models or None in known.values():
        raise InputError("there are no such slices in the store; encode the schema first")
    if len(models) > 1:
        raise InputError(f"these slices belong to {len(models)} models; name one with -m")
    pack = Pack(*models.pop(), keys)
    manifest = json.dumps(
        {"format": _FORMAT, "fingerprint": pack.fingerprint, "model": pack.model, "slices": list(keys)}
    ).encode()
    partial = path.with_name(path.name + ".part")
    try:
        with tarfile.open(partial, "w") as tar:
            entry = tarfile.TarInfo(_MANIFEST)
            entry.size = len(manifest)
            tar.addfile(entry, io.BytesIO(manifest))
            for key in keys:
                entry = tarfile.TarInfo(f"{key}.safetensors")
                with files.path(key).open("rb") as file:
                    entry.size = files.path(key).stat().st_size
                    tar.addfile(entry, file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return pack


def import_pack(store: Store, path: Path, *, fingerprint: str | None = None) -> tuple[Pack, int]:
    """Add the slices of a pack to a store; gives the pack, and how many slices were new.

    Everything is checked before anything is added: names (nothing but slices: no folders, links or paths), each
    slice's hash and key, and that all belong to the pack's model, and to the model of ``fingerprint`` if that is given.
    Raises ``InputError``, with nothing added.
    """
    if store.files is None or store.index is None:
        raise InputError("a store in memory can't import a pack")
    store.files.folder.mkdir(parents=True, exist_ok=True)
    # Beside the slices, so that they only have to be renamed.
    with tempfile.TemporaryDirectory(prefix=".import-", dir=store.files.folder) as folder:
        staged = SliceFiles(Path(folder))
        try:
            with tarfile.open(path, "r:") as tar:
                pack = _manifest(tar, path)
                _extract(tar, pack, staged, path)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise InputError(f"{path}: not a pack, or truncated ({error})") from error
        if fingerprint is not None and pack.fingerprint != fingerprint:
            raise InputError(f"{path}: it was made for another model ({pack.model})")
        for key in pack.keys:
            _check(staged, key, pack, path)
        with store.using(pack.keys):
            return pack, sum(store.adopt(key, staged) for key in pack.keys)


def _manifest(tar: tarfile.TarFile, path: Path) -> Pack:
    entry = tar.next()
    file = tar.extractfile(entry) if entry and entry.name == _MANIFEST and entry.isreg() else None
    if entry is None or file is None or entry.size > _MANIFEST_LIMIT:
        raise InputError(f"{path}: not a pack: it does not begin with {_MANIFEST}")
    try:
        said = json.loads(file.read())
        pack = Pack(str(said["fingerprint"]), str(said["model"]), tuple(str(key) for key in said["slices"]))
        fine = said["format"] == _FORMAT and len(set(pack.keys)) == len(pack.keys)
        fine = fine and all(len(key) == 32 and set(key) <= set("0123456789abcdef") for key in pack.keys)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: its {_MANIFEST} can't be read ({error})") from error
    if not fine:
        raise InputError(f"{path}: its {_MANIFEST} is not one of this version")
    return pack


def _extract(tar: tarfile.TarFile, pack: Pack, staged: SliceFiles, path: Path) -> None:
    """Copy the slices out one by one; nothing is unpacked under a name that the archive chose."""
    expected = {f"{key}.safetensors": key for key in pack.keys}
    while (entry := tar.next()) is not None:
        key = expected.pop(entry.name, None)
        file = tar.extractfile(entry) if entry.isreg() and not entry.issparse() else None
        if key is None or file is None:
            raise InputError(f"{path}: '{entry.name[:80]}' does not belong into a pack; nothing was imported")
        target = staged.path(key)
        target.parent.mkdir(exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
    if expected:
        raise InputError(f"{path}: {len(expected)} of its slices are missing; nothing was imported")


def _check(staged: SliceFiles, key: str, pack: Pack, path: Path) -> None:
    try:
        staged.check(key)
        found = staged.info(key)
    except Damaged as damaged:
        raise InputError(f"{path}: a slice is damaged ({damaged}); nothing was imported") from damaged
    if found is None or found[0].fingerprint != pack.fingerprint:
        raise InputError(f"{path}: slice {key} belongs to another model; nothing was imported")

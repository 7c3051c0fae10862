"""Slice files: one safetensors file a slice, named by its key and read through a memory map.

A file has two tensors, ``state`` (the bytes that llama.cpp saved, or these packed) and ``tokens`` (token ids), and
metadata: the ``SliceInfo``, and the xxh3 of metadata, ids and state. A file gets its name only when it is complete
(temporary file, fsync, rename). The hash detects accidental damage only: whoever can write to the folder can also write
a matching hash.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import mmap
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from cpucache.private import private_folder
from cpucache.store.keys import TEXT_ID, slice_key
from cpucache.store.ram import Bytes

_FORMAT = "cpucache-slice-2"
_HEADER_LIMIT = 1 << 20
_SUFFIX = ".safetensors"
_CHUNK = 4 << 20
_NO_HASH = "0" * 16
"""Stands for a hash that is not known yet, which is as long."""
Ids: TypeAlias = npt.NDArray[np.int32]
Identity: TypeAlias = tuple[int, int, int]
"""Identity of a file's content: inode, modification time in nanoseconds, size in bytes."""


@dataclass(frozen=True)
class SliceInfo:
    """Description of a slice."""

    fingerprint: str
    """Hash of the model's file."""
    model: str
    """Name of the model."""
    schema: str
    module: str
    tokens: int
    """Number of tokens."""
    start: int
    """Position of the first token."""
    state_format: str
    """What the bytes of a state depend on besides the model, see ``slice_key``."""
    context: str
    """Key of the context that the tokens attended to."""
    seconds: float
    """Seconds its evaluation took: its share of the batch, by tokens."""
    content: str = ""
    """The ``content_key`` of its tokens."""
    attends_to: str = ""
    """``text_id`` of each run of tokens that the slice attended to, in order, as hexadecimal digits."""
    attended_tokens: int = 0
    """Number of tokens in these runs."""

    @property
    def texts(self) -> tuple[bytes, ...]:
        """``text_id`` of each run of tokens that the slice attended to, in order."""
        data = bytes.fromhex(self.attends_to)
        return tuple(data[begin : begin + TEXT_ID] for begin in range(0, len(data), TEXT_ID))


class Damaged(Exception):
    """A file that is not the slice that its name states."""


class Outdated(Damaged):
    """A slice of another version of the file format, which can't be used."""


class NoFile(OSError):
    """A path that is no regular file."""


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading. Never blocks, not even on a pipe.

    Raises ``NoFile`` for a folder, link, pipe, socket or device, and ``OSError`` for other failures.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        # The errors with which Linux and the BSDs refuse links and sockets.
        if error.errno in {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EOPNOTSUPP}:
            raise NoFile(error.errno, "not a regular file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NoFile(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def file_size(key: str, info: SliceInfo, state: int) -> int:
    """Size in bytes of a slice's file, before it is written. ``state``: bytes of its state in the file."""
    ids = info.tokens * np.dtype(np.int32).itemsize
    return len(_header({**_facts(key, info), "xxh3": _NO_HASH}, ids, state)) + ids + state


class SliceFiles:
    """Slice files below ``folder``. All methods raise ``OSError`` when the file system fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Path of the file of a key, whether it exists or not."""
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def prepared(self, key: str) -> Path:
        """Returns ``path(key)``; creates its folder if necessary."""
        path = self.path(key)
        if not path.parent.exists():
            private_folder(path.parent)
        return path

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def __iter__(self) -> Iterator[str]:
        """Every key on disk. Lists all folders, so only repairs use it."""
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            if not path.name.startswith("."):
                yield path.stem

    def leftovers(self) -> Iterator[Path]:
        """Temporary files of running and of killed writers, and files that were set aside."""
        yield from self.folder.glob("??/.*")
        yield from self.folder.glob("??/*.damaged")

    def put(
        self, key: str, state: Bytes, tokens: Ids, info: SliceInfo, pause: Callable[[], None] | None = None
    ) -> None:
        """Writes a slice. The file is complete or absent, even after a power cut.

        The safetensors library is not used: it would copy the state and can't pause.

        Args:
            key: Key of the slice.
            state: Bytes of the state.
            tokens: Token ids, ``[n_tokens]``.
            info: Description of the slice.
            pause: Called every ``_CHUNK`` bytes; may block to let more urgent work run.
        """
        path = self.prepared(key)
        ids = np.ascontiguousarray(tokens, "<i4").view(np.uint8)
        facts = _facts(key, info)
        digest = _digest(facts, ids, *_chunks(state, pause))
        header = _header({**facts, "xxh3": digest}, len(ids), len(state))
        handle, name = tempfile.mkstemp(prefix=f".{key}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                _write_all(file, header)
                _write_all(file, ids)
                for chunk in _chunks(state, pause):
                    _write_all(file, chunk)
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def get(self, key: str, *, unless: Identity | None = None) -> tuple[Bytes, Identity] | None:
        """Returns a state, mapped from its file, and the file's identity; ``None`` without such a file.

        The mapping stays valid when the file is deleted. The content is compared with its hash, except for a file with
        the identity ``unless``. Raises ``Damaged`` for a file that is not this slice.
        """
        opened = self._open(key)
        if opened is None:
            return None
        if opened.identity != unless:
            self._compare(key, opened)
        return opened.state, opened.identity

    def info(self, key: str) -> tuple[SliceInfo, int] | None:
        """Description of a slice from its file, hash unchecked, and the bytes of the file. Raises ``Damaged``."""
        opened = self._open(key)
        return (opened.info, opened.identity[2]) if opened else None

    def check(self, key: str) -> bool:
        """Compares a file with its hash, and its key with everything that the key is computed from.

        Returns False when there is no such file. Raises ``Damaged`` when something differs.
        """
        opened = self._open(key)
        if opened is None:
            return False
        info = opened.info
        self._compare(key, opened)
        if slice_key(info.fingerprint, info.state_format, info.context, opened.tokens, info.start) != key:
            raise Damaged(f"{self.path(key)}: its content belongs to another slice than its name")
        return True

    def _compare(self, key: str, opened: _Opened) -> None:
        facts = {name: value for name, value in opened.metadata.items() if name != "xxh3"}
        if _digest(facts, opened.tokens.view(np.uint8), opened.state) != opened.metadata["xxh3"]:
            raise Damaged(f"{self.path(key)}: its content has changed since it was written")

    def _open(self, key: str) -> _Opened | None:
        """Maps a file and checks its header; ``None`` without such a file. Raises ``Damaged``."""
        path = self.path(key)
        try:
            with open_regular(path) as file:
                found = os.fstat(file.fileno())
                if found.st_size < 8:
                    raise Damaged(f"{path}: truncated")
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NoFile as error:
            raise Damaged(f"{path}: {error.strerror}") from error
        length = struct.unpack_from("<Q", mapping)[0]
        if length > min(found.st_size - 8, _HEADER_LIMIT):
            raise Damaged(f"{path}: truncated")
        try:
            header = json.loads(mapping[8 : 8 + length])
            metadata = header["__metadata__"]
            data = np.frombuffer(mapping, np.uint8, offset=8 + length)
            state, tokens = (_tensor(header[name], kind, data) for name, kind in (("state", "U8"), ("tokens", "I32")))
            if metadata["format"] != _FORMAT:
                raise Outdated(f"{path}: a slice of another version of cpucache")
            info = _info(metadata)
            fine = metadata["key"] == key and isinstance(metadata["xxh3"], str)
            fine = fine and info.seconds >= 0 and math.isfinite(info.seconds)
            fine = fine and state.nbytes + tokens.nbytes == data.nbytes and info.tokens * 4 == tokens.nbytes
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
            raise Damaged(f"{path}: not a slice ({error})") from error
        if not fine:
            raise Damaged(f"{path}: header and content do not agree")
        identity = (found.st_ino, found.st_mtime_ns, found.st_size)
        return _Opened(metadata, info, state, tokens.view("<i4"), identity)

    def set_aside(self, key: str) -> None:
        """Renames a damaged file to ``*.damaged``, kept for inspection."""
        path = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            path.replace(path.with_suffix(".damaged"))

    def drop(self, key: str) -> None:
        """Deletes a slice file, if it exists. Mappings of it stay valid."""
        self.path(key).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Opened:
    metadata: dict[str, str]
    info: SliceInfo
    state: Bytes
    tokens: Ids
    identity: Identity


def _tensor(entry: dict[str, Any], kind: str, data: Bytes) -> Bytes:
    begin, end = entry["data_offsets"]
    if entry["dtype"] != kind or not 0 <= begin <= end <= data.nbytes:
        raise ValueError(f"a tensor of {str(entry['dtype'])[:8]!a} at {begin} to {end}")
    return data[begin:end]


def _info(metadata: dict[str, str]) -> SliceInfo:
    """Converts metadata, which has strings only, to the types of the fields."""
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str}
    return SliceInfo(**{field.name: kinds[str(field.type)](metadata[field.name]) for field in fields(SliceInfo)})


def _facts(key: str, info: SliceInfo) -> dict[str, str]:
    """Metadata of a slice file, without the hash."""
    return {"format": _FORMAT, "key": key, **{name: str(value) for name, value in asdict(info).items()}}


def _digest(facts: dict[str, str], *parts: Bytes) -> str:
    digest = xxhash.xxh3_64(json.dumps(facts, sort_keys=True).encode())
    for part in parts:
        digest.update(part)  # type: ignore[arg-type]
    return digest.hexdigest()


def _header(metadata: dict[str, str], n_ids: int, n_state: int) -> bytes:
    """Head of a safetensors file: length of the JSON, then the JSON, padded to a multiple of eight bytes."""
    text = json.dumps(
        {
            "__metadata__": metadata,
            "tokens": {"dtype": "I32", "shape": [n_ids // 4], "data_offsets": [0, n_ids]},
            "state": {"dtype": "U8", "shape": [n_state], "data_offsets": [n_ids, n_ids + n_state]},
        }
    ).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(state: Bytes, pause: Callable[[], None] | None) -> Iterator[Bytes]:
    for begin in range(0, len(state), _CHUNK):
        if pause:
            pause()
        yield state[begin : begin + _CHUNK]


def _write_all(file: io.FileIO, data: bytes | Bytes) -> None:
    rest = memoryview(data)  # type: ignore[arg-type]
    while rest:
        rest = rest[file.write(rest) :]

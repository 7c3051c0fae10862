"""The disk tier: one safetensors file a slice, found by its key, read by mapping it.

A file holds a single tensor ``state`` of bytes, and metadata: what the slice is, and the xxh3 of the tensor. It appears
under its name only when it is whole (temporary file, fsync, rename).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cpucache.store.ram import Bytes

_FORMAT = "cpucache-slice-1"
_HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class SliceInfo:
    """What a slice is, for people and for checks."""

    model: str
    """Name of the model."""
    schema: str
    module: str
    tokens: int
    start: int
    """Position of the first token."""
    state_format: str


class Damaged(Exception):
    """A file is not the slice that its name promises."""


class Disk:
    """Slices in files below ``folder``. Raises ``OSError`` when the file system refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the slice of this key lies, or would."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def keys(self) -> Iterator[str]:
        """Every key on disk. Reads folders: not for looking something up."""
        for path in self.folder.glob("??/*.safetensors"):
            yield path.stem

    def put(self, key: str, state: Bytes, info: SliceInfo) -> None:
        """Write a slice; nothing is there, or all of it."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": _FORMAT,
            "key": key,
            "xxh3": xxhash.xxh3_64_hexdigest(state),  # type: ignore[arg-type]
            **{name: str(value) for name, value in asdict(info).items()},
        }
        handle, name = tempfile.mkstemp(prefix=f".{key}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            save_file({"state": state}, temporary, metadata)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, SafetensorError):  # how a full disk shows while safetensors writes
                raise OSError(str(error)) from error
            raise

    def get(self, key: str) -> Bytes | None:
        """The state, mapped from its file: read when it is used, and valid even when the file is deleted meanwhile.

        Raises ``Damaged`` when the file is not what it should be; the payload has been checked against its hash.
        """
        try:
            with self.path(key).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise Damaged(f"{file.name}: no safetensors file")
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        length = struct.unpack_from("<Q", mapping)[0]
        if length > min(size - 8, _HEADER_LIMIT):
            raise Damaged(f"{self.path(key)}: truncated")
        try:
            header = json.loads(mapping[8 : 8 + length])
            metadata, tensor = header["__metadata__"], header["state"]
            begin, end = (int(offset) for offset in tensor["data_offsets"])
            fine = metadata["format"] == _FORMAT and metadata["key"] == key and tensor["dtype"] == "U8"
            promised = metadata["xxh3"]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise Damaged(f"{self.path(key)}: no slice ({error})") from error
        if not fine or begin != 0 or 8 + length + end != size:
            raise Damaged(f"{self.path(key)}: header and content do not agree")
        state = np.frombuffer(mapping, np.uint8, count=end, offset=8 + length)
        if xxhash.xxh3_64_hexdigest(state) != promised:  # type: ignore[arg-type]
            raise Damaged(f"{self.path(key)}: its content has changed since it was written")
        return state

    def set_aside(self, key: str) -> None:
        """Take a damaged file, if it is there, out of the way, keeping it for whoever wants to know why."""
        path = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            path.replace(path.with_suffix(".damaged"))

    def drop(self, key: str) -> None:
        """Delete a slice, if it is there. Mappings of it stay valid."""
        self.path(key).unlink(missing_ok=True)

"""A quick check of a GGUF file, before llama.cpp loads it.

Only the header is read (magic, metadata, tensor infos), from a memory map, and the size that it implies is compared
with the size of the file. The file may be hostile: every count and length is checked before it is used, nothing is
copied into memory, and ``_MAX_STRINGS`` limits the time.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NoReturn

from cpucache.errors import ModelError

_U32, _I64, _U64 = struct.Struct("<I"), struct.Struct("<q"), struct.Struct("<Q")

# Far above any model (a large mixture of experts has about 2,000 tensors; the largest vocabulary has about 800,000
# strings with its merges), and low enough to refuse a hostile file in well under two seconds.
_MAX_ENTRIES = 1 << 16
_MAX_STRINGS = 1 << 22
_MAX_DIMENSIONS = 4

# Metadata value types of fixed size: type number -> bytes.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9

# Tensor types: type number -> (elements in a block, bytes of a block).
_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip


def check_gguf(path: Path) -> None:
    """Raises ``ModelError`` for a file that is no GGUF of a supported version, or is truncated or damaged.

    Tensor data is not read, so damage inside it is not found. The size of a tensor of an unknown type counts as 0.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Header(path, data).check()
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from error


class _Header:
    """Reader of the header of one file; ``at`` is the offset of the next byte to read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 4  # after the magic
        self.strings_left = _MAX_STRINGS

    def check(self) -> None:
        """Reads the header. Raises ``ModelError`` for an unknown version, and for a damaged or truncated file."""
        version = self.number(_U32)
        if version & 0xFFFF == 0:
            raise ModelError(f"{self.path} is a big-endian GGUF file: convert it to little-endian")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is a GGUF file of version {version}: only versions 2 and 3 can be read")
        tensors = self.count("tensors")
        alignment = 32
        for _ in range(self.count("metadata entries")):
            start, length = self.string()
            kind = self.number(_U32)
            if self.data[start : start + min(length, 32)] == b"general.alignment":
                alignment = self.number(_U32) if kind == _UINT32 else 0
                if alignment.bit_count() != 1:
                    self.damaged("its general.alignment is not a power of two")
            else:
                self.skip_value(kind)
        end = max((self.tensor_end(alignment) for _ in range(tensors)), default=0)
        needed = -(-self.at // alignment) * alignment + end if end else self.at
        if needed > self.size:
            raise ModelError(f"{self.path} is truncated: {self.size:,} of at least {needed:,} bytes; fetch it again")

    def damaged(self, reason: str) -> NoReturn:
        raise ModelError(f"{self.path} is a damaged GGUF file ({reason}): fetch it again")

    def skip(self, length: int) -> None:
        """Skips ``length`` bytes. Raises ``ModelError`` at the end of the file, as do the methods that follow."""
        if length > self.size - self.at:
            self.damaged("it ends inside its header")
        self.at += length

    def number(self, layout: struct.Struct) -> int:
        """Reads an integer."""
        start = self.at
        self.skip(layout.size)
        value: int = layout.unpack_from(self.data, start)[0]
        return value

    def count(self, what: str) -> int:
        """Reads the number of tensors or metadata entries, at most ``_MAX_ENTRIES``."""
        count = self.number(_U64)
        if count > _MAX_ENTRIES:
            self.damaged(f"it claims {count:,} {what}")
        return count

    def string(self) -> tuple[int, int]:
        """Skips a string. Returns the offset of its bytes, and their number."""
        length = self.number(_U64)
        start = self.at
        self.skip(length)
        return start, length

    def skip_value(self, kind: int) -> None:
        """Skips a metadata value of a type, by its number."""
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            item, count = self.number(_U32), self.number(_U64)
            if item in _SCALARS:
                self.skip(_SCALARS[item] * count)
            elif item == _STRING:
                self.skip_strings(count)
            else:
                self.damaged(f"it has an array of unknown type {item}")
        else:
            self.damaged(f"it has a value of unknown type {kind}")

    def skip_strings(self, count: int) -> None:
        """Skips ``count`` strings."""
        # A vocabulary has hundreds of thousands of strings: this loop takes most of the time, so it calls no methods.
        self.strings_left -= count
        if self.strings_left < 0:
            self.damaged(f"it claims more than {_MAX_STRINGS:,} strings")
        data, at, last, unpack = self.data, self.at, self.size - _U64.size, _U64.unpack_from
        for _ in range(count):
            if at > last:
                self.damaged("it ends inside its header")
            at += 8 + unpack(data, at)[0]
        self.at = 0
        self.skip(at)

    def tensor_end(self, alignment: int) -> int:
        """Reads one tensor info. Returns the end of its data, in bytes from the start of all tensor data."""
        self.string()
        dimensions = self.number(_U32)
        if dimensions > _MAX_DIMENSIONS:
            self.damaged(f"it has a tensor of {dimensions} dimensions")
        shape = [self.number(_I64) for _ in range(dimensions)]
        kind = self.number(_U32)
        offset = self.number(_U64)
        if offset % alignment or any(length < 0 for length in shape):
            self.damaged("it has a tensor of impossible shape or offset")
        if kind not in _TENSOR_TYPES:
            return offset
        elements, size = _TENSOR_TYPES[kind]
        if shape and shape[0] % elements:
            self.damaged("it has a tensor whose rows are not whole blocks")
        total = 1
        for length in shape:
            total *= length
        return offset + total // elements * size

"""The check of GGUF files: sound ones pass, and nothing else does more than raise ModelError."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpucache.errors import ModelError
from cpucache.models import check_gguf
from tests.support.tries import tries


def write(path: Path, alignment: int | None = None) -> bytes:
    """A small GGUF with every kind of metadata, and tensors of a plain and a block type."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_token_list(["a", "bc", "", "déf"] * 50)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_float64("float", 0.5)
    writer.add_tensor("plain", np.ones((3, 5), dtype=np.float32))
    blocks = gguf.quants.quantize(np.ones((4, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "sound.gguf")


@pytest.fixture
def check(tmp_path: Path) -> Callable[[bytes], None]:
    def check_bytes(data: bytes) -> None:
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        check_gguf(path)

    return check_bytes


def test_sound_files_pass(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    for alignment in (None, 8, 64, 4096):
        write(tmp_path / "x.gguf", alignment)
        check_gguf(tmp_path / "x.gguf")
    check_gguf(tiny("llama"))
    check_gguf(tiny("mamba"))


def test_every_truncation_is_refused(sound: bytes, check: Callable[[bytes], None]) -> None:
    end = len(sound.rstrip(b"\0"))  # the file ends in padding, which nothing needs
    header = sound.index(b"blocks") + 60
    for length in [*range(0, header, 7), *range(header, end - 32, 32), end - 1]:
        with pytest.raises(ModelError, match=r"not a GGUF|truncated|ends inside its header"):
            check(sound[:length])


@pytest.mark.parametrize(
    ("at", "patch", "message"),
    [
        (0, b"PK\x03\x04", "not a GGUF file: it starts with"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack("<I", 9), "version 9"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "tensors"),
        (16, struct.pack("<Q", 1 << 60), "metadata entries"),
        (24, struct.pack("<Q", 1 << 63), "ends inside"),
    ],
)
def test_headers_that_cannot_be(
    sound: bytes, check: Callable[[bytes], None], at: int, patch: bytes, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check(sound[:at] + patch + sound[at + len(patch) :])


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(shape: list[int], kind: int, offset: int) -> bytes:
    return struct.pack(f"<QcI{len(shape)}qIQ", 1, b"t", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ([], [key(b"general.alignment", 4, struct.pack("<I", 0))], "alignment"),
        ([], [key(b"general.alignment", 4, struct.pack("<I", 24))], "alignment"),
        ([], [key(b"general.alignment", 10, struct.pack("<Q", 32))], "alignment"),
        ([], [key(b"k", 77, b"")], "unknown type 77"),
        ([], [key(b"k", 9, struct.pack("<IQ", 9, 1))], "array of unknown type 9"),
        ([], [key(b"k", 9, struct.pack("<IQ", 4, 1 << 62))], "ends inside"),
        ([], [key(b"k", 9, struct.pack("<IQ", 8, 1 << 62))], "strings"),
        ([], [key(b"k", 9, struct.pack("<IQQ", 8, 2, 1 << 63))], "ends inside"),
        ([tensor([4] * 9, 0, 0)], [], "9 dimensions"),
        ([tensor([-4], 0, 0)], [], "impossible shape"),
        ([tensor([4], 0, 7)], [], "impossible shape or offset"),
        ([tensor([33], 8, 0)], [], "whole blocks"),
        ([tensor([1 << 62] * 4, 0, 0)], [], "truncated"),
        ([tensor([4], 999, 1 << 40)], [], "truncated"),
    ],
)
def test_hostile_headers(check: Callable[[bytes], None], tensors: list[bytes], keys: list[bytes], message: str) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    with pytest.raises(ModelError, match=message):
        check(data)


def test_tensors_of_an_unknown_type_are_not_measured(check: Callable[[bytes], None]) -> None:
    def file(kind: int) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor([1 << 40], kind, 0) + bytes(64)

    with pytest.raises(ModelError, match="truncated"):
        check(file(0))
    check(file(999))


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ModelError, match="cannot read"):
            check_gguf(path)


@tries(400)
@given(
    edits=st.lists(st.tuples(st.integers(4, 5000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    length=st.integers(0, 20000),
)
@example(edits=[(16, b"\xff\xff")], length=20000)
def test_no_damage_does_more_than_raise(
    sound: bytes, check: Callable[[bytes], None], edits: list[tuple[int, bytes]], length: int
) -> None:
    data = bytearray(sound)
    for at, patch in edits:
        begin = at % len(sound)
        data[begin : begin + len(patch)] = patch
    try:
        check(bytes(data[:length]))
    except ModelError as error:
        assert "\n" not in str(error)

"""Text of an answer as it comes, settings of sampling, and sizes as people write them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.engine.size import parse_size
from cpucache.engine.text import TextStream
from cpucache.errors import InputError
from cpucache.runtime import Sampling
from tests.support.tries import tries


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def streamed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    texts = [stream.feed(piece) for piece in pieces]
    return [*texts, stream.finish()], bool(stream.stopped)


def test_the_stop_string_that_was_found_is_named() -> None:
    for pieces in ([b"one END two"], [b"one E", b"N", b"D"]):
        stream = TextStream(("two", "END", "D two"))
        assert "".join(stream.feed(piece) for piece in pieces) == "one "
        assert stream.stopped == "END"
    stream = TextStream(("END",))
    stream.feed(b"one EN")
    stream.finish()
    assert stream.stopped == ""


def cut_at_first(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop string that is complete first (of those that end together, the longest)."""
    for end in range(len(text) + 1):
        complete = [one for one in stop if text[:end].endswith(one)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


# ---- whole characters ------------------------------------------------------------------------------------------------


def test_a_character_comes_when_it_is_whole() -> None:
    assert streamed([b"a\xe4", b"\xbd", b"\xa0b"]) == (["a", "", "\u4f60b", ""], False)


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    assert streamed([b"a\xe4\xbd"]) == (["a", "\ufffd"], False)
    assert streamed([b"\xff", b"b"]) == (["\ufffd", "b", ""], False)


# ---- stop strings ----------------------------------------------------------------------------------------------------


def test_nothing_from_a_stop_string_on_is_shown() -> None:
    assert streamed([b"one END two", b"three"], ("END",)) == (["one ", "", ""], True)
    assert streamed([b"one E", b"N", b"D two"], ("END",)) == (["one ", "", "", ""], True)


def test_what_only_looked_like_a_stop_string_is_shown_as_soon_as_that_is_certain() -> None:
    assert streamed([b"E", b"N", b"e"], ("END",)) == (["", "", "ENe", ""], False)
    assert streamed([b"EEN", b"EN", b"."], ("END",)) == (["E", "EN", "EN.", ""], False)
    assert streamed([b"no E"], ("END",)) == (["no ", "E"], False)


def test_several_stop_strings() -> None:
    assert streamed([b"a<", b"|b", b"|>c"], ("|>", "<|end|>")) == (["a", "<|b", "", ""], True)
    assert streamed([b"xaab"], ("b", "aab")) == (["x", ""], True)


@pytest.mark.parametrize("pieces", [[b"abc"], [b"a", b"b", b"c"], [b"ab", b"c"]])
def test_the_stop_string_that_is_complete_first_counts_however_the_text_is_cut(pieces: list[bytes]) -> None:
    texts, stopped = streamed(pieces, ("abc", "b"))
    assert ("".join(texts), stopped) == ("a", True)


def test_a_stop_string_of_one_character_in_many_bytes() -> None:
    assert streamed([b"a\xe4", b"\xbd\xa0b"], ("\u4f60",)) == (["a", "", ""], True)


@tries(400)
@given(
    st.text("ab\u00e9", max_size=20),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 40), max_size=10),
)
def test_any_cut_into_pieces_gives_the_text_up_to_the_first_stop_string(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    texts, stopped = streamed(pieces_of(text.encode(), cuts), tuple(stop))
    assert ("".join(texts), stopped) == cut_at_first(text, tuple(stop))


@tries(200)
@given(st.binary(max_size=20) | st.lists(st.sampled_from([b"\xe4", b"\xbd", b"\xa0", b"a"])).map(b"".join), st.data())
def test_any_bytes_give_the_text_that_decoding_them_at_once_gives(data: bytes, more: st.DataObject) -> None:
    cuts = more.draw(st.lists(st.integers(0, len(data)), max_size=10))
    assert "".join(streamed(pieces_of(data, cuts))[0]) == data.decode("utf-8", "replace")


@tries(200)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(tuple(stop))
    shown = "".join(stream.feed(letter.encode()) for letter in text)
    if not stream.stopped:
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert held == "" or any(one.startswith(held) and one != held for one in stop)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "fine"),
    [
        ("temperature", [-0.1, math.nan], [0.0, 2.5]),
        ("top_k", [-1], [0, 1]),
        ("top_p", [0.0, 1.01, math.nan], [0.01, 1.0]),
        ("min_p", [-0.1, 1.0], [0.0, 0.99]),
        ("repeat_penalty", [0.0, -1.0], [0.5, 1.0]),
        ("seed", [-1, 2**32], [None, 0, 2**32 - 1]),
        ("stop", [("",), ("a", "")], [(), ("a", "b")]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, bad: list[Any], fine: list[Any]) -> None:
    for value in bad:
        with pytest.raises(InputError, match=rf"^{name}=.*must be "):
            Sampling(**{name: value})
    for value in fine:
        assert getattr(Sampling(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("12B", 12),
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("1K", 1000),
        ("1Ki", 1024),
        (" 3 TiB ", 3 << 40),
        ("0", 0),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1,5GB", "2 gigabytes", "1PiB", "2GiBs", "half"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="2GiB"):
        parse_size(text)

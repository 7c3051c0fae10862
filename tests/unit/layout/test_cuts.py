"""Where text without markup is cut: by its content, so that an edit moves the cuts next to it and no others."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.errors import InputError
from cpucache.layout import Text
from cpucache.layout.cuts import LEAST, MOST, Cuts
from cpucache.layout.vocabulary import Tokens
from tests.support.tries import tries

WORDS = ("a", "be", "see", "deed", "elegy", "faible", "garbage", "hallmark", "item", "join", "kettle", "lament")
PIECES = [
    *(
        f" {word}"
        for word in [
            "a",
            "be",
            "see",
            "deed",
            "elegy",
            "faible",
            "garbage",
            "hallmark",
            "item",
            "join",
            "kettle",
            "lament",
        ]
    ),
    *(".", "!", ",", "\n", "\n\n", " \n", ".\n\n", "# ", "- ", "```", "<end>", "<start>"),
]
END, START = PIECES.index("<end>"), PIECES.index("<start>")


class Pieces:
    """A vocabulary of some words, punctuation and line breaks."""

    n_vocab = len(PIECES)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return PIECES[token].encode()

    def ends_generation(self, token: int) -> bool:
        return token == END

    def is_control(self, token: int) -> bool:
        return token in (END, START)


def ids(text: str) -> Tokens:
    """A text's tokens: the longest piece at each index."""
    pattern = "|".join(map(re.escape, sorted(PIECES, key=len, reverse=True)))
    found = re.findall(pattern, text)
    assert "".join(found) == text
    return np.array([PIECES.index(piece) for piece in found], np.int32)


def prose(words: int, seed: int = 0) -> str:
    """Words of which no four in a row come twice soon."""
    rng = np.random.default_rng(seed)
    return "".join(PIECES[token] for token in rng.integers(len(WORDS), size=words))


# Mostly words, as texts are.
words = st.integers(0, len(WORDS) - 1)
tokens = st.one_of(words, words, st.integers(0, len(PIECES) - 1))
texts = st.lists(tokens, max_size=400).map(lambda each: np.array(each, np.int32))
sizes = st.integers(1, 24)


def reach(least: int) -> int:
    """How far from an edit cuts may move: the tokens that decide on a cut, on cuts near it, and on cuts near these."""
    return 3 * least + 8


@tries(100)
@given(texts, sizes, st.integers(0, 100))
def test_every_token_is_in_one_segment(text: Tokens, least: int, more: int) -> None:
    ends = Cuts(Pieces(), least, least + more)(text)
    gaps = np.diff([0, *ends])
    assert (ends[-1] if ends else 0) == len(text)
    assert all(1 <= gap <= least + more for gap in gaps)
    # Nothing is smaller than a quarter of the least, but what stands at either end, ends a message, or is left of a
    # long run.
    cuts = Cuts(Pieces(), least, 1 << 20)
    inner = pairwise(cuts(text)[:-1])
    assert all(end - begin >= max(1, least // 4) or cuts.ends_message(text[begin:end]) for begin, end in inner)


@tries(300)
@given(texts, texts, texts, texts, sizes)
def test_an_edit_moves_no_cut_but_those_next_to_it(
    before: Tokens, old: Tokens, new: Tokens, after: Tokens, least: int
) -> None:
    """Text is inserted, deleted, or replaced by other text."""
    cuts = Cuts(Pieces(), least, 1 << 20)
    one, other = (cuts(np.concatenate([before, middle, after])) for middle in (old, new))
    head = [{end for end in ends if end < len(before) - reach(least)} for ends in (one, other)]
    assert head[0] == head[1]
    tail = [
        {size - end for end in ends if size - end < len(after) - reach(least)}
        for ends, size in ((one, len(before) + len(old) + len(after)), (other, len(before) + len(new) + len(after)))
    ]
    assert tail[0] == tail[1]


@tries(100)
@given(texts, texts, texts, sizes)
def test_text_that_moves_takes_its_cuts_along(one: Tokens, moved: Tokens, other: Tokens, least: int) -> None:
    cuts = Cuts(Pieces(), least, 1 << 20)

    def within(begin: int, text: Tokens) -> set[int]:
        ends = {end - begin for end in cuts(text)}
        return {end for end in ends if reach(least) < end < len(moved) - reach(least)}

    assert within(len(one), np.concatenate([one, moved, other])) == within(0, np.concatenate([moved, other, one]))


@tries(100)
@given(texts, texts, sizes, st.integers(1, 40))
def test_a_longest_segment_moves_no_cut_after_the_next_one(head: Tokens, text: Tokens, least: int, more: int) -> None:
    """Text without a boundary to cut at is cut by size, from the last such boundary on."""
    natural, limited = Cuts(Pieces(), least, 1 << 20), Cuts(Pieces(), least, least + more)
    whole = np.concatenate([head, text])
    kept = [end for end in natural(whole) if end > len(head) + reach(least)]
    separate = {end + len(head) for end in natural(text)}
    for end in kept:
        assert end in separate
        assert end in limited(whole)
        assert end - len(head) in limited(text)


def test_messages_begin_and_end_at_cuts() -> None:
    cuts = Cuts(Pieces(), 16, 64)
    one, other = ids(prose(6)), ids(prose(7, seed=1))
    end = np.array([END, PIECES.index("\n")], np.int32)
    assert cuts(np.concatenate([one, end, other, end, one])) == [8, 17, 23]
    # Of two that are very close, the first is.
    assert cuts(np.concatenate([one, end, one[:1], end, other, one])) == [8, 24]
    # A header goes with what stands before it, so that what is said is a segment of its own.
    header = np.array([START, 3, PIECES.index("\n")], np.int32)
    assert cuts(np.concatenate([header, one, end, header, other, end, header, one])) == [3, 14, 26, 32]
    # A message of a few words is a segment of its own, and so is the end of one that ends with a blank line.
    short = np.array([3], np.int32)
    assert cuts(np.concatenate([header, one, end, header, short, end, header, other])) == [3, 14, 20, 27]
    blank = ids("\n\n")
    assert cuts(np.concatenate([header, *[other] * 3, blank, end, header, other])) == [3, 25, 30, 37]
    question = ids("\n\n")
    document = ids(prose(20, seed=2))
    asked = np.concatenate([header, document, question, one[:4], end, header, other])
    assert cuts(asked) == [3, 24, 33, 40]


def test_long_paragraphs_are_segments_of_their_own() -> None:
    """In whatever order they stand: so they are found again."""
    cuts = Cuts(Pieces(), 16, 64)
    paragraphs = [ids(prose(20 + 3 * number, seed=number) + ".\n\n") for number in range(5)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        chosen = [paragraphs[number] for number in order]
        assert cuts(np.concatenate(chosen)) == np.cumsum([len(each) for each in chosen]).tolist()
    # A heading goes with what it is the heading of.
    heading = ids("\n#  be see\n")
    before, after = ids(prose(20)), ids(prose(30, seed=9))
    assert cuts(np.concatenate([before, heading, after]))[0] == len(before) + 1


@pytest.mark.parametrize(
    ("weak", "strong"), [("", "."), (".", "\n"), ("\n", "\n\n"), (".\n", "\n# "), (".", "\n\n"), ("", "\n")]
)
def test_the_strongest_boundary_nearby_is_taken(weak: str, strong: str) -> None:
    cuts = Cuts(Pieces(), 24, 64)
    for seed in range(10):
        words = [prose(count, seed=100 * seed + count) for count in (20, 9, 9, 20)]
        text = f"{words[0]}{weak}{words[1]}{strong}{words[2]}{weak}{words[3]}"
        at = len(ids(f"{words[0]}{weak}{words[1]}{strong.removesuffix('# ')}"))
        assert cuts(ids(text)) == [at, len(ids(text))]


def test_what_repeats_is_cut_by_size() -> None:
    assert Cuts(Pieces(), 8, 20)(np.zeros(50, np.int32)) == [20, 40, 50]
    assert Cuts(Pieces(), 8, 20)(np.zeros(0, np.int32)) == []
    assert Cuts(Pieces(), 8, 20)(np.zeros(1, np.int32)) == [1]


def test_sizes() -> None:
    text = ids(prose(5000))
    gaps = np.diff([0, *Cuts(Pieces())(text)])
    assert (LEAST, MOST) == (64, 512)
    assert gaps[:-1].min() >= LEAST
    assert gaps.max() <= MOST
    assert 1.3 * LEAST < gaps.mean() < 3 * LEAST
    for least, most in ((0, 5), (9, 8), (-1, 4)):
        with pytest.raises(InputError, match=f"segments of {least} to {most} tokens: give two numbers"):
            Cuts(Pieces(), least, most)


@tries(100)
@given(st.lists(texts.filter(len), min_size=1, max_size=5), st.sets(st.integers(0, 4)))
def test_cuts_within_a_part_depend_on_it_only(runs: list[Tokens], marked: set[int]) -> None:
    cuts = Cuts(Pieces(), 6, 24)
    edges = np.cumsum([0, *map(len, runs)]).tolist()
    parts = tuple((edges[index], edges[index + 1]) for index in sorted(marked) if index < len(runs))
    last = np.zeros(1, np.int32)
    text = Text(np.concatenate([*runs, last]), parts)
    ends = text.ends(cuts)
    assert ends[-1] == edges[-1]
    assert ends == sorted(set(ends))
    for begin, end in parts:
        assert [each - begin for each in ends if begin < each <= end] == cuts(text.tokens[begin:end])
        assert text.within(begin, end)
        assert not text.within(begin, end + 1)

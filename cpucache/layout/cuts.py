"""Cuts: where text without markup is divided into segments, by its tokens alone.

Whether there is a cut at some place depends on the tokens nearby, so that an edit moves the cuts next to it and no
others: text that was moved, or that stands behind an insertion, is found again by its content. Places are ranked by
what ends there, and the highest of its neighbourhood is a cut (the local-maximum chunking of Bjørner, Blass and
Gurevich, "Content-dependent chunking for differential compression", 2010).
"""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cpucache.errors import InputError
from cpucache.layout.vocabulary import Tokens

LEAST, MOST = 64, 512
"""Tokens of a segment: ``LEAST`` but between message edges and paragraphs, and ``MOST`` in any case."""

# What a token says of the places before and behind it.
_END, _BLANK, _OPENS, _STOP, _SPACE, _CONTROL = 1, 2, 4, 8, 16, 32
_UNKNOWN = 255
# Ranks of places, the weakest first.
_WORD, _SENTENCE, _LINE, _PARAGRAPH, _EDGE, _HEADER, _CERTAIN = 0, 1, 2, 3, 4, 5, 6
_NEARBY = 4  # tokens of a message's header, such as <|im_start|>user, before its line break
_OPENING = re.compile(r"#{1,6}\s|#{1,6}$|```|~~~|===|---|[-*•]\s?$")
_SENTENCE_END = (".", "!", "?", "。", "！", "？")
_Numbers = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]
_Keys = npt.NDArray[np.uint64]
# Odd numbers, one for each of the tokens before a place that it is ranked by.
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)


class Pieces(Protocol):
    """Part of a model that cuts depend on: the text of its tokens."""

    @property
    def n_vocab(self) -> int:
        """Number of tokens of the vocabulary."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token."""

    def ends_generation(self, token: int) -> bool:
        """Whether the token ends a message."""

    def is_control(self, token: int) -> bool:
        """Whether the token stands for no text."""


def check_sizes(least: int, most: int) -> None:
    """Raise ``InputError`` for sizes that segments can't have."""
    if not 1 <= least <= most:
        raise InputError(f"segments of {least} to {most} tokens: give two numbers of 1 or more, the smaller first")


class Cuts:
    """Finds the cuts of texts in one model's tokens.

    The beginning of a message behind its header is a cut, and so is a blank line or heading with a paragraph of
    ``least`` tokens or more on one side of it. (Where two such places are closer together than a quarter of ``least``,
    the first alone is.) Between these, segments are at least ``least`` tokens long, and end where the highest ranked
    place is: at a blank line or heading, else behind a line, a sentence, a word.

    Args:
        vocabulary: The model's tokens.
        least: Tokens of a segment.
        most: Tokens of a segment at most.
    """

    def __init__(self, vocabulary: Pieces, least: int = LEAST, most: int = MOST) -> None:
        check_sizes(least, most)
        self.least = least
        self.most = most
        self._vocabulary = vocabulary
        # By token: flags, and the line breaks that its text ends with.
        self._flags = np.full(vocabulary.n_vocab, _UNKNOWN, np.uint8)
        self._breaks = np.zeros(vocabulary.n_vocab, np.uint8)

    def __call__(self, tokens: Tokens, *, part: bool = False) -> list[int]:
        """The end of each segment, as an index into ``tokens``, in order; the last is the end of the text.

        ``part``: this is a part of a longer text, such as a message of a conversation; nothing very short is cut off at
        its ends.
        """
        count = len(tokens)
        if count < 2:
            return [count] if count else []
        places = self._kept(self._ranks(tokens), tokens, part=part)
        ends = np.flatnonzero(places) + 1
        # Longer than most: cut from the left, so that text that goes on keeps its cuts.
        found: list[int] = []
        begin = 0
        for end in [*ends.tolist(), count]:
            found += range(begin + self.most, end, self.most)
            found.append(end)
            begin = end
        return found

    def ends_message(self, tokens: Tokens) -> bool:
        """Whether some tokens end where a message does, or its header."""
        last = tokens[-_NEARBY - 2 :]
        self._learn(last)
        return bool((self._flags[last] & (_END | _CONTROL)).any())

    # -- ranks -------------------------------------------------------------------------------------------------------
    def _ranks(self, tokens: Tokens) -> _Numbers:
        """The rank of each place: that with index ``i`` is behind token ``i``, before another."""
        self._learn(tokens)
        flags, own = self._flags[tokens], self._breaks[tokens].astype(np.int64)
        blank = ((flags & _BLANK) > 0).astype(np.int64)
        # White space may be spread over some tokens: what stands before it counts for the place behind it.
        breaks, ends = own, (flags & _END > 0).astype(np.int64)
        for _ in range(3):
            breaks, ends = own + blank * _shifted(breaks), np.maximum(ends, blank * _shifted(ends))
        control = (flags & (_CONTROL | _END) == _CONTROL).astype(np.int64)
        for _ in range(_NEARBY):
            control = np.maximum(control, _shifted(control))
        stops = (flags & _STOP) > 0
        before, behind = slice(0, -1), slice(1, None)
        opens, space = (flags[behind] & _OPENS) > 0, (flags[behind] & _SPACE) > 0
        ranks: _Numbers = np.where(stops[before] & space, _SENTENCE, _WORD)
        ranks[breaks[before] >= 1] = _LINE
        ranks[(breaks[before] >= 2) | ((breaks[before] >= 1) & opens)] = _PARAGRAPH
        ranks[ends[before] > 0] = _EDGE
        ranks[(breaks[before] >= 1) & (control[before] > 0)] = _HEADER
        # White space belongs to what stands before it.
        ranks[blank[behind] > 0] = _WORD
        return ranks

    def _learn(self, tokens: Tokens) -> None:
        """Note what the texts of tokens say that were not seen before."""
        unknown = np.unique(tokens[self._flags[tokens] == _UNKNOWN])
        for token in unknown.tolist():
            text = self._vocabulary.piece(token, special=True).decode("utf-8", "replace")
            bare = text.strip()
            tail = text[len(text.rstrip()) :]
            flags = _END if self._vocabulary.ends_generation(token) else 0
            flags |= _CONTROL if self._vocabulary.is_control(token) else 0
            flags |= _BLANK if text and not bare else 0
            flags |= _OPENS if _OPENING.match(text) else 0
            flags |= _STOP if bare.endswith(_SENTENCE_END) else 0
            flags |= _SPACE if text[:1].isspace() else 0
            # The flags tell other threads that the token is known.
            self._breaks[token] = min(tail.count("\n"), 8)
            self._flags[token] = flags

    # -- the highest of their neighbourhoods -------------------------------------------------------------------------
    def _kept(self, ranks: _Numbers, tokens: Tokens, *, part: bool) -> _Flags:
        """Which places are cuts."""
        certain = self._certain(ranks, part=part)
        keys = (ranks.astype(np.uint64) << np.uint64(56)) | (_hashes(tokens)[:-1] >> np.uint64(8))
        keys[certain] = np.uint64(_CERTAIN << 56)
        # The beginning and the end of the text count as cuts.
        reach = self.least
        edge = np.full(1, np.uint64(_CERTAIN << 56))
        padding = np.zeros(reach - 1, np.uint64)
        padded = np.concatenate([padding, edge, keys, edge, padding])
        highest = _window_maximum(padded, reach)
        left, right = highest[: len(keys)], highest[reach + 1 : reach + 1 + len(keys)]
        result: _Flags = certain | ((keys > left) & (keys >= right))
        return result

    def _certain(self, ranks: _Numbers, *, part: bool) -> _Flags:
        """Edges of messages, and of paragraphs with a long one on one side; of those close together, the first."""
        strong = np.flatnonzero(ranks >= _PARAGRAPH)
        if not len(strong):
            return np.zeros(len(ranks), bool)
        gaps = np.diff(np.concatenate([[-1], strong, [len(ranks)]]))
        long = (gaps[:-1] >= self.least) | (gaps[1:] >= self.least) | (ranks[strong] >= _EDGE)
        anchors = strong[long]
        rank = ranks[anchors]
        apart = max(1, self.least // 4)
        near = np.diff(anchors) < apart
        drop = np.zeros(len(anchors), bool)
        drop[1:] |= near & (rank[:-1] >= rank[1:])
        # The header of a message goes with the message before it: what is said begins behind it.
        drop[:-1] |= near & (rank[:-1] == _EDGE) & (rank[1:] == _HEADER)
        if part:
            drop |= (anchors + 1 < apart) | (len(ranks) - anchors < apart)
        result = np.zeros(len(ranks), bool)
        result[anchors[~drop]] = True
        return result


def _shifted(values: _Numbers) -> _Numbers:
    """The value of the token before each; nothing for the first."""
    result = np.zeros_like(values)
    result[1:] = values[:-1]
    return result


def _hashes(tokens: Tokens) -> _Keys:
    """A number for each token and the three before it, all bits alike."""
    ids = tokens.astype(np.uint64) + np.uint64(1)
    total = np.zeros(len(ids), np.uint64)
    for distance, factor in enumerate(_FACTORS):
        total[distance:] += ids[: len(ids) - distance] * np.uint64(factor)
    total ^= total >> np.uint64(29)
    total *= np.uint64(0xBF58476D1CE4E5B9)
    total ^= total >> np.uint64(32)
    return total


def _window_maximum(values: _Keys, width: int) -> _Keys:
    """The highest of each ``width`` values in a row, by windows twice as wide at each step."""
    result, reach = values, 1
    while reach * 2 <= width:
        result = np.maximum(result[:-reach], result[reach:])
        reach *= 2
    rest = width - reach
    return np.maximum(result[: len(result) - rest], result[rest:]) if rest else result

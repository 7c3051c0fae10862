"""Cuts: the boundaries at which text without markup is divided into segments, chosen by its tokens only.

A cut depends only on the tokens near it, so an edit moves the cuts next to it and no others: segments of moved text, or
of text after an insertion, keep their content and are found again. Boundaries are ranked by what ends there (a word, a
line, a message); the highest rank of a neighbourhood is a cut (local-maximum chunking: Bjørner, Blass and Gurevich,
"Content-dependent chunking for differential compression", 2010).
"""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cpucache.errors import InputError
from cpucache.layout.vocabulary import Tokens

LEAST, MOST = 64, 512
"""Minimum and maximum length of a segment, in tokens. Message edges and paragraphs may make it shorter."""

# Flags of a token's text, used to rank the boundaries before and after it.
_END, _BLANK, _OPENS, _STOP, _SPACE, _CONTROL = 1, 2, 4, 8, 16, 32
_UNKNOWN = 255
# Ranks of boundaries, the weakest first.
_WORD, _SENTENCE, _LINE, _PARAGRAPH, _EDGE, _HEADER, _CERTAIN = 0, 1, 2, 3, 4, 5, 6
_NEARBY = 4  # tokens of a message's header, such as <|im_start|>user, before its line break
_BLOCK_START = re.compile(r"#{1,6}\s|#{1,6}$|```|~~~|===|---|[-*•]\s?$")
_SENTENCE_END = (".", "!", "?", "。", "！", "？")
_Numbers = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]
_Keys = npt.NDArray[np.uint64]
# Odd multipliers of the hash, one for each token before a boundary that decides between equal ranks.
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)


class Pieces(Protocol):
    """The model interface that cuts need: the text and kind of its tokens."""

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary, in tokens."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Text of a token, as bytes."""

    def ends_generation(self, token: int) -> bool:
        """Whether the token ends a message."""

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, which stands for no text."""


def check_sizes(least: int, most: int) -> None:
    """Raises ``InputError`` unless ``1 <= least <= most``."""
    if not 1 <= least <= most:
        raise InputError(f"segments of {least} to {most} tokens: give two numbers of 1 or more, the smaller first")


class Cuts:
    """Finds the cuts of texts in one model's tokens.

    A message edge is a cut, normally after the message's header. So is a blank line or heading with a paragraph of at
    least ``least`` tokens on one side. Of two in a row that are closer than a quarter of ``least``, the second is
    dropped unless it ranks higher, and an edge is dropped if the header after it ends that near. So a segment is
    shorter only where a message ends: it is a short message, or the end of one after a blank line. Joined with the text
    beside it, such a segment would keep that text from being found in other prompts. Between these cuts, segments are
    at least ``least`` tokens long and end at the boundary of the highest rank: a blank line or heading, else the end of
    a line, a sentence or a word.

    Args:
        vocabulary: The model's tokens.
        least: Minimum length of a segment, in tokens.
        most: Maximum length of a segment, in tokens.
    """

    def __init__(self, vocabulary: Pieces, least: int = LEAST, most: int = MOST) -> None:
        check_sizes(least, most)
        self.least = least
        self.most = most
        self._vocabulary = vocabulary
        # By token id: flags, and the number of line breaks at the end of its text.
        self._flags = np.full(vocabulary.n_vocab, _UNKNOWN, np.uint8)
        self._breaks = np.zeros(vocabulary.n_vocab, np.uint8)

    def __call__(self, tokens: Tokens, *, part: bool = False) -> list[int]:
        """Ends of the segments, as indices into ``tokens``, in order. The last is the end of the text.

        If ``part`` is true, the text is part of a longer one, such as a message of a conversation, and no cut is chosen
        within ``least // 4`` tokens of its ends.
        """
        count = len(tokens)
        if count < 2:
            return [count] if count else []
        places = self._kept(self._ranks(tokens), tokens, part=part)
        ends = np.flatnonzero(places) + 1
        # Longer than most: cut from the left, so that the cuts stay when text is appended.
        found: list[int] = []
        begin = 0
        for end in [*ends.tolist(), count]:
            found += range(begin + self.most, end, self.most)
            found.append(end)
            begin = end
        return found

    def ends_message(self, tokens: Tokens) -> bool:
        """Whether the last few tokens include the end of a message or a control token of a header."""
        last = tokens[-_NEARBY - 2 :]
        self._learn(last)
        return bool((self._flags[last] & (_END | _CONTROL)).any())

    # -- ranks -------------------------------------------------------------------------------------------------------
    def _ranks(self, tokens: Tokens) -> _Numbers:
        """Ranks ``[n_tokens - 1]`` of the boundaries; boundary ``i`` is between tokens ``i`` and ``i + 1``."""
        self._learn(tokens)
        flags, own = self._flags[tokens], self._breaks[tokens].astype(np.int64)
        blank = ((flags & _BLANK) > 0).astype(np.int64)
        # White space may take several tokens: carry what ends before it to the boundary after it.
        breaks, ends = own, (flags & _END > 0).astype(np.int64)
        for _ in range(3):
            breaks, ends = own + blank * _shifted(breaks), np.maximum(ends, blank * _shifted(ends))
        control = (flags & (_CONTROL | _END) == _CONTROL).astype(np.int64)
        for _ in range(_NEARBY):
            control = np.maximum(control, _shifted(control))
        stops = (flags & _STOP) > 0
        before, after = slice(0, -1), slice(1, None)
        opens, space = (flags[after] & _OPENS) > 0, (flags[after] & _SPACE) > 0
        ranks: _Numbers = np.where(stops[before] & space, _SENTENCE, _WORD)
        ranks[breaks[before] >= 1] = _LINE
        ranks[(breaks[before] >= 2) | ((breaks[before] >= 1) & opens)] = _PARAGRAPH
        ranks[ends[before] > 0] = _EDGE
        ranks[(breaks[before] >= 1) & (control[before] > 0)] = _HEADER
        # White space belongs to the segment of the text before it.
        ranks[blank[after] > 0] = _WORD
        return ranks

    def _learn(self, tokens: Tokens) -> None:
        """Records the flags and line breaks of tokens that are new to this object."""
        unknown = np.unique(tokens[self._flags[tokens] == _UNKNOWN])
        for token in unknown.tolist():
            text = self._vocabulary.piece(token, special=True).decode("utf-8", "replace")
            bare = text.strip()
            tail = text[len(text.rstrip()) :]
            flags = _END if self._vocabulary.ends_generation(token) else 0
            flags |= _CONTROL if self._vocabulary.is_control(token) else 0
            flags |= _BLANK if text and not bare else 0
            flags |= _OPENS if _BLOCK_START.match(text) else 0
            flags |= _STOP if bare.endswith(_SENTENCE_END) else 0
            flags |= _SPACE if text[:1].isspace() else 0
            # Flags are written last: they tell other threads that the token is known.
            self._breaks[token] = min(tail.count("\n"), 8)
            self._flags[token] = flags

    # -- local maxima ------------------------------------------------------------------------------------------------
    def _kept(self, ranks: _Numbers, tokens: Tokens, *, part: bool) -> _Flags:
        """Mask ``[n_tokens - 1]`` of the boundaries that are cuts."""
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
        """Mask of the cuts at message edges, and at paragraph boundaries with a long paragraph on one side."""
        strong = np.flatnonzero(ranks >= _PARAGRAPH)
        if not len(strong):
            return np.zeros(len(ranks), bool)
        gaps = np.diff(np.concatenate([[-1], strong, [len(ranks)]]))
        long = (gaps[:-1] >= self.least) | (gaps[1:] >= self.least) | (ranks[strong] >= _EDGE)
        anchors = strong[long]
        rank = ranks[anchors]
        spacing = max(1, self.least // 4)
        near = np.diff(anchors) < spacing
        drop = np.zeros(len(anchors), bool)
        drop[1:] |= near & (rank[:-1] >= rank[1:])
        # A message's header stays in the segment of the message before it; the content begins a segment.
        drop[:-1] |= near & (rank[:-1] == _EDGE) & (rank[1:] == _HEADER)
        if part:
            drop |= (anchors + 1 < spacing) | (len(ranks) - anchors < spacing)
        result = np.zeros(len(ranks), bool)
        result[anchors[~drop]] = True
        return result


def _shifted(values: _Numbers) -> _Numbers:
    """Values shifted by one token to the right; the first is 0."""
    result = np.zeros_like(values)
    result[1:] = values[:-1]
    return result


def _hashes(tokens: Tokens) -> _Keys:
    """Well-mixed 64-bit hash of each token and the three before it."""
    ids = tokens.astype(np.uint64) + np.uint64(1)
    total = np.zeros(len(ids), np.uint64)
    for distance, factor in enumerate(_FACTORS):
        total[distance:] += ids[: len(ids) - distance] * np.uint64(factor)
    total ^= total >> np.uint64(29)
    total *= np.uint64(0xBF58476D1CE4E5B9)
    total ^= total >> np.uint64(32)
    return total


def _window_maximum(values: _Keys, width: int) -> _Keys:
    """Maximum of each ``width`` consecutive values, computed with windows that double at each step."""
    result, reach = values, 1
    while reach * 2 <= width:
        result = np.maximum(result[:-reach], result[reach:])
        reach *= 2
    rest = width - reach
    return np.maximum(result[: len(result) - rest], result[rest:]) if rest else result

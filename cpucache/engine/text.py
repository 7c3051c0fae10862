"""From tokens to text that can be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """Turns the bytes of tokens into text as soon as it is certain.

    A character may be spread over several tokens, and a stop string over several pieces: what may still become one is
    held back. After a stop string has been found ``stopped`` names it, and no more text comes.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""
        self.stopped = ""
        """The stop string that was found."""

    def feed(self, piece: bytes) -> str:
        """The text that ``piece`` makes certain."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What is left: half a character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True)) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # The one that is complete first, so that it does not matter how the text came in pieces.
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.stopped = min(ends)
            self._held = ""
            return text[:at]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

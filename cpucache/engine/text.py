"""Text of tokens that can be shown: complete characters only, and no part of a stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """Decodes the bytes of tokens to text, as soon as later tokens can't change it.

    A character may extend over several tokens, and a stop string over several pieces. Text that may still become part
    of a stop string is held back. Once a stop string is found, ``stopped`` is set and no more text is returned.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""
        self.stopped = ""
        """The stop string that was found; empty if none was."""

    def feed(self, piece: bytes) -> str:
        """Adds the bytes of a token, and returns the text that can be shown now."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """Returns the text held back. An incomplete character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True)) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        """Adds decoded text; returns the text before a stop string, or all that can't be part of one."""
        if self.stopped:
            return ""
        text = self._held + new
        # The stop string that ends first wins, so that the result does not depend on the boundaries of pieces.
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.stopped = min(ends)
            self._held = ""
            return text[:at]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

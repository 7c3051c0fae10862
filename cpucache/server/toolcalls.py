"""Tool calls in the text of an answer, found while the model writes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from cpucache.layout.conversation import ToolCall

# Qwen, Hermes and many others; Mistral, whose tag is a control token without text. Llama writes the whole answer as
# JSON, small models put a fence around it.
_OPEN = ("<tool_call>", "[TOOL_CALLS]")
_WHOLE = ("{", "[{", "```json", "<|python_tag|>")
_TAG = "<tool_call>"


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    """A number as a float. One that is too large becomes the largest float, since JSON has no infinity."""
    return max(-sys.float_info.max, min(float(number), sys.float_info.max))


# Models write line breaks into strings without escaping them.
_DECODER = json.JSONDecoder(parse_constant=_refused, parse_float=_finite, strict=False)


def _length(source: str) -> int:
    """Length of the JSON value at the beginning of a text in characters; 0 if there is none."""
    try:
        return int(_DECODER.raw_decode(source)[1])
    except (ValueError, RecursionError):
        return 0


@dataclass
class ToolParser:
    """Separates calls from text, piece by piece.

    Text is returned as soon as it can't be the beginning of a call any more.
    """

    names: Collection[str]
    """Names of the tools that may be called. If empty, everything is text."""
    calls: list[ToolCall] = field(default_factory=list)
    """The calls found. Empty until ``finish``."""
    _held: str = ""
    _calling: bool = False
    _begun: bool = False

    def feed(self, piece: str) -> str:
        """Takes a piece of the answer. Returns the text that can't belong to a call any more."""
        if not self.names:
            return piece
        self._held += piece
        if self._calling:
            return ""
        if not self._begun:
            head = self._held.lstrip()
            if not head or any(whole.startswith(head) or head.startswith(whole) for whole in _WHOLE):
                self._calling = any(head.startswith(whole) for whole in _WHOLE)
                return ""
            self._begun = True
        at = min((found for each in _OPEN if (found := self._held.find(each)) >= 0), default=-1)
        if at >= 0:
            text, self._held, self._calling = self._held[:at], self._held[at:], True
            return text.rstrip()
        keep = max((size for each in _OPEN for size in range(len(each)) if self._held.endswith(each[:size])), default=0)
        # White space is held too: before a call it is dropped.
        keep += len(self._held[: len(self._held) - keep]) - len(self._held[: len(self._held) - keep].rstrip())
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """Sets ``calls`` after the last piece, and returns the rest of the text."""
        rest, self._held = self._held, ""
        if not self._calling:
            return rest
        self.calls = self._parsed(rest)
        return "" if self.calls else rest

    def _parsed(self, text: str) -> list[ToolCall]:
        """Returns the calls in a text; none if any of them is malformed or names an unknown tool."""
        found: list[ToolCall] = []
        sources, at = [], 0
        while (begin := text.find(_TAG, at)) >= 0:
            sources.append(text[begin + len(_TAG) :].lstrip())
            # Search after the JSON of this call: its arguments may contain the tags.
            at = begin + len(_TAG) + _length(sources[-1])
        stripped = text.strip().removeprefix("<|python_tag|>").removeprefix("[TOOL_CALLS]").strip()
        if stripped.startswith("```"):
            stripped = stripped.removeprefix("```json").removeprefix("```").removesuffix("```").strip()
        for source in sources or [stripped]:
            try:
                value, _ = _DECODER.raw_decode(source)
            except (ValueError, RecursionError):
                return []
            for each in value if isinstance(value, list) else [value]:
                call = self._call(each)
                if call is None:
                    return []
                found.append(call)
        return found

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters")) or {}
        if isinstance(arguments, str):
            try:
                arguments = _DECODER.decode(arguments)
            except (ValueError, RecursionError):
                return None
        return ToolCall(value["name"], arguments, f"call_{token_hex(12)}") if isinstance(arguments, dict) else None

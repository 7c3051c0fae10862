"""Misses: why tokens of a prompt were evaluated that an earlier prompt had as well.

Pure functions over prompts as tokens with roles. Nothing here evaluates, or looks into the store.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cpucache.layout import RoleRun, Tokens
from cpucache.layout.vocabulary import common

Cause: TypeAlias = Literal[
    "nothing-known",
    "another-text",
    "answer-rewritten",
    "reasoning-left-out",
    "tools-reordered",
    "tools-changed",
    "line-changed",
    "message-changed",
    "system-changed",
    "evicted",
    "resume-points",
    "cache-off",
    "not-encoded",
]
Read: TypeAlias = Callable[[Tokens], str]
"""Returns the text of tokens, control tokens included."""
_Mask: TypeAlias = npt.NDArray[np.bool_]

RUN = 16
"""Minimum number of consecutive tokens that count as shared text. A miss of fewer tokens is not reported."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHARE = 0.25  # of a prompt that another must share, for the prompt to count as changed
_LINES, _PART = 3, 48  # most lines, or words in a row, of a difference that counts as "a line"
_NEAR = 192  # tokens before the first tool that a template may spend to announce tools
_SPACE = re.compile(r"\s+")
_THOUGHT = re.compile(r"<think>.*?(</think>\s*|$)", re.DOTALL)
_TOOL_LIST = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)
_REMINDER = "<system-reminder>"
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings without escaping them


@dataclass(frozen=True, eq=False)
class Asked:
    """A prompt that was evaluated or spliced earlier, or is explained now."""

    tokens: Tokens
    """The prompt, and what was evaluated of its answer."""
    size: int
    """Tokens of the prompt."""
    roles: tuple[RoleRun, ...] = ()
    ends: tuple[int, ...] = ()
    """Ends of the slices that were saved of it, each with all tokens before it as context."""
    evaluated: tuple[tuple[int, int], ...] = ()
    """Runs of tokens of the prompt that were evaluated, each by its beginning and end."""
    use_cache: bool = True

    @property
    def prompt(self) -> Tokens:
        """The tokens of the prompt, without the answer."""
        return self.tokens[: self.size]

    @property
    def runs(self) -> tuple[RoleRun, ...]:
        """The roles of prompt and answer."""
        if len(self.tokens) == self.size:
            return self.roles
        return (*self.roles, RoleRun("assistant", self.size, len(self.tokens)))

    def fresh(self) -> _Mask:
        """Returns a mask of the prompt's tokens: whether each was evaluated."""
        mask = np.zeros(self.size, np.bool_)
        for begin, end in self.evaluated:
            mask[begin:end] = True
        return mask


@dataclass(frozen=True)
class Miss:
    """The cause of a miss."""

    cause: Cause
    position: int
    """Length of the common beginning with the nearest known prompt, in tokens."""
    evaluated: int
    """Tokens that were evaluated for this cause."""
    nearest: Asked | None = None


class Turn(NamedTuple):
    """The turn of one role in a prompt, with the text that the template puts around it."""

    role: str
    begin: int
    end: int


def explain(asked: Asked, known: Sequence[Asked], read: Read, *, points: bool = False) -> Miss | None:
    """Returns why tokens of a prompt were evaluated that a known prompt had as well; ``None`` if there are hardly any.

    Args:
        asked: The prompt.
        known: Earlier prompts, the oldest first.
        read: Returns the text of tokens.
        points: Whether the model resumes only where a recurrent state was saved (``Memory.points``).
    """
    fresh = asked.fresh()
    total = int(fresh.sum())
    if total <= RUN:
        return None
    if not asked.use_cache:
        return Miss("cache-off", 0, total)
    found = nearest(asked.prompt, known)
    if found is None:
        return Miss("nothing-known", 0, total)
    other, at, shared = found
    size = int(shared.sum())
    if size < RUN:
        return Miss("another-text", at, total, other)
    differs = at < min(asked.size, len(other.tokens))
    if differs and size < _SHARE * asked.size and _in_first_message(asked, other, at):
        return Miss("another-text", at, total, other)
    shared[:at] = True
    if differs and _answers(asked, other, at):
        # The answer differs in its tokens, and counts as the same text.
        shared[at : turn(asked.roles, at, asked.size).end] = True
    lost = int((fresh & shared).sum())
    if lost <= RUN:
        return None
    held = max((end for end in other.ends if end <= at), default=0)
    gone = int(fresh[:held].sum())
    if gone > RUN and 2 * gone >= lost:
        return Miss("resume-points" if points else "evicted", at, lost, other)
    if not differs:
        return None  # the end of a segment that was incomplete in the known prompt
    return Miss(difference(other, asked, at, read), at, lost, other)


def nearest(prompt: Tokens, known: Sequence[Asked]) -> tuple[Asked, int, _Mask] | None:
    """Returns the known prompt that shares most tokens, at its beginning or elsewhere; of equals, the last.

    The tuple holds that prompt, the length of the common beginning, and a mask of the shared tokens of ``prompt``.
    """
    best: tuple[tuple[int, int], Asked, int, _Mask] | None = None
    mine = _hashes(prompt)
    for each in known:
        at = common(prompt, each.tokens)
        mask = _covered(len(prompt), np.isin(mine, _hashes(each.tokens)))
        mask[:at] = True
        worth = (int(mask.sum()), at)
        if best is None or worth >= best[0]:
            best = worth, each, at, mask
    return None if best is None else best[1:]


def _hashes(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """Returns a hash of each ``RUN`` consecutive tokens."""
    count = len(tokens) - RUN + 1
    found = np.zeros(max(0, count), np.uint64)
    for offset in range(RUN if count > 0 else 0):
        found = found * _FACTOR + tokens[offset : offset + count].astype(np.uint64)
    return found


def _covered(size: int, begins: _Mask) -> _Mask:
    """Returns a mask of ``size`` places: whether a run of ``RUN`` tokens that begins in ``begins`` covers each."""
    steps = np.zeros(size + 1, np.int64)
    steps[: len(begins)] += begins
    steps[RUN : RUN + len(begins)] -= begins
    covered: _Mask = np.cumsum(steps)[:size] > 0
    return covered


def turn(runs: Sequence[RoleRun], at: int, size: int) -> Turn:
    """Returns the turn that holds the token at a place of a prompt of ``size`` tokens.

    Text that a template puts between two messages belongs to the second; calls of the assistant, which are no run of
    their own, to the assistant.
    """
    others = [run for run in runs if run.role != "assistant"]
    within = next((run for run in others if run.begin <= at < run.end), None)
    if within is not None:
        return Turn(*_fields(within))
    begin = max((run.end for run in others if run.end <= at), default=0)
    following = next((run for run in others if run.begin > at), None)
    end = size if following is None else following.begin
    said = any(run.role == "assistant" and begin <= run.begin < end for run in runs)
    before = max((run for run in others if run.end <= at), key=lambda run: run.end, default=None)
    called = following is not None and following.role == "tool" and (before is None or before.role != "tool")
    if said or called or following is None:
        return Turn("assistant", begin, end)
    return Turn(following.role, begin, end)


def _turns(known: Asked, asked: Asked, at: int) -> tuple[Turn, Turn]:
    """Returns the turns at a place of two prompts that are equal before it."""
    one, other = (turn(each.runs, at, len(each.tokens)) for each in (known, asked))

    def of(prompt: Asked, mine: Turn, others: Turn) -> Turn:
        """Returns the message that ends at the place if the other prompt continues it."""
        ended = (run for run in prompt.runs if (run.role, run.begin, run.end) == (others.role, others.begin, at))
        return next((Turn(*_fields(run)) for run in ended), mine)

    return of(known, one, other), of(asked, other, one)


def _fields(run: RoleRun) -> tuple[str, int, int]:
    return run.role, run.begin, run.end


def _in_first_message(asked: Asked, known: Asked, at: int) -> bool:
    """Whether a place is before the end of the first message of either prompt; without roles, of the prompt."""
    ends = [runs[0].end if (runs := each.roles) else each.size for each in (asked, known)]
    return at <= max(ends)


def _answers(asked: Asked, known: Asked, at: int) -> bool:
    """Whether a place is in an answer in both prompts."""
    return all(turn(each.runs, at, len(each.tokens)).role == "assistant" for each in (asked, known))


def difference(known: Asked, asked: Asked, at: int, read: Read) -> Cause:
    """Returns the cause of the difference between two prompts whose first ``at`` tokens are equal."""
    tools = _difference_of_tools(known, asked, at, read)
    if tools is not None:
        return tools
    one, other = _turns(known, asked, at)
    texts = (read(known.tokens[one.begin : one.end]), read(asked.tokens[other.begin : other.end]))
    roles = {one.role, other.role}
    if roles == {"assistant"}:
        return difference_of_answers(*texts)
    if "system" in roles:
        return "line-changed" if len(roles) == 1 and one_line(*texts) else "system-changed"
    reminded = (_REMINDER in texts[0]) != (_REMINDER in texts[1]) or _without_digits(texts[0]) == _without_digits(
        texts[1]
    )
    if len(roles) == 1 and (reminded or (all(_REMINDER in text for text in texts) and one_line(*texts))):
        return "line-changed"
    return "message-changed"


def difference_of_answers(known: str, sent: str) -> Cause:
    """Returns the cause of the difference between an answer as generated and as sent back."""
    if same_answer(known, sent):
        return "answer-rewritten"
    if "<think>" in known and same_answer(_THOUGHT.sub("", known), _THOUGHT.sub("", sent)):
        return "reasoning-left-out"
    return "message-changed"


def same_answer(one: str, other: str) -> bool:
    """Whether one text begins with the other, apart from white space and the form of JSON."""
    first, second = _canonical(one), _canonical(other)
    return first.startswith(second) or second.startswith(first)


def _canonical(text: str) -> str:
    """Returns the text without white space, with its JSON in one form."""
    parts, at = [], 0
    while (begin := text.find("{", at)) >= 0:
        parts.append(text[at:begin])
        try:
            value, at = _DECODER.raw_decode(text, begin)
            parts.append(json.dumps(_plain(value), sort_keys=True))
        except (ValueError, RecursionError):
            at = begin + 1
            parts.append("{")
    return _SPACE.sub("", "".join([*parts, text[at:]]))


def _plain(value: object) -> object:
    """Returns a call with its arguments as an object, if they are JSON in a string."""
    if isinstance(value, dict) and isinstance(value.get("arguments"), str):
        try:
            return {**value, "arguments": _DECODER.decode(value["arguments"])}
        except (ValueError, RecursionError):
            return value
    return value


def one_line(known: str, sent: str) -> bool:
    """Whether two texts differ only in a few lines, or in one short part."""
    before, after = known.splitlines(), sent.splitlines()
    fewer, more = Counter(before) - Counter(after), Counter(after) - Counter(before)
    if max(fewer.total(), more.total()) <= min(_LINES, max(len(before), len(after)) // 2):
        return True
    first, second = _SPACE.split(known), _SPACE.split(sent)
    same = _shared(first, second)
    same += _shared(first[same:][::-1], second[same:][::-1])
    return max(len(first), len(second)) - same <= min(_PART, same)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    return next(
        (at for at, (first, second) in enumerate(zip(one, other, strict=False)) if first != second),
        min(len(one), len(other)),
    )


def _without_digits(text: str) -> str:
    """Returns the text with all digits replaced by 0, so that a clock always reads the same."""
    return re.sub(r"\d", "0", text)


def _difference_of_tools(known: Asked, asked: Asked, at: int, read: Read) -> Cause | None:
    first, second = tools_of(known, read), tools_of(asked, read)
    if first.texts == second.texts or not (_is_at(first, second, at) or _is_at(second, first, at)):
        return None
    return "tools-reordered" if sorted(first.texts) == sorted(second.texts) else "tools-changed"


class Tools(NamedTuple):
    """The tools that a prompt describes, and their place."""

    texts: list[str]
    begin: int
    end: int


def tools_of(asked: Asked, read: Read) -> Tools:
    """Returns the tools of a prompt: those that its template was given, or a list in its text."""
    runs = [run for run in asked.roles if run.role == "tools"]
    if runs:
        texts = [read(asked.tokens[run.begin : run.end]) for run in runs]
        return Tools(texts, runs[0].begin, runs[-1].end)
    for run in asked.roles[:2]:
        tokens = asked.tokens[run.begin : run.end]
        found = _TOOL_LIST.search(read(tokens))
        if found:
            # Places are known in characters only; the system text follows the list.
            share = found.end() / max(1, len(found.string))
            return Tools(found[1].splitlines(), run.begin, run.begin + round(share * len(tokens)))
    return Tools([], 0, 0)


def _is_at(tools: Tools, others: Tools, at: int) -> bool:
    """Whether a place is in the description of tools, or, if the other prompt has none, shortly before it."""
    return bool(tools.texts) and tools.begin - (0 if others.texts else _NEAR) <= at <= tools.end

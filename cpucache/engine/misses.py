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
"""Gives the text of tokens, control tokens included."""
_Mask: TypeAlias = npt.NDArray[np.bool_]

RUN = 16
"""Tokens in a row that two prompts have in common at least, where these count as the same text. Fewer evaluated tokens
are no loss worth a word."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHARE = 0.25  # of a text that must be known elsewhere, for the text to count as changed and not as another
_LINES, _PART = 3, 48  # lines, or tokens in a row, that may differ where "a line" has changed
_NEAR = 192  # tokens before the first tool that say that there are tools
_SPACE = re.compile(r"\s+")
_THOUGHT = re.compile(r"<think>.*?(</think>\s*|$)", re.DOTALL)
_TOOL_LIST = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)
_REMINDER = "<system-reminder>"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, eq=False)
class Asked:
    """A prompt that was asked for."""

    tokens: Tokens
    """The prompt, and what was evaluated of its answer."""
    size: int
    """Tokens of the prompt."""
    roles: tuple[RoleRun, ...] = ()
    ends: tuple[int, ...] = ()
    """Where slices end that were saved of it, each behind all tokens before it."""
    evaluated: tuple[tuple[int, int], ...] = ()
    """The tokens of the prompt that were evaluated, each run by its beginning and end."""
    use_cache: bool = True

    @property
    def prompt(self) -> Tokens:
        """The tokens of the prompt, without the answer."""
        return self.tokens[: self.size]

    @property
    def runs(self) -> tuple[RoleRun, ...]:
        """The roles, the answer's among them."""
        if len(self.tokens) == self.size:
            return self.roles
        return (*self.roles, RoleRun("assistant", self.size, len(self.tokens)))

    def fresh(self) -> _Mask:
        """Of each token of the prompt, whether it was evaluated."""
        mask = np.zeros(self.size, np.bool_)
        for begin, end in self.evaluated:
            mask[begin:end] = True
        return mask


@dataclass(frozen=True)
class Miss:
    """Why tokens were evaluated."""

    cause: Cause
    position: int
    """Tokens that the prompt and the nearest known one begin with."""
    evaluated: int
    """Tokens that were evaluated because of it."""
    nearest: Asked | None = None


class Turn(NamedTuple):
    """What stands at a place of a prompt: whose turn it is, and its tokens with what the template puts around them."""

    role: str
    begin: int
    end: int


def explain(asked: Asked, known: Sequence[Asked], read: Read, *, points: bool = False) -> Miss | None:
    """Why tokens of a prompt were evaluated that need not have been; ``None`` where there are hardly any.

    Args:
        asked: The prompt.
        known: Prompts whose state was there before, the oldest first.
        read: Gives the text of tokens.
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
        # An answer written otherwise has no tokens in common, and is the same all the same.
        shared[at : turn(asked.roles, at, asked.size).end] = True
    lost = int((fresh & shared).sum())
    if lost <= RUN:
        return None
    held = max((end for end in other.ends if end <= at), default=0)
    gone = int(fresh[:held].sum())
    if gone > RUN and 2 * gone >= lost:
        return Miss("resume-points" if points else "evicted", at, lost, other)
    if not differs:
        return None  # the end of a segment that was not complete then
    return Miss(difference(other, asked, at, read), at, lost, other)


def nearest(prompt: Tokens, known: Sequence[Asked]) -> tuple[Asked, int, _Mask] | None:
    """The known prompt that has most of the tokens, at its beginning or elsewhere; of equals, the last.

    Gives it, how many tokens both begin with, and of each token of ``prompt`` whether it is in a run that both have.
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
    """A number for each ``RUN`` tokens in a row."""
    count = len(tokens) - RUN + 1
    found = np.zeros(max(0, count), np.uint64)
    for offset in range(RUN if count > 0 else 0):
        found = found * _FACTOR + tokens[offset : offset + count].astype(np.uint64)
    return found


def _covered(size: int, begins: _Mask) -> _Mask:
    """Of each of ``size`` places, whether one of the ``RUN`` long runs that begin where told covers it."""
    steps = np.zeros(size + 1, np.int64)
    steps[: len(begins)] += begins
    steps[RUN : RUN + len(begins)] -= begins
    covered: _Mask = np.cumsum(steps)[:size] > 0
    return covered


def turn(runs: Sequence[RoleRun], at: int, size: int) -> Turn:
    """The turn that has the token at a place of a prompt of ``size`` tokens.

    What a template puts between two messages belongs to the second; the calls of an assistant's, which are no run of
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
    """The turns at a place of two prompts that are the same up to there."""
    one, other = (turn(each.runs, at, len(each.tokens)) for each in (known, asked))

    def of(prompt: Asked, mine: Turn, others: Turn) -> Turn:
        """A message that ends there, where the other goes on."""
        ended = (run for run in prompt.runs if (run.role, run.begin, run.end) == (others.role, others.begin, at))
        return next((Turn(*_fields(run)) for run in ended), mine)

    return of(known, one, other), of(asked, other, one)


def _fields(run: RoleRun) -> tuple[str, int, int]:
    return run.role, run.begin, run.end


def _in_first_message(asked: Asked, known: Asked, at: int) -> bool:
    """Whether a place is before the end of the first message of either prompt, or of all where nobody speaks."""
    ends = [runs[0].end if (runs := each.roles) else each.size for each in (asked, known)]
    return at <= max(ends)


def _answers(asked: Asked, known: Asked, at: int) -> bool:
    """Whether a place is in an answer in both prompts."""
    return all(turn(each.runs, at, len(each.tokens)).role == "assistant" for each in (asked, known))


def difference(known: Asked, asked: Asked, at: int, read: Read) -> Cause:
    """What the difference is between two prompts, whose first ``at`` tokens are the same."""
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
    """What the difference is between an answer as it was given and as it was sent back."""
    if same_answer(known, sent):
        return "answer-rewritten"
    if "<think>" in known and same_answer(_THOUGHT.sub("", known), _THOUGHT.sub("", sent)):
        return "reasoning-left-out"
    return "message-changed"


def same_answer(one: str, other: str) -> bool:
    """Whether two texts say the same but for white space and the way in which JSON is written, as far as both go."""
    first, second = _canonical(one), _canonical(other)
    return first.startswith(second) or second.startswith(first)


def _canonical(text: str) -> str:
    """The text without white space, and with the JSON in it written in one way."""
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
    """A call with its arguments as an object, where these are JSON in a text."""
    if isinstance(value, dict) and isinstance(value.get("arguments"), str):
        try:
            return {**value, "arguments": json.loads(value["arguments"])}
        except (ValueError, RecursionError):
            return value
    return value


def one_line(known: str, sent: str) -> bool:
    """Whether two texts are the same but for a few lines, or one short part."""
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
    """The text with all digits alike: what is left of a clock says nothing of the time."""
    return re.sub(r"\d", "0", text)


def _difference_of_tools(known: Asked, asked: Asked, at: int, read: Read) -> Cause | None:
    first, second = tools_of(known, read), tools_of(asked, read)
    if first.texts == second.texts or not (_is_at(first, second, at) or _is_at(second, first, at)):
        return None
    return "tools-reordered" if sorted(first.texts) == sorted(second.texts) else "tools-changed"


class Tools(NamedTuple):
    """The tools that a prompt describes, and where."""

    texts: list[str]
    begin: int
    end: int


def tools_of(asked: Asked, read: Read) -> Tools:
    """The tools of a prompt: those that its template was given, or a list in words."""
    runs = [run for run in asked.roles if run.role == "tools"]
    if runs:
        texts = [read(asked.tokens[run.begin : run.end]) for run in runs]
        return Tools(texts, runs[0].begin, runs[-1].end)
    for run in asked.roles[:2]:
        tokens = asked.tokens[run.begin : run.end]
        found = _TOOL_LIST.search(read(tokens))
        if found:
            # Places are known in characters only: what stands behind the list is the system text.
            share = found.end() / max(1, len(found.string))
            return Tools(found[1].splitlines(), run.begin, run.begin + round(share * len(tokens)))
    return Tools([], 0, 0)


def _is_at(tools: Tools, others: Tools, at: int) -> bool:
    """Whether a place is where tools are described, or, where the other prompt has none, begin to be."""
    return bool(tools.texts) and tools.begin - (0 if others.texts else _NEAR) <= at <= tools.end

"""Stages: where the time of a request goes, measured where the work is done, for whoever asks.

``with profiled() as profile`` profiles what is asked for in its block. Elsewhere ``stage`` costs a look at a variable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, TypeAlias, get_args

Stage: TypeAlias = Literal["parse", "plan", "look up", "load", "shift", "decode", "sample"]
"""What a request does. ``parse``: PML text becomes a tree. ``plan``: the prompt becomes tokens at positions. ``look
up``: the slices that there are of it are found. ``load``: their states are put into the llama.cpp context. ``shift``:
they are moved to other positions. ``decode``: llama.cpp evaluates tokens. ``sample``: a token is chosen."""
STAGES: tuple[Stage, ...] = get_args(Stage)


class Profile:
    """Milliseconds of a request by stage. A stage within another counts once, as itself."""

    def __init__(self) -> None:
        self.ms: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        """Of the whole request."""
        self.first_ms: dict[Stage, float] | None = None
        """Until the first token of the answer; ``None``: there is none."""
        self.before_ms = 0.0
        """What was counted before the call."""
        self._open: list[Stage] = []
        self._since = 0.0

    def begin(self, stage: Stage) -> None:
        """Count what follows as ``stage``."""
        self._count()
        self._open.append(stage)

    def end(self) -> None:
        """Count what follows as the stage around the last that began."""
        self._count()
        self._open.pop()

    def add(self, stage: Stage, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self.ms[stage] += seconds * 1000

    def note_call(self) -> None:
        """Note that the call begins whose time is measured."""
        self.before_ms = sum(self.ms.values())

    def note_first(self) -> None:
        """Note that the first token of the answer is there."""
        if self.first_ms is None:
            self.first_ms = dict(self.ms)

    def split(self, ms: float, *, first: bool = True) -> dict[str, float]:
        """Milliseconds by stage, and what is left of ``ms`` as ``rest``: waiting, saving, handing over.

        Args:
            ms: How long it took from the call on. What was parsed before the call comes on top.
            first: Until the first token, instead of to the end.
        """
        spent = self.first_ms if first and self.first_ms is not None else self.ms
        found: dict[str, float] = {name: round(each, 3) for name, each in spent.items()}
        found["rest"] = round(max(0.0, ms + self.before_ms - sum(spent.values())), 3)
        return found

    def _count(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.ms[self._open[-1]] += (now - self._since) * 1000
        self._since = now


class _Timer:
    def __init__(self, profile: Profile, stage: Stage) -> None:
        self._profile = profile
        self._stage = stage

    def __enter__(self) -> None:
        self._profile.begin(self._stage)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.end()


_current: ContextVar[Profile | None] = ContextVar("profile", default=None)
_OFF = nullcontext()


def current() -> Profile | None:
    """The profile of what this thread is doing, if anybody asked for one."""
    return _current.get()


def stage(name: Stage) -> AbstractContextManager[None]:
    """Measures a block as a stage of what this thread is doing. Nothing is measured unless somebody asked."""
    profile = _current.get()
    return _OFF if profile is None else _Timer(profile, name)


@contextmanager
def profiled(profile: Profile | None = None) -> Iterator[Profile]:
    """Profiles what this thread does in a block, and the requests that begin in it, wherever these are served.

    Args:
        profile: Is added to; a new one if none is given.
    """
    profile = Profile() if profile is None else profile
    token = _current.set(profile)
    try:
        yield profile
    finally:
        _current.reset(token)

"""Stages: the time of a request, measured by kind of work where that work is done.

``with profiled() as profile`` measures the requests that begin in its block. Outside such a block, ``stage`` only reads
a variable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, TypeAlias, get_args

Stage: TypeAlias = Literal["parse", "plan", "look up", "load", "shift", "decode", "sample"]
"""Kind of work in a request. ``parse``: PML text becomes a tree. ``plan``: the prompt becomes tokens at positions.
``look up``: its slices are found in the store. ``load``: states are loaded into the llama.cpp context. ``shift``: they
are moved to other positions. ``decode``: llama.cpp evaluates tokens. ``sample``: a token is chosen."""
STAGES: tuple[Stage, ...] = get_args(Stage)


class Profile:
    """Milliseconds of a request by stage. Time in a nested stage counts for the nested stage only."""

    def __init__(self) -> None:
        self.ms: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        """Milliseconds of the whole request."""
        self.first_ms: dict[Stage, float] | None = None
        """Milliseconds until the first token of the answer; ``None`` before there is one."""
        self.before_ms = 0.0
        """Milliseconds counted before ``note_call``, in all stages."""
        self._open: list[Stage] = []
        self._since = 0.0

    def begin(self, stage: Stage) -> None:
        """Counts the time from now on for ``stage``."""
        self._count()
        self._open.append(stage)

    def end(self) -> None:
        """Ends the innermost stage: counts the time from now on for the stage around it."""
        self._count()
        self._open.pop()

    def add(self, stage: Stage, seconds: float) -> None:
        """Adds ``seconds`` that were measured elsewhere to ``stage``."""
        self.ms[stage] += seconds * 1000

    def note_call(self) -> None:
        """Marks the start of the call whose total time ``split`` receives."""
        self.before_ms = sum(self.ms.values())

    def note_first(self) -> None:
        """Marks the first token of the answer."""
        if self.first_ms is None:
            self.first_ms = dict(self.ms)

    def split(self, ms: float, *, first: bool = True) -> dict[str, float]:
        """Milliseconds by stage; ``rest`` is the remainder: waiting, saving, passing results between threads.

        Args:
            ms: Milliseconds since ``note_call``. ``before_ms`` is added to it.
            first: Whether ``ms``, and the result, end with the first token. Without a first token, they are those of
                the whole request.
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
    """Profile that this thread adds to; ``None`` outside ``profiled``."""
    return _current.get()


def stage(name: Stage) -> AbstractContextManager[None]:
    """Measures a block as a stage in the profile of this thread; does nothing outside ``profiled``."""
    profile = _current.get()
    return _OFF if profile is None else _Timer(profile, name)


@contextmanager
def profiled(profile: Profile | None = None) -> Iterator[Profile]:
    """Profiles the work of this thread in a block, and the requests that begin in it, whichever thread serves them.

    Args:
        profile: Profile to add to; ``None`` for a new one.
    """
    profile = Profile() if profile is None else profile
    token = _current.set(profile)
    try:
        yield profile
    finally:
        _current.reset(token)

"""Stages: a profile adds up, nested stages count once, and nothing is measured for whoever did not ask."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.stages import STAGES, Profile, Stage, current, profiled, stage
from tests.support.tries import tries


def test_nothing_is_measured_unless_asked() -> None:
    assert current() is None
    first, second = stage("load"), stage("decode")
    assert first is second, "an object for each stage costs time"
    with first:
        assert current() is None


@tries(100)
@given(
    path=st.recursive(
        st.sampled_from(STAGES).map(lambda name: (name, [])),
        lambda inner: st.tuples(st.sampled_from(STAGES), st.lists(inner, max_size=3)),
    )
)
def test_a_stage_within_another_counts_once(path: tuple[Stage, list[object]]) -> None:
    """By a clock that goes one second further at each look, all that is counted is the time within the outer stage."""
    looks = iter(range(10_000))
    wanted: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)

    def walk(node: tuple[Stage, list[object]]) -> None:
        name, inside = node
        with stage(name):
            for each in inside:
                wanted[name] += 1000
                walk(each)  # type: ignore[arg-type]
            wanted[name] += 1000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpucache.stages.time.perf_counter", lambda: float(next(looks)))
        with profiled() as profile:
            walk(path)
    assert profile.ms == wanted


def test_a_stage_ends_where_an_error_is_raised() -> None:
    with profiled() as profile:
        with pytest.raises(ValueError, match="x"), stage("plan"), stage("parse"):
            raise ValueError("x")
        before = profile.ms["plan"]
        time.sleep(0.001)
        with stage("load"):
            pass
    assert profile.ms["plan"] == before


def test_a_profile_is_of_one_thread_and_ends_with_its_block() -> None:
    seen: list[Profile | None] = []

    def look() -> None:
        seen.append(current())

    with profiled() as outer:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        with profiled() as inner:
            look()
        look()
    look()
    assert seen == [None, inner, outer, None]


@pytest.mark.parametrize("first", [True, False])
def test_what_is_left_is_the_rest(first: bool) -> None:
    profile = Profile()
    profile.add("parse", 0.002)
    profile.note_call()
    profile.add("decode", 0.005)
    profile.note_first()
    profile.add("decode", 0.010)
    profile.note_first()  # there is one first token
    split = profile.split(20.0, first=first)
    assert split["parse"] == 2
    assert split["decode"] == (5 if first else 15)
    assert split["rest"] == (15 if first else 5)
    assert sum(split.values()) == 22
    assert list(split) == [*STAGES, "rest"]

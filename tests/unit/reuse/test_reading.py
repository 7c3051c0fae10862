"""What stands before what while a schema is encoded, the chains that it is put on, and levels of fidelity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpucache.errors import InputError
from cpucache.reuse import DEFAULT, LEVELS, Fidelity, Slices, Span, reading, scaffolded
from cpucache.reuse.chain import Chain
from cpucache.store import text_id
from tests.support.cutting import every
from tests.support.letters import Letters
from tests.support.prompting import Prompting, planning, written
from tests.support.workbench import Tokens

SLICES = Slices("model", "format", every(4))


def text(desk: Prompting, spans: Any) -> str:
    letters = desk.layout.vocabulary
    assert isinstance(letters, Letters)
    return "".join(letters.text(span.tokens) for span in spans)


def stands(
    inside: str, attributes: str = "", *, room: int = 1 << 20, positions: str = "packed"
) -> list[tuple[str, str]]:
    """Text of every slice of a schema, and what stands before it."""
    with planning(written(inside, attributes), positions) as desk:  # type: ignore[arg-type]
        slices = reading(desk.layout, desk.kv_cache.slices, room)
        return [(text(desk, [each]), text(desk, each.context)) for each in slices]


M = "<module name='{0}'>{0}{0}</module>".format


def test_everything_stands_before_what_follows_it() -> None:
    nested = "<module name='n'>nn" + M("i") + "oo</module>"
    assert stands("R" + M("a") + "S" + nested + M("b")) == [
        *[("R", ""), ("aa", "R"), ("S", "Raa"), ("nn", "RaaS"), ("ii", "RaaSnn"), ("oo", "RaaSnnii")],
        ("bb", "RaaSnniioo"),
    ]


UNION = f"<union{{}}>{M('x')}<module name='y'>y{M('z')}</module></union>"


@pytest.mark.parametrize(("attributes", "context"), [("", "Ryzz"), (" scaffold='x'", "Rxx")])
def test_members_of_a_union_never_stand_before_one_another(attributes: str, context: str) -> None:
    rows = stands("R" + UNION.format(attributes) + "S" + M("b"))
    assert rows == [("R", ""), ("xx", "R"), ("y", "R"), ("zz", "Ry"), ("S", context), ("bb", context + "S")]


def test_an_isolated_module_stands_before_nothing_and_after_the_text_around_it() -> None:
    inner = f"<module name='i' isolate='true'>ii{M('n')}</module>"
    rows = stands("R" + M("a") + f"<module name='o'>o{M('b')}{inner}p</module>" + M("c"))
    assert rows == [
        *[("R", ""), ("aa", "R"), ("o", "Raa"), ("bb", "Raao"), ("o", "R"), ("ii", "Ro"), ("nn", "Roii")],
        *[("p", "Raaobb"), ("cc", "Raaobbp")],
    ]
    assert stands("R" + M("a") + UNION.format(" isolate='true'") + "S") == [
        *[("R", ""), ("aa", "R"), ("xx", "R"), ("y", "R"), ("zz", "Ry"), ("S", "Raa")]
    ]


def test_anchored_on_nothing_modules_stand_before_and_after_nothing() -> None:
    nested = f"<module name='o'>o{M('b')}p</module>"
    assert stands("R" + M("a") + "S" + nested + "T", "anchor='none'") == [
        *[("R", ""), ("aa", ""), ("S", "R"), ("o", ""), ("bb", ""), ("p", "o"), ("T", "RS")]
    ]


def test_what_is_not_cached_stands_before_what_follows_it_and_is_no_slice() -> None:
    now = "<module name='now' cache='false'>nn</module><parameter name='p' length='3' scaffold='qr'/>"
    assert stands("R" + now + M("a")) == [("R", ""), ("aa", "Rnnqr_")]


@pytest.mark.parametrize("anchor", ["ancestors", "none"])
def test_a_scaffold_set_holds_its_modules_and_the_text_around_them(anchor: str) -> None:
    inside = "R" + M("a") + "S" + M("b") + M("c") + "<scaffold modules='a c'/>"
    with planning(written(inside, f"anchor='{anchor}'")) as desk:
        (scaffold,) = desk.layout.schema.scaffolds
        slices = scaffolded(desk.layout, desk.kv_cache.slices, scaffold.modules, 1 << 20)
        assert [(text(desk, [each]), text(desk, each.context or ())) for each in slices] == [
            *[("R", ""), ("aa", "R"), ("S", "Raa"), ("cc", "RaaS")]
        ]
        # Back to back, as prompts have it.
        assert [each.start for each in slices] == [0, 1, 3, 4]


def test_where_a_schema_is_longer_than_there_is_room_the_oldest_text_leaves() -> None:
    now = "<module name='now' cache='false'>" + "n" * 600 + "</module>"
    rows = stands("R" + "".join(map(M, "abcdefgh")), room=10)
    assert rows[:5] == [("R", ""), ("aa", "R"), ("bb", "Raa"), ("cc", "Raabb"), ("dd", "Raabbcc")]
    assert rows[5:] == [("ee", "Rdd"), ("ff", "Rddee"), ("gg", "Rddeeff"), ("hh", "Rgg")]
    assert all(len(one) + len(before) <= 10 for one, before in rows)
    # Slices are found by what they attended to, whatever left.
    with planning(
        written("R<module name='x'>" + "x" * 1000 + "</module>" + now + "<module name='c'>" + "c" * 200 + "</module>")
    ) as desk:
        desk.pretend(reading(desk.layout, desk.kv_cache.slices, 1700))
        plan = desk.plan("<c/><user>?</user>")
        assert not any(span.missing for span in plan.spans)


def test_reserved_slices_are_saved_where_the_schema_has_them() -> None:
    with planning(written("R" + UNION.format("") + M("b"))) as desk:
        slices = reading(desk.layout, desk.kv_cache.slices, 1 << 20)
        assert [each.start for each in slices] == [segment.reserved for segment in desk.layout.segments]


# ---- chains ----------------------------------------------------------------------------------------------------------


def tokens(letters: str) -> Tokens:
    return np.frombuffer(letters.encode(), np.uint8).astype(np.int32)


def chain_of(*texts: str) -> Chain:
    chain = Chain(SLICES)
    for each in texts:
        chain.add(chain.next(tokens(each)).span)
    return chain


def said(chain: Chain) -> str:
    return "".join(bytes(span.tokens.astype(np.uint8).tolist()).decode() for span in chain.spans)


def test_only_what_holds_and_attended_to_these_texts_is_kept() -> None:
    chain = chain_of("one", "two", "three")
    ids = {name: text_id(tokens(name)) for name in ("one", "two", "three", "new")}
    assert chain.only(ids.values()) is chain
    assert said(chain.only([ids["one"], ids["two"]])) == "onetwo"
    # The second and the third attended to the first.
    assert said(chain.only([ids["two"], ids["three"]])) == ""
    chain.evaluate(tokens("new"))
    kept = chain.only([ids["one"], ids["new"]])
    assert (said(kept), [span.start for span in kept.spans]) == ("onenew", [0, 3])


def test_a_chain_is_shortened_in_its_middle() -> None:
    chain = chain_of("head", "aaa", "bbb", "ccc")
    assert chain.shortened(13) is chain
    assert said(chain.shortened(12)) == "head"
    assert said(chain_of("hd", *"abcdef").shortened(7)) == "hdf"
    short = chain_of("hd", *"abcdefgh").shortened(9)
    assert (said(short), [span.start for span in short.spans]) == ("hdgh", [0, 2, 3])


def test_segments() -> None:
    text = tokens("abcdefghij")
    blocks = SLICES.cut((), text)
    assert [(each.start, len(each.tokens), each.chained) for each in blocks] == [
        (0, 4, True),
        (4, 4, True),
        (8, 2, True),
    ]
    plan = SLICES.plan((), text)
    assert (plan.n_cached, plan.exact, plan.tokens.tolist()) == (8, True, text.tolist())
    # The last token is evaluated in any case.
    assert SLICES.plan((), text[:8]).n_cached == 4
    assert SLICES.chained(SLICES.plan((), text))[-1].slice == blocks[2]
    rest = SLICES.cut([blocks[0].span], text[4:])
    assert rest == blocks[1:]
    assert SLICES.cut([Span(0, text[:4])], text[4:]) == blocks[1:]


# ---- fidelity --------------------------------------------------------------------------------------------------------


def test_levels() -> None:
    assert {"fast": Fidelity(0), "balanced": Fidelity(0.1), "high": Fidelity(exact=True)} == LEVELS
    assert Fidelity.of() == LEVELS[DEFAULT] == LEVELS["fast"]
    assert [Fidelity.of(level) for level in LEVELS] == list(LEVELS.values())
    usual = Fidelity(0.5)
    assert Fidelity.of(usual=usual) == usual
    assert Fidelity.of("fast", usual=usual) == Fidelity()
    assert Fidelity.of(recompute=0.25, usual=usual) == Fidelity.of(Fidelity(0.25)) == Fidelity(0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute": -0.1}, "recompute=-0.1: must be a share, from 0 to 1"),
        ({"recompute": 1.1}, "recompute=1.1: must be a share"),
        ({"recompute": float("nan")}, "recompute=nan: must be a share"),
        ({"recompute": True}, "recompute=True: must be a share"),
        ({"recompute": "0.1"}, "recompute='0.1': must be a share"),
        ({"fidelity": "best"}, "fidelity='best': must be one of fast, balanced, high"),
        ({"fidelity": "high", "recompute": 0.1}, "give a fidelity or a share to recompute, not both"),
        ({"fidelity": Fidelity(0.2), "recompute": 0.1}, "give a fidelity or a share to recompute, not both"),
    ],
)
def test_settings_that_contradict_one_another(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Fidelity.of(**settings)


def test_exact_slices_leave_nothing_to_recompute() -> None:
    with pytest.raises(InputError, match="exact slices only"):
        Fidelity(0.1, exact=True)

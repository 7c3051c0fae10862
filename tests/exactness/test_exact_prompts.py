"""Exact plans are full prefill, on every architecture; and what repair chooses by the words of the question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpucache.layout import Positions
from cpucache.reuse import Fidelity
from tests.support.cases import ASK, CASES, Case
from tests.support.prompting import Prompting, planning, prompting_in, written
from tests.support.sessions import engine
from tests.support.tiny import ARCHS
from tests.support.workbench import distance, opened, tolerance

TinyModel = Callable[..., Path]

HIGH = Fidelity(exact=True)


def check_is_full_prefill(path: Path, arch: str, case: Case, positions: Positions) -> None:
    """Every prompt of ``case``: the first time, the second time, and on a store that another KV cache has filled."""
    with opened(path, n_ctx=2048) as context:
        desk = prompting_in(context, written(case.schema, case.attributes), positions)
        with desk.store:
            truths = []
            for attributes, content in case.prompts:
                bound = desk.bound(content, attributes)
                plan = desk.plan(bound, HIGH)
                desk.kv_cache.prefill(plan.without_reuse, fresh=True)
                truths.append(desk.logits.copy())
                plan, _ = desk.answer(bound, HIGH)
                assert plan.exact
                assert plan.tokens.tolist() == [token for piece in bound.pieces for token in piece.tokens]
                assert distance(desk.logits, truths[-1]) < tolerance(arch, "f32"), (attributes, content)
            again = prompting_in(context, desk.layout.schema, positions, desk.store)
            for (attributes, content), wanted in zip(case.prompts, truths, strict=True):
                again.kv_cache.reset()
                plan, spent = again.answer(again.bound(content, attributes), HIGH)
                fresh = sum(len(span.tokens) for span in plan.spans if span.slice is None)
                assert (spent.encoded_tokens, spent.fresh_tokens) == (0, fresh)
                assert distance(again.logits, wanted) < tolerance(arch, "f32"), (attributes, content)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_every_kind_of_schema(name: str, positions: Positions, tiny: TinyModel) -> None:
    check_is_full_prefill(tiny("llama"), "llama", CASES[name], positions)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture(arch: str, tiny: TinyModel) -> None:
    for name in ("nesting", "parameters", "new text between references", "another order", "siblings"):
        check_is_full_prefill(tiny(arch), arch, CASES[name], "reserved")


def test_modules_anchored_on_nothing(tiny: TinyModel) -> None:
    case = CASES["text between modules"]
    check_is_full_prefill(tiny("llama"), "llama", Case(case.schema, case.prompts, "anchor='none'"), "reserved")


SCHEMA = (
    "Root<module name='a'>aaa</module><module name='b'>bbb</module>Behind<module name='now' cache='false'>now</module>"
    "<module name='c'>ccc</module>"
)


def test_the_level_is_exact_with_any_model(tiny: TinyModel, tmp_path: Path) -> None:
    prompt = f"<prompt schema='s'><a/><b/>{ASK}</prompt>"
    with engine(tiny("mamba"), tmp_path) as running:
        running.add_schema(written(SCHEMA))
        wanted = running.generate(prompt, use_cache=False, max_tokens=8)
        replies = [running.generate(prompt, fidelity="high", max_tokens=8) for _ in range(2)]
        assert [reply.text for reply in replies] == [wanted.text] * 2
        assert [reply.metrics.encoded_tokens > 0 for reply in replies] == [True, False]


def test_a_prompt_that_ends_in_an_empty_argument_has_logits(tiny: TinyModel) -> None:
    with opened(tiny("llama")) as context:
        desk = prompting_in(context, written("Root and more of it <parameter name='p' length='3'/>"))
        with desk.store:
            desk.kv_cache.encode(desk.reading())
            plan, spent = desk.answer(desk.bound("", "p=''"))
            assert (plan.spans[-1].slice, spent.fresh_tokens) == (None, 1)
            cached = desk.logits.copy()
            desk.kv_cache.prefill(plan.without_reuse, fresh=True)
            assert distance(cached, desk.logits) < tolerance("llama", "f32")


def test_exact_slices_of_what_a_prompt_ends_with_are_found_whole() -> None:
    with planning(written(SCHEMA)) as desk:
        desk.pretend(desk.reading())
        plan = desk.plan("<a/><b/>", HIGH)
        assert not any(span.missing for span in plan.spans)
        assert [len(span.tokens) for span in plan.spans] == [4, 3, 3, 5, 1]


# ---- repair ----------------------------------------------------------------------------------------------------------

CITIES = (
    "Root. <module name='a'>The harbour of Lisbon is large.</module><module name='b'>Kyoto has temples, and Kyoto has "
    "gardens.<module name='in'>The gardens are quiet.</module></module><module name='c'>The river of Porto is "
    "deep.</module><module name='d'>The river of Basel is deep.</module>"
)


def chosen(desk: Prompting, question: str, share: float) -> list[str]:
    plan = desk.plan(f"<d/><c/><b><in/></b><a/>{question}", Fidelity(share))
    spliced = plan.n_cached + plan.n_recomputed
    assert plan.n_recomputed <= max(1, 2 * share * spliced)
    return [span.module for span in plan.spans if span.recomputed]


@pytest.mark.parametrize(
    ("question", "share", "modules"),
    [
        ("How deep is the river in Basel?", 0.15, ["d"]),
        ("How deep is the RIVER in PORTO?", 0.15, ["c"]),
        # A word that few modules have says more than many that most have.
        ("Are the gardens quiet?", 0.15, ["b.in"]),
        # Then the next, as far as it goes.
        ("How deep is the river in Basel?", 0.4, ["d", "c"]),
        ("Kyoto or Lisbon?", 0.5, ["b", "a"]),
        # Less than a module is of no use.
        ("How deep is the river in Basel?", 0.01, []),
        ("How deep is the river in Basel?", 0, []),
    ],
)
def test_modules_that_the_question_is_about_are_recomputed(question: str, share: float, modules: list[str]) -> None:
    with planning(written(CITIES)) as desk:
        desk.pretend(desk.reading())
        assert chosen(desk, question, share) == modules


def test_all_of_it_is_what_is_not_exact() -> None:
    with planning(written(CITIES)) as desk:
        desk.pretend(desk.reading())
        assert chosen(desk, "Basel?", 1) == ["d", "c", "b", "b.in", "a"]
        plan = desk.plan("<a/><b><in/></b><c/><d/>Basel?", Fidelity(1))
        assert plan.exact and not plan.n_recomputed

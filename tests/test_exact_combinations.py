"""``fidelity="high"``: whole combinations of modules, arguments and text as slices, exact on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpucache.engine.tuning import LEVELS
from cpucache.layout import Chains, ChatTemplate, Plan, Positions, SchemaLayout, bind
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.reuse import Workspace
from cpucache.store import Store
from tests.support.sessions import engine
from tests.support.tiny import ARCHS
from tests.support.workbench import PLENTY, distance, opened, tolerance
from tests.test_layout import Letters, lay
from tests.test_modular_reuse import ASK, CASES, Case

TinyModel = Callable[..., Path]

BLOCK = 11  # tokens, so that modules are cut, too


def exact(layout: SchemaLayout, content: str, chains: Chains | None, attributes: str = "") -> Plan:
    prompt = parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>")
    return bind(layout, resolve(prompt, layout.schema), exact=chains)


def check_is_full_prefill(path: Path, arch: str, case: Case, positions: Positions) -> None:
    """Every prompt of ``case``: the first time, the second time, and on a store that another workspace has filled."""
    with opened(path, n_ctx=2048) as context:
        model = context.model
        schema = parse_schema(f"<schema name='s' {case.attributes}>{case.schema}</schema>")
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template), positions)
        chains = Chains(BLOCK)
        with Store(None, ram_budget=PLENTY) as store:
            workspace = Workspace(context, store, "model")
            truths = []
            for attributes, content in case.prompts:
                plan = exact(layout, content, chains, attributes)
                assert plan.tokens.tolist() == exact(layout, content, None, attributes).tokens.tolist()
                assert plan.exact and plan.spans[-1].segment is None
                workspace.prefill(plan.without_reuse(), fresh=True)
                truths.append(context.last_logits().copy())
                workspace.prefill(plan)
                assert distance(context.last_logits(), truths[-1]) < tolerance(arch, "f32"), (attributes, content)
            again = Workspace(context, store, "model")
            for (attributes, content), wanted in zip(case.prompts, truths, strict=True):
                again.reset()
                # Other segments of the same text: what the store has is found by what it is.
                plan = exact(layout, content, Chains(BLOCK), attributes)
                spent = again.prefill(plan)
                assert (spent.encoded_tokens, spent.fresh_tokens) == (0, len(plan.spans[-1].tokens))
                assert distance(context.last_logits(), wanted) < tolerance(arch, "f32"), (attributes, content)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_every_kind_of_schema(name: str, positions: Positions, tiny: TinyModel) -> None:
    check_is_full_prefill(tiny("llama"), "llama", CASES[name], positions)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture(arch: str, tiny: TinyModel) -> None:
    for name in ("nesting", "parameters", "new text between references", "another order"):
        check_is_full_prefill(tiny(arch), arch, CASES[name], "reserved")


def test_modules_anchored_on_nothing(tiny: TinyModel) -> None:
    case = CASES["text between modules"]
    check_is_full_prefill(tiny("llama"), "llama", Case(case.schema, case.prompts, "anchor='none'"), "reserved")


# ---- what becomes a slice --------------------------------------------------------------------------------------------

SCHEMA = (
    "Root<module name='a'>aaa</module><module name='b'>bbb</module>Behind<module name='now' cache='false'>now</module>"
    "<module name='c'>ccc</module>"
)


@pytest.mark.parametrize(
    ("content", "slices", "fresh"),
    [
        ("<a/><b/>?", ["Root", "aaa", "bbb", "Behind"], "?"),
        ("<b/><a/>?", ["Root", "bbb", "aaa", "Behind"], "?"),
        # Text that the prompt brings is a part of the combination.
        ("<a/>new<c/>?", ["Root", "aaa", "Behind", "new", "ccc"], "?"),
        ("new<a/>", ["Root", "new", "aaa", "Behin"], "d"),
        # What is never saved ends it.
        ("<a/><now/><c/>?", ["Root", "aaa", "Behind"], "nowccc?"),
        ("<a/><b/><c/>", ["Root", "aaa", "bbb", "Behind", "cc"], "c"),
    ],
)
def test_slices_end_where_pieces_of_the_schema_do(content: str, slices: list[str], fresh: str) -> None:
    layout = lay(SCHEMA)
    letters = layout.vocabulary
    assert isinstance(letters, Letters)
    plan = exact(layout, content, Chains())
    assert [letters.text(span.tokens) for span in plan.spans] == [*slices, fresh]


def test_what_the_schema_has_is_taken() -> None:
    layout = lay(SCHEMA)
    own = set(layout.segments)
    chains = Chains()
    first = exact(layout, "<a/><b/>?", chains)
    # The second module has not seen the first.
    assert [segment in own for segment in first.segments] == [True, True, False, False]
    assert exact(layout, "<a/><b/>what?", chains).segments == first.segments
    assert exact(layout, "<a/><c/>?", chains).segments[:2] == first.segments[:2]
    together = lay("<scaffold modules='a b'/>" + SCHEMA)
    assert set(exact(together, "<a/><b/>?", chains).segments) <= set(together.segments)


def test_the_level(tiny: TinyModel, tmp_path: Path) -> None:
    assert LEVELS["high"].exact
    prompt = f"<prompt schema='s'><a/><b/>{ASK}</prompt>"
    with engine(tiny("mamba"), tmp_path) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{SCHEMA}</schema>"))
        # Not even a recurrent model minds.
        wanted = running.generate(prompt, use_cache=False, max_tokens=8)
        replies = [running.generate(prompt, fidelity="high", max_tokens=8) for _ in range(2)]
        assert [reply.text for reply in replies] == [wanted.text] * 2
        assert [reply.metrics.encoded_tokens > 0 for reply in replies] == [True, False]
        plan = running.plan(prompt, fidelity="high", link_tokens=3, recompute=0.5)
        assert plan.exact and not any(span.renewed for span in plan.spans)
        assert np.array_equal(plan.tokens, running.plan(prompt).tokens)

"""Modular reuse is what it says: spliced logits against a forward pass in NumPy that is told each slice's context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.layout import Positions
from cpucache.reuse import LEVELS, Fidelity, scaffolded
from cpucache.runtime import KVType
from tests.support.cases import ASK, CASES, ISOLATED, SETS, UNANCHORED, WHOLE, Case
from tests.support.oracle import Oracle
from tests.support.prompting import prompting, written
from tests.support.reference import ReferenceLlama
from tests.support.workbench import distance

TinyModel = Callable[..., Path]

TOLERANCE = {"f32": 1e-3, "f16": 1e-2, "q8_0": 0.15}
FAST = LEVELS["fast"]
EVERY = {
    **{str(level): each for level, each in LEVELS.items()},
    "recompute 0.3": Fidelity(0.3),
    "recompute 1": Fidelity(1.0),
}

VOCABULARIES: dict[str, dict[str, Any]] = {
    "bpe": {},
    "bpe with BOS": {"add_bos": True},
    "spm with BOS": {"tokenizer": "spm", "add_bos": True},
}


def check_logits(
    path: Path,
    case: Case,
    fidelity: Fidelity = FAST,
    *,
    kv_type: KVType = "f32",
    positions: Positions = "reserved",
    packed: bool | None = None,
    ahead: bool = False,
) -> None:
    """Every prompt of ``case``, one after the other on one KV cache, against the oracle."""
    with prompting(path, written(case.schema, case.attributes), positions, kv_type=kv_type) as desk:
        oracle = Oracle(ReferenceLlama.of(path), desk.kv_cache)
        if ahead:
            desk.kv_cache.encode(desk.reading())
            for scaffold in desk.layout.schema.scaffolds:
                desk.kv_cache.encode(scaffolded(desk.layout, desk.kv_cache.slices, scaffold.modules, 1 << 20))
        for attributes, content in case.prompts:
            bound = desk.bound(content, attributes)
            plan, spent = desk.answer(bound, fidelity, packed=packed)
            assert plan.tokens.tolist() == [token for piece in bound.pieces for token in piece.tokens]
            ends = [0, *(span.end for span in plan.spans)]
            assert all(span.start >= end for span, end in zip(plan.spans, ends, strict=False))
            assert not (ahead and not fidelity.exact and spent.encoded_tokens)
            wanted = oracle.logits(plan)
            assert distance(desk.logits, wanted.astype(np.float32)) < TOLERANCE[kv_type], (attributes, content)
            if plan.exact:
                assert np.allclose(oracle.full(plan), wanted)


POSITIONS = pytest.mark.parametrize(
    ("positions", "packed"),
    [("reserved", None), ("packed", None), ("reserved", True)],
    ids=["reserved", "packed", "packed from reserved"],
)
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["on demand", "ahead"])


@pytest.mark.parametrize("name", CASES)
@POSITIONS
@AHEAD
def test_spliced_logits(name: str, positions: Positions, packed: bool | None, ahead: bool, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], positions=positions, packed=packed, ahead=ahead)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", [name for name in EVERY if name != "fast"])
@AHEAD
def test_spliced_logits_at_every_level(name: str, how: str, ahead: bool, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], EVERY[how], ahead=ahead)


@pytest.mark.parametrize("kind", ["isolated", "unanchored", "sets"])
@POSITIONS
def test_spliced_logits_of_other_contexts(
    kind: str, positions: Positions, packed: bool | None, tiny: TinyModel
) -> None:
    for case in {"isolated": ISOLATED, "unanchored": UNANCHORED, "sets": SETS}[kind].values():
        for ahead in (False, True):
            check_logits(tiny("llama"), case, positions=positions, packed=packed, ahead=ahead)


@pytest.mark.parametrize("how", ["balanced", "recompute 0.3"])
def test_recomputed_tokens_in_other_contexts(how: str, tiny: TinyModel) -> None:
    for case in (*ISOLATED.values(), *SETS.values(), UNANCHORED["siblings"], UNANCHORED["nesting"]):
        check_logits(tiny("llama"), case, EVERY[how], ahead=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("vocabulary", ["bpe with BOS", "spm with BOS"])
def test_spliced_logits_under_vocabularies_with_bos(name: str, vocabulary: str, tiny: TinyModel) -> None:
    check_logits(tiny("llama", **VOCABULARIES[vocabulary]), CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_spliced_logits_with_smaller_keys(name: str, kv_type: KVType, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], kv_type=kv_type, packed=True)


@pytest.mark.parametrize("settings", [{"n_kv_head": 4, "seed": 3}, {"n_kv_head": 1, "rope_base": 500000.0}], ids=str)
def test_spliced_logits_of_other_shapes(settings: dict[str, Any], tiny: TinyModel) -> None:
    for case in CASES.values():
        check_logits(tiny("llama", **settings), case)


CROWD = Case(
    "Root. " + "".join(f"<module name='m{number}'>Module {number} of them. </module>" for number in range(30)),
    (
        ("", "".join(f"<m{number}/>" for number in range(29, -1, -1)) + "Module 3, 14 or 25?"),
        ("", "".join(f"<m{number}/> x " for number in range(1, 30, 2)) + "Module 3, 14 or 25?"),
    ),
)


@pytest.mark.parametrize("how", ["fast", "recompute 0.3"])
def test_more_modules_than_sequences(how: str, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CROWD, EVERY[how], ahead=True)


@pytest.mark.parametrize("name", ["siblings", "nesting", "unions", "parameters"])
def test_reuse_is_not_full_prefill(name: str, tiny: TinyModel) -> None:
    """Checks the difference that the tolerance above must detect."""
    path, case = tiny("llama"), CASES[name]
    with prompting(path, written(case.schema)) as desk:
        oracle = Oracle(ReferenceLlama.of(path), desk.kv_cache)
        desk.kv_cache.encode(desk.reading())
        attributes, content = case.prompts[1]
        plan = desk.plan(desk.bound(content, attributes))
        assert not plan.exact
        assert distance(oracle.logits(plan).astype(np.float32), oracle.full(plan).astype(np.float32)) > 0.05


@pytest.mark.parametrize("name", ["siblings", "text between modules", "nesting", "roles", "empty modules"])
@AHEAD
def test_a_prompt_that_leaves_nothing_out_is_exact(name: str, ahead: bool, tiny: TinyModel) -> None:
    """The prompt keeps the order of the schema and replaces none of its text, at any depth of nesting."""
    path, case = tiny("llama"), CASES[name]
    attributes, content = case.prompts[0] if name != "roles" else ("", "<a/><f/><x it='a thing'/>")
    with prompting(path, written(case.schema)) as desk:
        oracle = Oracle(ReferenceLlama.of(path), desk.kv_cache)
        if ahead:
            desk.kv_cache.encode(desk.reading())
        plan, _ = desk.answer(desk.bound(content, attributes), FAST)
        reused = [span for span in plan.spans if span.slice]
        if name not in ("roles", "empty modules"):
            assert plan.exact and len(reused) > 1
        elif name == "empty modules":
            assert len(reused) > 1
        if plan.exact:
            assert distance(desk.logits, oracle.full(plan).astype(np.float32)) < TOLERANCE["f32"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_a_prompt_of_a_scaffold_set_is_full_prefill(name: str, positions: Positions, tiny: TinyModel) -> None:
    path = tiny("llama")
    content, chosen = WHOLE[name]
    anchor = "none" if name.startswith("anchored") else "ancestors"
    with prompting(path, written(content, f"anchor='{anchor}'"), positions) as desk:
        oracle = Oracle(ReferenceLlama.of(path), desk.kv_cache)
        (scaffold,) = desk.layout.schema.scaffolds
        desk.kv_cache.encode(scaffolded(desk.layout, desk.kv_cache.slices, scaffold.modules, 1 << 20))
        plan, spent = desk.answer(chosen + ASK, packed=True)
        arguments = "parameter" in name
        assert (spent.encoded_tokens == 0 and plan.exact) or arguments
        assert distance(desk.logits, oracle.logits(plan).astype(np.float32)) < TOLERANCE["f32"]
        if plan.exact:
            assert distance(desk.logits, oracle.full(plan).astype(np.float32)) < TOLERANCE["f32"]

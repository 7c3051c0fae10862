"""Modular reuse is what its rules say: spliced logits against a forward pass in NumPy under the mask of the schema."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.layout import ChatTemplate, Positions, SchemaLayout, bind
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.reuse import Workspace
from cpucache.runtime import KVType, Model
from cpucache.store import Store
from tests.support.oracle import Oracle
from tests.support.reference import ReferenceLlama, causal
from tests.support.workbench import PLENTY, distance, opened

TinyModel = Callable[..., Path]

TOLERANCE = {"f32": 1e-3, "f16": 1e-2, "q8_0": 0.15}


@dataclass
class Case:
    """The inside of a schema, and prompts on it: their attributes and their inside."""

    schema: str
    prompts: tuple[tuple[str, str], ...]
    attributes: str = ""
    """Of the schema."""


ASK = "<user>and where is it?</user>"

CASES = {
    "siblings": Case(
        "The opening text. <module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<module name='c'>and it ends.</module>",
        (("", "<a/><b/><c/>" + ASK), ("", "<a/><c/>" + ASK), ("", "<c/>" + ASK), ("", ASK), ("", "<b/><c/>")),
    ),
    "siblings with nothing before them": Case(
        "<module name='a'>the first module, </module><module name='b'>here another one.</module>",
        (("", "<a/><b/>" + ASK), ("", "<b/>" + ASK), ("", "<b/>"), ("", "<b/>to be continued")),
    ),
    "text between modules": Case(
        "One. <module name='a'>the first module, </module>Two, at the root. <module name='b'>here another.</module>"
        "Three.<module name='c'>and it ends.</module>",
        (("", "<a/><b/><c/>" + ASK), ("", "<b/>" + ASK), ("", ASK), ("", "<a/><c/>")),
    ),
    "nesting": Case(
        "Root. <module name='a'>Outer text. <module name='b'>Inner <module name='d'>innermost</module> again.</module>"
        "Behind it. <module name='c'>Second inner.</module>And the end.</module> Root again."
        "<module name='e'>Last.</module>",
        (
            ("", "<a><b><d/></b><c/></a><e/>" + ASK),
            ("", "<a><b/></a>" + ASK),
            ("", "<a><c/></a><e/>" + ASK),
            ("", "<a/>" + ASK),
            ("", "<e/>" + ASK),
        ),
    ),
    "unions": Case(
        "Root. <union><module name='a'>a short one</module><module name='b'>one that is a good deal longer</module>"
        "</union>Between. <module name='u'>In it: <union><module name='c'>the third</module><module name='d'>d "
        "<module name='n'>nested</module></module></union> and <union><module name='e'>e</module></union>.</module>",
        (
            ("", "<a/><u><c/><e/></u>" + ASK),
            ("", "<b/><u><d><n/></d></u>" + ASK),
            ("", "<u><d/><e/></u>" + ASK),
            ("", "<a/>" + ASK),
        ),
    ),
    "a union with a scaffold": Case(
        "Root. <union scaffold='b'><module name='a'>the first </module><module name='b'>the second, and <module "
        "name='n'>nested </module>more </module><module name='c'>the third, which is the longest of all </module>"
        "</union>Behind the union. <module name='m'>A module behind.</module>",
        (
            ("", "<b/><m/>" + ASK),
            ("", "<a/><m/>" + ASK),
            ("", "<c/><m/>" + ASK),
            ("", "<b><n/></b><m/>" + ASK),
            ("", "<m/>" + ASK),
        ),
    ),
    "scaffolds within scaffolds": Case(
        "<module name='w'>With: <union scaffold='a'><module name='a'>Ay <union scaffold='x'><module name='x'>ex "
        "</module><module name='y'>why </module></union>of ay </module><module name='b'>Be <union><module name='z'>zed"
        "</module></union></module></union> text <module name='i'>inner</module>.</module>"
        "<module name='o'>out</module>",
        (
            ("", "<w><a><x/></a><i/></w><o/>" + ASK),
            ("", "<w><a><y/></a><i/></w>" + ASK),
            ("", "<w><b><z/></b><i/></w>" + ASK),
            ("", "<w><i/></w><o/>" + ASK),
        ),
    ),
    "parameters": Case(
        "To <parameter name='who' length='12' scaffold='a friend'/>: <module name='a'>Go to <parameter name='place' "
        "length='16' scaffold='the market'/> at <parameter name='time' length='9'/> sharp. <module name='n'>Then rest."
        "</module></module><module name='b'>The end, <parameter name='who' length='10' scaffold='you'/></module>",
        (
            ("who='a friend'", "<a place='the market' time='noon'><n/></a><b who='you'/>" + ASK),  # as the scaffold
            ("who='Z'", "<a place='sea' time='1'><n/></a>" + ASK),  # shorter
            ("who='my old aunt'", "<a place='the other shop' time='half six'/><b who='my friend'/>" + ASK),  # longer
            ("who='qwertyuiopas'", "<a place='0123456789abcdef' time='123456789'><n/></a><b who='zxcvbnmlkj'/>" + ASK),
            ("who=''", "<a place='' time=''><n/></a><b who=''/>" + ASK),
            ("who='me'", "<b who='them'/>"),
        ),
    ),
    "parameters in unions": Case(
        "Do: <union scaffold='b'><module name='a'>drive <parameter name='x' length='6'/> on</module><module name='b'>"
        "turn <parameter name='x' length='10' scaffold='left'/></module></union><module name='c'>and stop.</module>",
        (("", "<a x='12 m'/><c/>" + ASK), ("", "<b x='right'/><c/>" + ASK), ("", "<c/>" + ASK)),
    ),
    "cache='false'": Case(
        "Root. <module name='a'>cached text </module><module name='now' cache='false'>the news of today <module "
        "name='in'>which were cached, </module>and again news <parameter name='p' length='8' scaffold='so'/></module>"
        "<module name='b'>cached <module name='off' cache='false'>not cached </module>after it</module>",
        (
            ("", "<a/><now p='yes'><in/></now><b><off/></b>" + ASK),
            ("", "<now p='exactly'/><b/>" + ASK),
            ("", "<a/><b><off/></b>" + ASK),
            ("", "<now p=''><in/></now>"),
        ),
    ),
    "cache='false' as a scaffold": Case(
        "Root. <union scaffold='a'><module name='a' cache='false'>in sight, though not cached </module>"
        "<module name='b'>cached</module></union>Behind. <module name='c'>Module.</module>",
        (("", "<a/><c/>" + ASK), ("", "<b/><c/>" + ASK), ("", "<c/>" + ASK)),
    ),
    "new text between references": Case(
        "Root. <module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<module name='c'>and it <module name='n'>nearly </module>ends.</module>",
        (
            ("", "First: <a/> then <b/> last <c/>" + ASK),
            ("", "<a/> in its place <c>now <n/></c>" + ASK),
            ("", "a text much longer than the module that it stands for <c/>"),
            ("", "<a/> x <c/><assistant>It is</assistant>"),
        ),
    ),
    "another order": Case(
        "Root. <module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<module name='c'>and it ends.</module>",
        (("", "<c/><b/><a/>" + ASK), ("", "<b/><a/>" + ASK), ("", "<c/> and <a/>")),
    ),
    "roles": Case(
        "<system>Be brief. <module name='a'>And be kind. </module><union scaffold='f'><module name='f'>French.</module>"
        "<module name='g'>German.</module></union></system><module name='x'><user>What is <parameter name='it' "
        "length='9' scaffold='a thing'/>?</user><assistant>That is</assistant></module>",
        (
            ("", "<a/><g/>" + ASK),
            ("", "<f/><x it='this'/>" + ASK),
            ("", "<a/><x it='over here'/>"),
            ("", "<user>Hello.</user><assistant>Hi.</assistant><user>Who?</user>"),
            ("", ""),
        ),
    ),
    "empty modules": Case(
        "<module name='a'></module><module name='b'><module name='n'>only this</module></module>"
        "<union scaffold='c'><module name='c'></module><module name='d'>dee</module></union>"
        "<module name='e'>end</module>",
        (("", "<a/><b><n/></b><c/><e/>" + ASK), ("", "<b/><d/>" + ASK)),
    ),
}

VOCABULARIES: dict[str, dict[str, Any]] = {
    "bpe": {},
    "bpe with BOS": {"add_bos": True},
    "spm with BOS": {"tokenizer": "spm", "add_bos": True},
}


def check_logits(
    path: Path,
    case: Case,
    *,
    kv_type: KVType = "f32",
    positions: Positions = "reserved",
    packed: bool | None = None,
    ahead: bool = False,
    lead: int = 0,
) -> None:
    """Every prompt of ``case``, one after the other on one workspace, against the oracle."""
    reference = ReferenceLlama(path)
    with opened(path, kv_type) as context:
        model = context.model
        schema = parse_schema(f"<schema name='s' {case.attributes}>{case.schema}</schema>")
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template), positions)
        oracle = Oracle(schema, model, packed=positions == "packed")
        workspace = Workspace(context, Store(None, ram_budget=PLENTY), "model")
        if ahead:
            workspace.encode([each for each in layout.segments if each.cache and not each.placeholder])
        for attributes, content in case.prompts:
            prompt = parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>")
            included = resolve(prompt, schema)
            plan = bind(layout, included, packed=packed, lead=lead)
            parts = oracle.placed(included, packed=bool(packed) or positions == "packed", lead=lead)
            assert plan.tokens.tolist() == [token for _, tokens, _ in parts for token in tokens]
            assert [start for span in plan.spans for start in range(span.start, span.end)] == [
                place for start, tokens, _ in parts for place in range(start, start + len(tokens))
            ]
            assert plan.n_cached == sum(len(tokens) for _, tokens, run in parts if run)
            spent = workspace.prefill(plan)
            assert not (ahead and spent.encoded_tokens)
            expected = oracle.logits(reference, parts).astype(np.float32)
            assert distance(context.last_logits(), expected) < TOLERANCE[kv_type], (attributes, content)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("positions", ["reserved", "packed"])
@pytest.mark.parametrize("ahead", [False, True], ids=["on demand", "ahead"])
def test_spliced_logits(name: str, positions: Positions, ahead: bool, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], positions=positions, ahead=ahead)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("positions", ["reserved", "packed"])
@pytest.mark.parametrize("lead", [1, 8, 40, 400])
def test_leads(name: str, positions: Positions, lead: int, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], positions=positions, lead=lead)


@pytest.mark.parametrize("name", CASES)
def test_spliced_logits_packed_from_reserved(name: str, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], packed=True)


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


@pytest.mark.parametrize("name", ["siblings", "nesting", "unions", "a union with a scaffold", "parameters"])
def test_reuse_is_not_full_prefill(name: str, tiny: TinyModel) -> None:
    """The difference that the tolerance above has to tell apart."""
    path = tiny("llama")
    reference = ReferenceLlama(path)
    case = CASES[name]
    with Model(path) as model:
        schema = parse_schema(f"<schema name='s' {case.attributes}>{case.schema}</schema>")
        oracle = Oracle(schema, model, packed=False)
        attributes, content = case.prompts[0]
        included = resolve(parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>"), schema)
        parts = oracle.placed(included, packed=False)
        tokens = [token for _, part, _ in parts for token in part]
        full = reference.evaluate(tokens, range(len(tokens)), causal(len(tokens)))[-1]
        assert np.sqrt(np.mean((oracle.logits(reference, parts) - full) ** 2)) > 0.05


def test_a_schema_of_text_alone_is_full_prefill(tiny: TinyModel) -> None:
    """With nothing left out and nothing apart, reuse is exact."""
    path = tiny("llama")
    with opened(path) as context:
        model = context.model
        schema = parse_schema(
            "<schema name='s'>All of <parameter name='p' length='5' scaffold='12345'/> is text.</schema>"
        )
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template))
        plan = bind(layout, resolve(parse_prompt("<prompt schema='s' p='12345'>What?</prompt>"), schema))
        Workspace(context, Store(None, ram_budget=PLENTY), "model").prefill(plan)
        n = plan.n_tokens
        full = ReferenceLlama(path).evaluate(plan.tokens.tolist(), range(n), causal(n))[-1]
        assert plan.n_cached > 0
        assert distance(context.last_logits(), full.astype(np.float32)) < TOLERANCE["f32"]

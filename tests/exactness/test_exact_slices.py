"""Slices are exact: whatever is saved, moved, loaded or shared gives the logits of plain evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from cpucache.reuse import Plan, Slice, Span
from cpucache.runtime import KVType
from cpucache.runtime.context import SEQUENCES
from tests.support.tiny import ATTENTION_ARCHS
from tests.support.workbench import (
    SLICES,
    TOLERANCE,
    Desk,
    Tokens,
    bench,
    chain,
    cut,
    distance,
    plan_of,
    scheduled,
    slice_of,
    some_tokens,
    tolerance,
)

TinyModel = Callable[..., Path]

# Sequences that are neither a slot nor the one that slices are loaded in.
FREE = SEQUENCES - 2

KV_TYPES: tuple[KVType, ...] = get_args(KVType)

archs = pytest.mark.parametrize("arch", ATTENTION_ARCHS)
kv_types = pytest.mark.parametrize("kv_type", KV_TYPES)


# ---- a chain is full prefill ----------------------------------------------------------------------------------------
@archs
@kv_types
@pytest.mark.parametrize("edges", [(1,), (59,), (20, 41), (3, 6, 9, 30, 31, 50)], ids=str)
def test_a_chain_gives_full_prefill(arch: str, kv_type: KVType, edges: tuple[int, ...], tiny: TinyModel) -> None:
    text, question = cut(some_tokens(69), 60)
    slices = chain(cut(text, *edges))
    with bench(tiny(arch), kv_type) as b:
        expected = b.full(np.concatenate([text, question]))
        assert distance(b.logits(plan_of(*slices, question)), expected) < tolerance(arch, kv_type)
        # The first part of it counts, or this would show nothing.
        assert distance(b.full(np.concatenate([text[edges[0] :], question])), expected) > 0.04


@archs
def test_a_chain_encoded_piece_by_piece_gives_full_prefill(arch: str, tiny: TinyModel) -> None:
    tokens = some_tokens(69)
    slices = chain(cut(tokens[:60], 7, 30, 33))
    with bench(tiny(arch)) as b:
        for each in slices:
            assert b.kv_cache.encode([each]).slices == 1
        plan = plan_of(*slices, tokens[60:])
        prefill = b.prefill(plan)
        assert (prefill.cached_tokens, prefill.fresh_tokens, prefill.encoded_tokens) == (60, 9, 0)
        assert distance(b.kv_cache.context.logits(), b.full(tokens)) < tolerance(arch, "f32")


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_chain_longer_than_a_batch_gives_full_prefill(arch: str, kv_type: KVType, tiny: TinyModel) -> None:
    tokens = some_tokens(1300)
    with bench(tiny(arch), kv_type, n_ctx=1536) as b:
        plan = plan_of(*chain(cut(tokens[:700], 600, 650)), tokens[700:])
        assert distance(b.logits(plan), b.full(tokens)) < tolerance(arch, kv_type)


@archs
def test_fresh_tokens_between_slices_of_a_chain_give_full_prefill(arch: str, tiny: TinyModel) -> None:
    """The argument of a prompt has the same tokens as the text that the next slice attended to."""
    tokens = some_tokens(80)
    one, argument, two, question = cut(tokens, 30, 37, 70)
    slices = chain([one, argument, two])
    with bench(tiny(arch)) as b:
        plan = plan_of(slices[0], argument, slices[2], question)
        assert distance(b.logits(plan), b.full(tokens)) < tolerance(arch, "f32")
        assert b.prefill(plan, fresh=True).fresh_tokens == 7 + 10


# ---- a moved slice is one evaluated there ---------------------------------------------------------------------------
def moved_plans() -> dict[str, Plan]:
    text = some_tokens(100, seed=1)
    anchor = slice_of(text[:20])
    near = slice_of(text[20:40], [anchor])
    far = slice_of(text[40:65], [anchor], start=50)
    standalone = slice_of(text[65:85], start=200)
    question, more = text[85:92], text[92:]
    return {
        "by the encoder": plan_of(anchor, far, question),
        "by the encoder, without its context": plan_of(far, question),
        "by the encoder, from 0": plan_of(standalone, question),
        "by the splicer, forward": plan_of(anchor, (near, 33), question),
        "by the splicer, back": plan_of(anchor, (far, 40), question),
        "by the splicer, far": plan_of(anchor, (near, 3000), question),
        "by both, packed": plan_of(anchor, (far, 20), (standalone, 45), question),
        "one after another, overlapping where evaluated": plan_of(anchor, near, (far, 60), (standalone, 85), question),
        "after new text": plan_of(more, (anchor, 8), question, (far, 35), (standalone, 60), more[:1]),
        "first, to a later position": plan_of((standalone, 210), question),
    }


@archs
@kv_types
@pytest.mark.parametrize("case", moved_plans())
def test_a_moved_slice_is_one_evaluated_there(arch: str, kv_type: KVType, case: str, tiny: TinyModel) -> None:
    plan = moved_plans()[case]
    with bench(tiny(arch), kv_type) as b:
        assert distance(b.logits(plan), b.expected(plan)) < tolerance(arch, kv_type)


@archs
@kv_types
def test_one_position_off_would_show(arch: str, kv_type: KVType, tiny: TinyModel) -> None:
    tokens = some_tokens(50)
    anchor = slice_of(tokens[:20])
    far = slice_of(tokens[20:40], [anchor], start=30)
    right, off = (plan_of(anchor, (far, start), tokens[40:]) for start in (25, 26))
    with bench(tiny(arch), kv_type) as b:
        assert distance(b.logits(off), b.expected(right)) > 2 * tolerance(arch, kv_type)


@archs
def test_siblings_side_by_side_are_those_evaluated_one_by_one(arch: str, tiny: TinyModel) -> None:
    """More of them than a context has sequences, some moved, in one encoding."""
    text = some_tokens(2000)
    anchor = slice_of(text[:20])
    siblings = [
        slice_of(text[20 + 10 * i : 30 + 10 * i + i % 7], [anchor], start=20 + 5 * (i % 4)) for i in range(FREE + 5)
    ]
    with bench(tiny(arch)) as b:
        b.kv_cache.encode([anchor, *siblings])
        for i in (0, 1, 6, FREE - 1, FREE, len(siblings) - 1):
            plan = plan_of(anchor, siblings[i], text[-9:])
            assert distance(b.logits(plan), b.expected(plan)) < tolerance(arch, "f32")


@archs
def test_a_slice_does_not_depend_on_what_was_evaluated_with_it(arch: str, tiny: TinyModel) -> None:
    """Parts of one module, moved: encoded at once, one by one, and after a context from the store."""
    text = some_tokens(90)
    anchor = slice_of(text[:20])
    first = slice_of(text[20:40], [anchor], start=60)
    second = slice_of(text[40:55], [anchor, first])
    third = slice_of(text[55:75], [anchor, first, second])
    plan = plan_of(anchor, first, second, third, text[75:])
    with bench(tiny(arch)) as b:
        at_once = b.logits(plan)
    with bench(tiny(arch)) as b:
        for each in (anchor, first, second, third):
            b.kv_cache.encode([each])
        assert distance(b.logits(plan), at_once) < tolerance(arch, "f32")


# ---- several runs of new text ---------------------------------------------------------------------------------------
@archs
@kv_types
def test_moved_slices_after_several_fresh_spans(arch: str, kv_type: KVType, tiny: TinyModel) -> None:
    text = some_tokens(200)
    anchor = slice_of(text[:20])
    modules = [slice_of(text[20 + 15 * i : 35 + 15 * i], [anchor], start=20 + 15 * i) for i in range(6)]
    pieces: list[Slice | Tokens] = [anchor]
    for i, module in enumerate(modules):
        pieces += [text[110 + 4 * i : 114 + 4 * i], module]
    plan = scheduled([*pieces, text[180:]])
    assert [span.delta for span in plan.spans if span.slice] == [0, 4, 8, 12, 16, 20, 24]
    with bench(tiny(arch), kv_type) as b:
        assert distance(b.logits(plan), b.expected(plan)) < tolerance(arch, kv_type)


@archs
def test_more_runs_of_new_text_than_free_sequences(arch: str, tiny: TinyModel) -> None:
    text = some_tokens(500)
    modules = [slice_of(text[6 * i : 6 * i + 6], start=6 * i) for i in range(2 * FREE + 5)]
    pieces: list[Slice | Tokens] = []
    for i, module in enumerate(modules):
        pieces += [module, text[400 + i : 401 + i]]
    plan = scheduled([*pieces, text[-5:]])
    with bench(tiny(arch)) as b:
        assert distance(b.logits(plan), b.expected(plan)) < tolerance(arch, "f32")


@archs
def test_a_plan_that_ends_in_a_slice_has_logits_too(arch: str, tiny: TinyModel) -> None:
    tokens = some_tokens(40)
    first, last = chain([tokens[:25], tokens[25:]])
    moved = slice_of(tokens[25:], [first], start=30)
    single = chain([tokens[:39], tokens[39:]])
    with bench(tiny(arch)) as b:
        for pieces in ([first, last], [first, last], single):
            assert distance(b.logits(scheduled(pieces)), b.full(tokens)) < tolerance(arch, "f32")
        assert distance(b.logits(scheduled([first, moved], packed=True)), b.full(tokens)) < tolerance(arch, "f32")


# ---- what the next plan shares --------------------------------------------------------------------------------------
def random_plan(rng: np.random.Generator, pool: list[Slice], before: Plan | None) -> Plan:
    """Some of ``pool``, fresh tokens between and after them; often beginning like the plan before it."""
    pieces: list[Slice | Tokens] = []
    if before is not None and rng.random() < 0.7:
        for span in before.spans[: rng.integers(len(before.spans) + 1)]:
            pieces.append(span.slice or span.tokens[: rng.integers(1, len(span.tokens) + 1)])
    used = {piece for piece in pieces if isinstance(piece, Slice)}
    for each in pool:
        if each not in used and rng.random() < 0.3:
            pieces.append(each)
        if rng.random() < 0.2:
            pieces.append(some_tokens(int(rng.integers(1, 9)), seed=int(rng.integers(3))))
    pieces.append(some_tokens(int(rng.integers(1, 12)), seed=int(rng.integers(3))))
    return scheduled(pieces, packed=bool(rng.random() < 0.3))


@archs
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_plans_gives_what_each_gives_by_itself(arch: str, seed: int, tiny: TinyModel) -> None:
    text = some_tokens(300)
    trunk = chain(cut(text[:100], 40, 45))
    pool = [*trunk, *(slice_of(text[100 + 30 * i : 130 + 30 * i], trunk[: i % 3], start=60 + 10 * i) for i in range(6))]
    rng = np.random.default_rng(seed)
    with bench(tiny(arch)) as b:
        separate = Desk(b.truth, b.kv_cache.store, SLICES)
        plan: Plan | None = None
        for _ in range(30):
            if plan is None or rng.random() < 0.85:
                plan = random_plan(rng, pool, plan)
            spent = b.prefill(plan)
            separate.prefill(partial(Plan, plan.spans), fresh=True)
            assert spent.cached_tokens + spent.fresh_tokens == plan.n_tokens
            assert distance(b.kv_cache.context.logits(), b.truth.logits()) < tolerance(arch, "f32")
            if rng.random() < 0.5:  # an answer, which the next plan may go on from
                answer = some_tokens(int(rng.integers(1, 6)), seed=int(rng.integers(3)))
                for kv_cache in (b.kv_cache, separate):
                    for token in answer:
                        kv_cache.append(np.array([token], np.int32))
                assert distance(b.kv_cache.context.logits(), b.truth.logits()) < tolerance(arch, "f32")
                if rng.random() < 0.5:
                    last = plan.spans[-1]
                    longer = np.concatenate([last.tokens, answer, some_tokens(4, seed=9)])
                    plan = Plan((*plan.spans[:-1], Span(last.start, longer)))


def test_what_is_shared_is_not_evaluated_again(tiny: TinyModel) -> None:
    tokens = some_tokens(100)
    one, two = chain(cut(tokens[:50], 30))
    question, answer = tokens[50:60], tokens[60:63]
    with bench(tiny("llama")) as b:
        kv_cache = b.kv_cache
        assert b.prefill(plan_of(one, two, question)).fresh_tokens == 60
        assert b.prefill(plan_of(one, two, question)).fresh_tokens == 1
        kv_cache.append(answer)
        again = plan_of(one, two, np.concatenate([question, answer, tokens[63:70]]))
        assert b.prefill(again).fresh_tokens == 7
        assert distance(kv_cache.context.logits(), b.full(tokens[:70])) < TOLERANCE["f32"]
        assert b.prefill(again, fresh=True).fresh_tokens == 20
        # What is in the context already needs no store.
        kv_cache.store.ram.clear()
        assert b.prefill(plan_of(one, question)).fresh_tokens == 10
        kv_cache.reset()
        assert b.prefill(plan_of(one, question)).encoded_tokens == 30
        # The slice is what its tokens are, evaluated there.
        assert b.prefill(Plan((Span(0, tokens),))).fresh_tokens == 70
        assert distance(kv_cache.context.logits(), b.full(tokens)) < TOLERANCE["f32"]

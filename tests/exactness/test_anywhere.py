"""Text without markup, reused anywhere: what is known is taken wherever it stands now, what changed is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpucache.engine import Engine
from cpucache.errors import InputError
from cpucache.layout import Text
from cpucache.layout.cuts import Cuts
from cpucache.layout.vocabulary import Tokens
from cpucache.reuse import Fidelity, Plan, Repair, Reuse, Slices, Span, plan_text
from cpucache.reuse.text import SHORTEST
from cpucache.store import Store
from tests.support.oracle import Oracle
from tests.support.reference import ReferenceLlama
from tests.support.sessions import engine, logits, message, truth
from tests.support.tiny import ARCHS
from tests.support.tries import tries
from tests.support.workbench import PLENTY, Desk, distance, opened, tolerance

Tiny = Callable[..., Path]

PARAGRAPHS = [message(number, 20) + "\n\n" for number in range(8)]
"""Each longer than what is worth taking from elsewhere."""
QUESTION = "And which of these was it?"
SEGMENTS = (16, 64)


class Asking:
    """Texts planned and answered by one KV cache, and judged."""

    def __init__(self, path: Path, desk: Desk) -> None:
        self.desk = desk
        self.oracle = Oracle(ReferenceLlama.of(path), desk)
        self.model = desk.context.model
        self._repair = Repair(self.model.text)

    def tokens(self, text: str) -> Tokens:
        return self.model.tokenize(text)

    def ask(self, text: Text, reuse: Reuse, recompute: float = 0.0) -> Plan:
        """Get a text into the context; its logits are those that the contexts of its slices give."""
        plan: Plan
        plan, spent = self.desk.prefill(lambda: plan_text(self.desk, self._repair, text, Fidelity(recompute), reuse))
        assert plan.tokens.tolist() == text.tokens.tolist()
        assert spent.cached_tokens + spent.fresh_tokens == plan.n_tokens
        wanted = self.oracle.logits(plan)
        assert distance(self.desk.context.logits(), wanted.astype(np.float32)) < tolerance("llama", "f32")
        if plan.exact:
            assert np.allclose(self.oracle.full(plan), wanted)
        return plan


@contextmanager
def asking(path: Path) -> Iterator[Asking]:
    with opened(path, n_ctx=2048) as context, Store(None, ram_budget=PLENTY) as store:
        slices = Slices("model", "format", Cuts(context.model, *SEGMENTS))
        yield Asking(path, Desk(context, store, slices))


# ---- what is taken ---------------------------------------------------------------------------------------------------
orders = st.lists(st.integers(0, len(PARAGRAPHS) - 1), min_size=1, max_size=5)
prompts = st.tuples(
    orders, st.sampled_from(["exact", "schema", "anywhere"]), st.sampled_from([0.0, 0.2, 1.0]), st.booleans()
)


def keys(span: Span) -> set[str]:
    """The key of the slice of a span, if it stands where it was evaluated."""
    return {span.slice.key} if span.slice is not None and span.start == span.slice.start else set()


@example(
    [([0] * 5, "exact", 0.0, False), ([2, 4, 0, 0, 0], "schema", 0.0, True), ([2, 4, 0, 0, 0], "schema", 0.0, True)]
)
@tries(40)
@given(st.lists(prompts, min_size=1, max_size=6))
def test_spliced_logits_are_those_of_the_contexts(
    tiny: Tiny, asked: list[tuple[list[int], Reuse, float, bool]]
) -> None:
    """Texts in any order share a store: exact plans hold exact slices, and foreign slices are taken on request only."""
    evaluated: set[str] = set()
    with asking(tiny("llama")) as desk:
        for order, reuse, recompute, marked in asked:
            runs = [desk.tokens(PARAGRAPHS[number]) for number in order]
            edges = np.cumsum([0, *map(len, runs)]).tolist()
            parts = tuple(zip(edges[:-1:2], edges[1::2], strict=False)) if marked else ()
            text = Text(np.concatenate([*runs, desk.tokens(QUESTION)]), parts)
            plan = desk.ask(text, reuse, recompute)
            elsewhere = [span for span in plan.spans if span.relation != "exact" and not span.missing]
            assert plan.exact or reuse != "exact"
            if reuse == "schema":
                # Between parts, slices that were evaluated after these same spans are taken again.
                assert all(text.within(span.start, span.end) or keys(span) <= evaluated for span in elsewhere)
            assert not elsewhere or recompute < 1
            evaluated |= {key for span in plan.spans if span.missing for key in keys(span)}


def test_paragraphs_in_another_order_are_not_evaluated(tiny: Tiny) -> None:
    with asking(tiny("llama")) as desk:
        runs = [desk.tokens(paragraph) for paragraph in PARAGRAPHS]
        first = Text(np.concatenate([*runs, desk.tokens(QUESTION)]))
        assert desk.ask(first, "anywhere").exact
        other = Text(np.concatenate([*runs[3:], *runs[:3], desk.tokens(QUESTION)]))
        assert desk.desk.context.n_ctx > 2 * len(other.tokens)
        plan = desk.ask(other, "anywhere")
        evaluated = sum(len(span.tokens) for span in plan.spans if span.slice is None or span.missing)
        # The question, and what stands across the edges of short paragraphs.
        assert evaluated < len(other.tokens) / 4
        assert plan.count("foreign") + plan.count("clean") + evaluated == plan.n_tokens
        # Asked again, what was evaluated is known as well.
        again = desk.ask(other, "anywhere")
        assert sum(len(span.tokens) for span in again.spans if span.slice is None or span.missing) <= len(
            again.spans[-1].tokens
        )
        assert desk.ask(other, "schema").exact


@pytest.mark.parametrize("recompute", [0.0, 0.2])
def test_a_question_is_evaluated_after_its_own_text(recompute: float, tiny: Tiny, tmp_path: Path) -> None:
    """A question's slice from another context attended to another text; what the question asks for is recomputed."""

    def asked(*order: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "".join(PARAGRAPHS[number] for number in order) + f"{QUESTION}\n\n"}]

    fidelity = Fidelity(recompute)
    with engine(tiny("llama"), tmp_path, n_ctx=4096, segment_tokens=SEGMENTS, reuse="anywhere") as running:
        for order in ((0, 1, 2, 3, 4), (3, 0, 4, 2, 1), (2, 4, 1, 3, 0)):
            plan = running.plan(asked(*order), fidelity=fidelity)
            # The end of a message is by itself after a blank line.
            *_, question, end, answer = plan.spans
            assert QUESTION in running.model.text(question.tokens)
            assert question.missing
            assert len(end.tokens) == 2
            assert answer.slice is None
            if order[0]:
                assert plan.count("foreign") + plan.count("clean") > plan.n_tokens / 2
            running.generate(asked(*order), fidelity=fidelity, max_tokens=2)
            # Asked again, the question has a slice whose context is this text.
            assert not running.plan(asked(*order), fidelity=fidelity).spans[-3].missing


def test_the_words_of_a_question_that_is_known_choose_what_is_recomputed(tiny: Tiny, tmp_path: Path) -> None:
    question = "What about " + " ".join(PARAGRAPHS[2].split()[:8]) + "?"
    texts = [PARAGRAPHS[number] for number in range(5)]
    with engine(tiny("llama"), tmp_path, n_ctx=4096, segment_tokens=SEGMENTS, reuse="anywhere") as running:
        for order in ((0, 1, 2, 3, 4), (3, 0, 4, 2, 1), (4, 2, 1, 3, 0)):
            asked = [{"role": "user", "content": "".join(texts[number] for number in order) + question}]
            if order[0]:
                plan = running.plan(asked, fidelity=Fidelity(0.2))
                again = [running.model.text(span.tokens) for span in plan.spans if span.why == "recomputed"]
                assert any(PARAGRAPHS[2][:20] in each or PARAGRAPHS[2][-20:] in each for each in again)
            running.generate(asked, max_tokens=2)


def test_short_runs_are_evaluated(tiny: Tiny) -> None:
    with asking(tiny("llama")) as desk:
        known = desk.tokens(PARAGRAPHS[0] * 2)[: SHORTEST - 1]
        long = desk.tokens(PARAGRAPHS[1] * 2)[:SHORTEST]
        new, ask = desk.tokens(PARAGRAPHS[2]), desk.tokens(QUESTION)
        for run, taken in ((known, 0), (long, len(long))):
            desk.ask(Text(np.concatenate([ask, run, ask]), ((len(ask), len(ask) + len(run)),)), "schema")
            at = len(new)
            plan = desk.ask(Text(np.concatenate([new, run, ask]), ((at, at + len(run)),)), "schema")
            assert plan.count("foreign") == taken


# ---- edits -----------------------------------------------------------------------------------------------------------
def asked_about(running: Engine, paragraphs: list[str], **settings: object) -> Plan:
    stream = running.stream(text="".join(paragraphs) + QUESTION, max_tokens=1, **settings)  # type: ignore[arg-type]
    stream.reply()
    metrics = stream.metrics
    spliced = metrics.clean_tokens + metrics.foreign_tokens + metrics.related_tokens
    assert metrics.exact_tokens + spliced + metrics.fresh_tokens == metrics.prompt_tokens
    assert spliced == sum(
        len(span.tokens) for span in stream.plan.spans if span.slice and span.relation != "exact" and not span.missing
    )
    return stream.plan


@pytest.mark.parametrize("number", [0, 3, 7])
def test_a_changed_paragraph_is_evaluated_and_a_share_of_what_follows(number: int, tiny: Tiny, tmp_path: Path) -> None:
    edited = [*PARAGRAPHS[:number], message(99, 20) + "\n\n", *PARAGRAPHS[number + 1 :]]
    with engine(tiny("llama"), tmp_path, n_ctx=2048, segment_tokens=SEGMENTS) as running:
        assert asked_about(running, PARAGRAPHS, reuse="anywhere").exact
    with engine(tiny("llama"), tmp_path, n_ctx=2048, segment_tokens=SEGMENTS, reuse="anywhere") as running:
        sizes = [len(running.model.tokenize(paragraph)) for paragraph in edited]
        plan = asked_about(running, edited, fidelity=Fidelity(0.0))
        evaluated = sum(len(span.tokens) for span in plan.spans if span.missing)
        assert sizes[number] <= evaluated <= sizes[number] + 4 * SEGMENTS[0]
        assert sum(sizes[:number]) - 2 * SEGMENTS[0] <= plan.count("exact") <= sum(sizes[:number]) + 1
        assert plan.n_recomputed == 0
        taken = plan.count("foreign") + plan.count("clean")
        # The first segment may take twice its share.
        assert bool(running.plan(text="".join(edited) + QUESTION, fidelity="balanced").n_recomputed) == (taken > 0)
        assert running.plan(text="".join(edited) + QUESTION, fidelity=Fidelity(0.5)).n_recomputed <= taken / 2 + 2
        assert running.plan(text="".join(edited) + QUESTION, fidelity="high").exact
        assert asked_about(running, edited, reuse="exact").exact


@pytest.mark.parametrize("arch", ARCHS)
def test_without_being_asked_nothing_is_taken_from_elsewhere(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    other = [*PARAGRAPHS[4:], *PARAGRAPHS[:4]]
    with engine(tiny(arch), tmp_path, n_ctx=2048) as running, truth(tiny(arch), n_ctx=2048) as true:
        asked_about(running, PARAGRAPHS)
        plan = asked_about(running, other)
        assert plan.exact
        row = true.rows(plan.tokens, 1)[0]
        assert distance(logits(running, plan), row) < tolerance(arch, "f32")


@pytest.mark.parametrize("arch", ["mamba", "gemma3"])
def test_models_whose_states_can_t_be_moved_stay_exact(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    other = [*PARAGRAPHS[4:], *PARAGRAPHS[:4]]
    with engine(tiny(arch), tmp_path, n_ctx=2048) as running:
        asked_about(running, PARAGRAPHS, reuse="anywhere")
        assert asked_about(running, other, reuse="anywhere").exact == (not running.context.memory.moves)


# ---- refined ---------------------------------------------------------------------------------------------------------
def test_text_is_exact_after_refining(tiny: Tiny, tmp_path: Path) -> None:
    other = [*PARAGRAPHS[4:], *PARAGRAPHS[:4]]
    with (
        engine(tiny("llama"), tmp_path, n_ctx=2048, reuse="anywhere") as running,
        truth(tiny("llama"), n_ctx=2048) as true,
    ):
        asked_about(running, PARAGRAPHS)
        plan = asked_about(running, other)
        assert not plan.exact
        assert running.refine().tokens > 0
        refined = asked_about(running, other)
        assert (refined.exact, refined.n_recomputed) == (True, 0)
        assert refined.count("exact") == refined.n_tokens - len(refined.spans[-1].tokens)
        assert distance(logits(running, refined), true.rows(plan.tokens, 1)[0]) < tolerance("llama", "f32")


def test_a_conversation_goes_on_from_what_was_spliced(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, n_ctx=2048, reuse="anywhere") as running:
        asked_about(running, PARAGRAPHS[:4])
        asked_about(running, [PARAGRAPHS[5], *PARAGRAPHS[:4]], fidelity=Fidelity(0.0))
        before = running.plan(text="".join([PARAGRAPHS[5], *PARAGRAPHS[:4]]) + QUESTION, fidelity=Fidelity(0.0))
        longer = running.plan(
            text="".join([PARAGRAPHS[5], *PARAGRAPHS[:4]]) + QUESTION + message(7, 3), fidelity=Fidelity(0.0)
        )
        assert longer.n_cached >= before.n_tokens - 2 * 64


def test_how_near_it_is_can_be_measured(tiny: Tiny, tmp_path: Path) -> None:
    other = "".join([*PARAGRAPHS[4:], *PARAGRAPHS[:4]])
    with engine(tiny("llama"), tmp_path, n_ctx=2048) as running:
        asked_about(running, PARAGRAPHS)
        exact = running.fidelity(text=other, max_tokens=4)
        assert (exact.now.distance.kl_mean < 1e-6, exact.trials) == (True, [])
    with engine(tiny("llama"), tmp_path / "other", n_ctx=2048) as running:
        asked_about(running, PARAGRAPHS)
        report = running.fidelity(text=other, max_tokens=4, reuse="anywhere", fidelity=Fidelity(0.0))
        assert report.now.distance.kl_mean > 1e-6
        assert min(trial.distance.kl_mean for trial in report.trials) < 1e-6
        # Nothing that was only tried stays.
        assert not running.plan(text=other, reuse="anywhere").exact


def test_what_reuse_is_not(tiny: Tiny, tmp_path: Path) -> None:
    with (
        engine(tiny("llama"), tmp_path) as running,
        pytest.raises(InputError, match="reuse='everywhere': must be one of exact"),
    ):
        running.plan(text="a", reuse="everywhere")  # type: ignore[arg-type]

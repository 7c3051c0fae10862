"""The layer over llama.cpp: evaluating, cells and states, sampling, and stopping half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.errors import ContextFull, InputError
from cpucache.runtime import Batch, Context, Model, Run, Sampler, Sampling, Stopped
from cpucache.runtime.model import Tokens
from tests.support.tiny import BYTES

TinyModel = Callable[..., Path]
# The same sums in another order.
CLOSE = 1e-3


def some_tokens(count: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(BYTES, BYTES + 256, count, np.int32)


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Iterator[Model]:
    with Model(tiny("llama", n_layer=2)) as opened:
        yield opened


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    opened = Context(model, n_ctx=512, n_threads=1, kv_type="f32")
    yield opened
    opened.close()


# ---- evaluating ------------------------------------------------------------------------------------------------------


def every_logit(context: Context, *runs: Run) -> np.ndarray:
    logits = context.decode(runs, logits="all")
    assert logits is not None
    return logits


def test_runs_together_are_runs_one_by_one(context: Context) -> None:
    runs = [Run(0, 0, some_tokens(20)), Run(3, 5, some_tokens(33, seed=1)), Run(31, 0, some_tokens(1, seed=2))]
    together = every_logit(context, *runs)
    assert together.shape == (54, context.model.n_vocab)
    assert [context.last_position(run.sequence) for run in runs] == [19, 37, 0]
    context.clear()
    assert context.last_position(0) == -1
    separate = np.concatenate([every_logit(context, run) for run in runs])
    assert np.abs(together - separate).max() < CLOSE


def test_a_run_goes_on_where_the_sequence_ends(context: Context) -> None:
    tokens = some_tokens(50)
    whole = every_logit(context, Run(0, 0, tokens))
    for start, end in ((0, 20), (20, 49), (49, 50)):
        context.decode([Run(1, start, tokens[start:end])], logits="last")
        assert np.abs(context.logits() - whole[end - 1]).max() < CLOSE
    assert np.abs(whole[1:] - whole[:-1]).max() > 100 * CLOSE


def test_a_run_has_tokens() -> None:
    """A run without tokens can't be created, nor results from a split: no batch would complete such a run."""
    with pytest.raises(ValueError, match="at least one token"):
        Run(0, 0, some_tokens(0))
    run = Run(2, 7, some_tokens(5))
    head, (tail,) = run.split(3)
    assert [(part.sequence, part.start, len(part.tokens)) for part in (head, tail)] == [(2, 7, 3), (2, 10, 2)]
    for count in (5, 6):
        whole, rest = run.split(count)
        assert (whole.start, len(whole.tokens), rest) == (7, 5, [])


def test_progress_tells_every_batch(model: Model) -> None:
    context = Context(model, n_ctx=1300, n_threads=1)
    try:
        told: list[int] = []
        context.decode([Run(0, 0, some_tokens(700)), Run(1, 0, some_tokens(500))], progress=told.append)
        assert (len(told), sum(told)) == (3, 1200)
        assert (context.last_position(0), context.last_position(1)) == (699, 499)
    finally:
        context.close()


def test_a_full_context_says_how_to_get_a_larger_one(context: Context) -> None:
    tokens = some_tokens(context.n_ctx + 1)
    with pytest.raises(ContextFull, match=rf"the context of {context.n_ctx} tokens is full; raise it with --ctx"):
        context.decode([Run(0, 0, tokens)])
    context.clear()
    context.decode([Run(0, 0, tokens[:-1])])
    with pytest.raises(ContextFull):
        context.decode([Run(1, 0, tokens[:1])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"n_ctx": 64, "flash": "yes"}, "flash='yes': must be one of auto, on, off"),
        ({"n_ctx": 64, "kv_type": "q3"}, "kv_type='q3': must be one of "),
    ],
)
def test_settings_of_a_context_are_checked(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Context(model, **options)


def test_heads_that_can_t_have_quantized_keys_are_refused(tiny: TinyModel) -> None:
    with Model(tiny("llama", head_dim=32)) as model, pytest.raises(InputError, match="size 32 can't have q8_0 keys"):
        Context(model, n_ctx=64, kv_type="q8_0")


# ---- cells and state -------------------------------------------------------------------------------------------------


def test_a_saved_state_goes_on_as_the_sequence_would(context: Context, model: Model) -> None:
    first, second = some_tokens(40), some_tokens(5, seed=1)
    context.decode([Run(0, 7, first)])
    state = context.save(0)
    expected = every_logit(context, Run(0, 47, second))
    other = Context(model, n_ctx=128, n_threads=1, kv_type="f32")
    try:
        other.decode([Run(9, 0, some_tokens(30, seed=2))])
        assert other.load(4, state)
        assert other.last_position(4) == 46
        assert np.abs(every_logit(other, Run(4, 47, second)) - expected).max() < CLOSE
        # Loading replaces what is there.
        assert other.load(4, state)
        assert np.abs(every_logit(other, Run(4, 47, second)) - expected).max() < CLOSE
    finally:
        other.close()


def test_states_that_are_not_whole_are_refused(context: Context) -> None:
    context.decode([Run(0, 0, some_tokens(20))])
    state = context.save(0)
    assert not context.load(1, state[:-1])
    assert not context.load(1, state[:10])
    assert not context.load(1, np.zeros(len(state), np.uint8))
    assert context.load(1, state)


def test_a_state_without_room_for_it_fills_the_context(context: Context) -> None:
    context.decode([Run(0, 0, some_tokens(300))])
    state = context.save(0)
    with pytest.raises(ContextFull):
        context.load(1, state)
    context.clear()
    assert context.load(1, state)


def test_cells_can_be_removed_shared_and_moved(context: Context) -> None:
    first, second = some_tokens(30), some_tokens(5, seed=1)
    context.decode([Run(0, 0, first)])
    assert context.remove(0, 20)
    assert context.last_position(0) == 19
    context.share(0, 1)
    assert context.remove(0)
    assert (context.last_position(0), context.last_position(1)) == (-1, 19)
    context.shift(1, 100)
    assert context.last_position(1) == 119
    moved = every_logit(context, Run(1, 120, second))
    context.clear()
    whole = every_logit(context, Run(0, 0, np.concatenate([first[:20], second])))[20:]
    assert np.abs(moved - whole).max() < CLOSE  # the distances are the same


def test_what_can_be_spliced_is_known(tiny: TinyModel) -> None:
    for arch, can in (("llama", True), ("mpt", True), ("mamba", False)):
        with Model(tiny(arch)) as model:
            context = Context(model, n_ctx=64, n_threads=1)
            assert context.memory.moves == can
            context.close()


def test_formats_of_states_that_differ_have_names_that_differ(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    every: list[dict[str, Any]] = [{}, {"kv_type": "f32"}, {"kv_type": "q8_0"}, {"flash": "on"}]
    for options in every:
        context = Context(model, n_ctx=64, n_threads=1, **options)
        names.add(context.state_format)
        context.close()
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    context = Context(model, n_ctx=64, n_threads=1)
    names.add(context.state_format)
    context.close()
    assert len(names) == 5


# ---- sampling --------------------------------------------------------------------------------------------------------


def drawn(context: Context, count: int, prompt: Tokens | None = None, **sampling: Any) -> list[int]:
    """So many draws from the logits of the last token."""
    sampler = Sampler(Sampling(**sampling), context.model)
    try:
        if prompt is not None:
            sampler.accept(prompt)
        return [context.sample(sampler) for _ in range(count)]
    finally:
        sampler.close()


@pytest.fixture
def answering(context: Context) -> Context:
    context.decode([Run(0, 0, some_tokens(30))], logits="last")
    return context


def test_without_temperature_the_likeliest_token_comes(answering: Context) -> None:
    best = int(answering.logits().argmax())
    assert drawn(answering, 5) == [best] * 5
    assert drawn(answering, 5, temperature=1.0, top_k=1) == [best] * 5
    assert drawn(answering, 5, temperature=1e-4) == [best] * 5


def test_a_seed_decides_the_draws(answering: Context) -> None:
    one = drawn(answering, 50, temperature=1.0, seed=1)
    assert drawn(answering, 50, temperature=1.0, seed=1) == one
    assert drawn(answering, 50, temperature=1.0, seed=2) != one
    assert drawn(answering, 50, temperature=1.0) != drawn(answering, 50, temperature=1.0)


def test_filters_keep_the_likeliest(answering: Context) -> None:
    logits = answering.logits().astype(np.float64)
    order = np.argsort(-logits)
    chances = np.exp(logits - logits.max())
    off: dict[str, Any] = {"temperature": 5.0, "seed": 3, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert len(set(drawn(answering, 300, **off))) > 100
    assert set(drawn(answering, 300, **{**off, "top_k": 4})) == set(order[:4].tolist())
    likely = set(np.flatnonzero(chances >= 0.2).tolist())
    assert 1 < len(likely) < 40
    assert set(drawn(answering, 600, **{**off, "min_p": 0.2})) == likely
    nucleus = np.searchsorted(np.cumsum(chances[order]) / chances.sum(), 0.3) + 1
    assert set(drawn(answering, 600, **{**off, "top_p": 0.3})) == set(order[:nucleus].tolist())


def test_repetition_is_penalised_over_the_last_64_tokens(answering: Context) -> None:
    logits = answering.logits()
    best = int(logits.argmax())
    assert logits[best] > 0
    recent = np.array([best], np.int32)
    # A token that has come is divided by the penalty.
    lowered = logits.copy()
    lowered[best] /= 3
    second = int(lowered.argmax())
    assert second != best
    assert drawn(answering, 1, recent, repeat_penalty=3.0) == [second]
    assert drawn(answering, 1, recent) == [best]
    others = np.setdiff1d(some_tokens(500), [best, second]).astype(np.int32)[:64]
    assert len(others) == 64
    assert drawn(answering, 1, np.concatenate([recent, others[1:]]), repeat_penalty=3.0) == [second]
    assert drawn(answering, 1, np.concatenate([recent, others]), repeat_penalty=3.0) == [best]
    # What has been drawn counts, too.
    assert drawn(answering, 2, repeat_penalty=3.0) == [best, second]


# ---- stopping --------------------------------------------------------------------------------------------------------


@pytest.fixture
def long(model: Model) -> Iterator[Context]:
    opened = Context(model, n_ctx=1024, n_threads=1)
    yield opened
    opened.close()


def test_a_long_evaluation_is_stopped_half_way(long: Context) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 5

    batch = Batch()
    batch.add(Run(0, 0, some_tokens(512)))
    with pytest.raises(Stopped):
        long.evaluate(batch, stop)
    assert len(asked) == 6
    assert long.last_position(0) == -1
    # And the context goes on working: what was stopped can be evaluated again.
    long.evaluate(batch, lambda: False)
    assert long.last_position(0) == 511


def test_a_batch_keeps_the_logits_that_are_asked_for(context: Context) -> None:
    """The logits of sequences side by side are those of each sequence evaluated by itself."""
    runs = [Run(sequence, 0, some_tokens(20, sequence)) for sequence in range(3)]
    separate = []
    for run in runs:
        context.clear()
        context.decode([run], logits="last")
        separate.append(context.logits())
    context.clear()
    batch = Batch()
    batch.add(runs[0], "last")
    batch.add(runs[1], "none")
    batch.add(runs[2], "all")
    context.evaluate(batch)
    assert np.abs(context.logits(19) - separate[0]).max() < CLOSE
    assert np.abs(context.logits(59) - separate[2]).max() < CLOSE
    assert np.abs(context.logits(40) - separate[2]).max() > 0.1
    batch = Batch()
    batch.add(Run(1, 20, some_tokens(1, 9)), "last")
    context.evaluate(batch)
    together = context.logits(0)
    context.clear()
    context.decode([Run(1, 0, np.concatenate([runs[1].tokens, some_tokens(1, 9)]))], logits="last")
    assert np.abs(together - context.logits()).max() < CLOSE


def test_a_grammar_that_nothing_goes_on_with_is_an_error(context: Context) -> None:
    """llama.cpp would end the process."""
    context.decode([Run(0, 0, some_tokens(20))], logits="last")
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature=temperature, grammar='root ::= "a"', seed=1), context.model)
        assert context.model.piece(context.sample(sampler)) == b"a"
        # What follows is no answer to this grammar but its end.
        assert context.model.ends_generation(context.sample(sampler))
        with pytest.raises(InputError, match="no token of the model continues"):
            sampler.choose(np.full(context.model.n_vocab, -np.inf, np.float32))
        sampler.close()

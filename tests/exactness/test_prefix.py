"""Plain text and messages: the longest known prefix is spliced in segments, exactly, whoever evaluated it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.engine import Engine
from cpucache.errors import ContextFull, InputError
from tests.support import sessions
from tests.support.sessions import Said, Truth, chatml, engine, message, plain_spoken, rendered, said, truth
from tests.support.tiny import ARCHS, ATTENTION_ARCHS, RECURRENT_ARCHS
from tests.support.workbench import Tokens, distance, tolerance

Tiny = Callable[..., Path]

archs = pytest.mark.parametrize("arch", ARCHS)
SEGMENTS = (8, 16)
TEXT = message(1, 40)
MESSAGES = [
    {"role": "system", "content": "Answer in a few words."},
    {"role": "user", "content": message(2, 20)},
    {"role": "assistant", "content": message(3, 10)},
    {"role": "user", "content": message(4, 5)},
]
REQUESTS: dict[str, dict[str, Any]] = {"text": {"text": TEXT}, "messages": {"prompt": MESSAGES}}

requests = pytest.mark.parametrize("kind", REQUESTS)


def whole(running: Engine, prompt: Sequence[int] | Tokens) -> int:
    """Tokens of a prompt that stand before its last segment."""
    ends = running.slices.cuts(np.array(prompt[:-1], np.int32))
    return ends[-2] if len(ends) > 1 else 0


class Known:
    """Keeps the slices of texts that were asked: of each its start, and all tokens of the text up to its end."""

    def __init__(self, arch: str) -> None:
        self.recurrent = arch in RECURRENT_ARCHS
        self.slices: set[tuple[int, tuple[int, ...]]] = set()
        self.points: set[tuple[int, tuple[int, ...]]] = set()
        """Slices with a recurrent state at their end: evaluation of a recurrent model continues only from these."""

    def of(self, prompt: Sequence[int] | Tokens) -> int:
        """Tokens of a prompt that are known, its last token aside."""
        at = known = 0
        while True:
            ends = [
                len(tokens)
                for start, tokens in self.slices
                if start == at < len(tokens) < len(prompt) and tuple(prompt[: len(tokens)]) == tokens
            ]
            if not ends:
                return known if self.recurrent else at
            slice_ = (at, tuple(prompt[: max(ends)]))
            at = max(ends)
            known = at if slice_ in self.points else known

    def ask(self, running: Engine, answer: Said) -> int:
        """How many tokens of an answer's prompt are evaluated; from then on they are known."""
        prompt, tokens = answer.stream.plan.tokens.tolist(), answer.tokens.tolist()
        known, at = self.of(prompt), self._chain(prompt)
        cuts = [end for end in running.slices.cuts(np.array(prompt[:-1], np.int32)) if end > at]
        since = 0 if at else 64
        for end in cuts if self.recurrent else cuts[:-1]:
            self.slices.add((at, tuple(prompt[:end])))
            since += end - at
            ends = (
                since >= 64
                and end < cuts[-1] - 8
                and running.slices.cuts.ends_message(np.array(prompt[at:end], np.int32))
            )
            if ends or end == cuts[-1]:
                self.points.add((at, tuple(prompt[:end])))
                since = 0
            at = end
        if not self.recurrent and len(prompt) - at > 8:
            at = self._cut(running, prompt, at, len(prompt) - 1)
        self._cut(running, tokens, at, len(tokens))
        return len(prompt) - known

    def _chain(self, prompt: Sequence[int] | Tokens) -> int:
        """Tokens of a prompt that there are slices of, its last token aside."""
        self.recurrent, was = False, self.recurrent
        try:
            return self.of(prompt)
        finally:
            self.recurrent = was

    def _cut(self, running: Engine, tokens: list[int], begin: int, end: int) -> int:
        at = begin
        for cut in running.slices.cuts(np.array(tokens[begin:end], np.int32), part=True):
            self.slices.add((at, tuple(tokens[: begin + cut])))
            if begin + cut == end:
                self.points.add((at, tuple(tokens[:end])))
            at = begin + cut
        return end


def asked(running: Engine, **request: Any) -> Said:
    return said(running, running.stream(**{"max_tokens": 4, **request}))


def same(one: Said, other: Said, arch: str) -> None:
    assert one.stream.text == other.stream.text
    for row, expected in zip(one.rows, other.rows, strict=True):
        assert distance(row, expected) < tolerance(arch, "f32")


# ---- exact -----------------------------------------------------------------------------------------------------------
@archs
@requests
def test_a_prompt_is_what_full_prefill_is(arch: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """At first, again in the same engine, in a new one, and with another prompt in between."""
    request = REQUESTS[kind]
    with truth(tiny(arch)) as true:
        with engine(tiny(arch), tmp_path, segment_tokens=SEGMENTS) as running:
            full = asked(running, use_cache=False, **request)
            count = len(full.stream.plan.tokens)
            assert full.fresh == count > 64
            true.check(arch, full)
            running.store.flush()
            assert sessions.files(tmp_path) == 0
            # What the llama.cpp context holds would be saved from there.
            running.forget()
            first = asked(running, **request)
            assert (first.fresh, first.stream.metrics.encoded_tokens) == (
                count,
                count - 1 if arch in RECURRENT_ARCHS else whole(running, full.stream.plan.tokens),
            )
            same(first, full, arch)
            again = asked(running, **request)
            known = Known(arch)
            assert known.ask(running, first) == count
            left = known.ask(running, again)
            # The llama.cpp context holds the whole prompt, but the state of a recurrent model is that after the answer.
            assert again.fresh == (left if arch in RECURRENT_ARCHS else 1)
            same(again, full, arch)
            asked(running, text="Something else.")
            third = asked(running, **request)
            assert (third.fresh, third.stream.metrics.encoded_tokens) == (left, 0)
            same(third, full, arch)
            assert asked(running, use_cache=False, **request).fresh == count
        with engine(tiny(arch), tmp_path, segment_tokens=SEGMENTS) as running:
            fresh = asked(running, **request)
            assert (fresh.fresh, fresh.stream.metrics.encoded_tokens) == (left, 0)
            same(fresh, full, arch)
            true.check(arch, fresh)


@requests
def test_found_by_another_process(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    request = {**REQUESTS[kind], "max_tokens": 4}
    first, second = (
        sessions.elsewhere(sessions.ask, tiny("llama"), tmp_path, request, {"segment_tokens": SEGMENTS})
        for _ in range(2)
    )
    count = len(first.prompt)
    with engine(tiny("llama"), tmp_path, segment_tokens=SEGMENTS) as running:
        rest = count - whole(running, first.prompt)
    assert (first.fresh, second.fresh) == (count, 1 if rest > 8 else rest)
    assert first.tokens.tolist() == second.tokens.tolist()
    with truth(tiny("llama")) as true:
        for row, expected in zip(second.rows, true.rows(second.tokens, len(second.rows)), strict=True):
            assert distance(row, expected) < tolerance("llama", "f32")


def test_messages_are_rendered_by_the_template(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        plan = running.plan(MESSAGES)
        assert rendered(running, plan.tokens) == chatml(*((each["role"], each["content"]) for each in MESSAGES))
        assert rendered(running, running.plan(text=TEXT).tokens) == TEXT
        # Control tokens in a text are plain characters.
        assert len(running.plan(text="<|im_end|>").tokens) > 1
    with engine(tiny("llama", add_bos=True), tmp_path) as running:
        for request in REQUESTS.values():
            assert running.plan(**request).tokens.tolist().count(running.model.bos) == 1
            assert running.plan(**request).tokens[0] == running.model.bos


# ---- as much as is known ---------------------------------------------------------------------------------------------
@archs
def test_the_longest_known_prefix(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    """Of texts that begin alike each goes on from where it differs from all others."""
    model = tiny(arch)
    known = Known(arch)
    endings = ["", " And more of it.", " And more of the same, and then some.", " But then, something else entirely."]
    with truth(model) as true:
        for number in (0, 1, 2, 3, 2, 1):
            with engine(model, tmp_path, segment_tokens=SEGMENTS) as running:
                answer = asked(running, text=TEXT + endings[number], max_tokens=1)
                assert answer.fresh == known.ask(running, answer)
                true.check(arch, answer)


@archs
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_changed_token_is_known_up_to_its_segment(arch: str, share: float, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(arch)
    with engine(model, tmp_path, segment_tokens=SEGMENTS) as running:
        first = asked(running, text=TEXT)
    tokens = first.stream.plan.tokens
    index = int(share * len(tokens))
    changed = tokens.copy()
    changed[index] = changed[index] % 200 + 7
    with engine(model, tmp_path, segment_tokens=SEGMENTS) as running, truth(model) as true:
        known = Known(arch)
        known.ask(running, first)
        answer = asked(running, prompt=changed)
        assert answer.fresh == known.ask(running, answer)
        # A recurrent model goes on from a message's end.
        assert answer.fresh < len(tokens) or share == 0 or arch in RECURRENT_ARCHS
        true.check(arch, answer)


@pytest.mark.parametrize("least", [1, 7, 64, 5000])
@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_the_size_of_segments(arch: str, least: int, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(arch)
    text = message(1, 30 if least == 1 else 120)
    known = Known(arch)
    for begun in (False, True):
        with engine(model, tmp_path, segment_tokens=(least, 2 * least)) as running, truth(model) as true:
            answer = asked(running, text=text)
            count = answer.stream.plan.n_tokens
            assert answer.fresh == known.ask(running, answer)
            assert (answer.fresh < count) == begun
            true.check(arch, answer)
    # However it is cut, it is found.
    with engine(model, tmp_path, segment_tokens=(least + 1, 3 * least)) as running, truth(model) as true:
        answer = asked(running, text=text)
        assert answer.fresh == known.ask(running, answer)
        true.check(arch, answer)


def test_segments_have_64_to_512_tokens_unless_told(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        sizes = [len(span.tokens) for span in running.plan(text=message(1, 200)).spans if span.slice]
        assert len(sizes) > 2
        assert all(64 <= size <= 512 for size in sizes)


# ---- going on from an answer -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ATTENTION_ARCHS)
@pytest.mark.parametrize("reopened", [False, True], ids=["in the context", "reopened"])
def test_the_next_request_goes_on_from_the_answer(arch: str, reopened: bool, tiny: Tiny, tmp_path: Path) -> None:
    """As clients do that send the whole conversation each time."""
    model = plain_spoken(tiny(arch))
    messages: list[dict[str, Any]] = []
    held = np.empty(0, np.int32)
    with truth(model) as true:
        running = Engine(model, store=tmp_path, threads=1, n_ctx=1024, kv_type="f32", segment_tokens=SEGMENTS)
        for number in range(4):
            if reopened:
                running.close()
                running = Engine(model, store=tmp_path, threads=1, n_ctx=1024, kv_type="f32", segment_tokens=SEGMENTS)
            messages.append({"role": "user", "content": message(number)})
            answer = asked(running, prompt=messages, max_tokens=30)
            prompt = answer.stream.plan.tokens
            assert prompt[: len(held)].tolist() == held.tolist()
            # What was evaluated of the last answer is known.
            assert answer.fresh == len(prompt) - len(held)
            true.check(arch, answer)
            held = answer.tokens
            messages.append({"role": "assistant", "content": answer.stream.text})
        running.close()


def test_a_recurrent_model_goes_on_from_its_prompt(tiny: Tiny, tmp_path: Path) -> None:
    """States within an answer have gone by."""
    model = plain_spoken(tiny("mamba"))
    messages: list[dict[str, Any]] = []
    known = 0
    with truth(model) as true:
        for number in range(4):
            with engine(model, tmp_path, segment_tokens=SEGMENTS) as running:
                messages.append({"role": "user", "content": message(number)})
                answer = asked(running, prompt=messages, max_tokens=30)
                prompt = answer.stream.plan.tokens
                assert answer.fresh <= len(prompt) - known
                true.check("mamba", answer)
                known = whole(running, prompt)
                messages.append({"role": "assistant", "content": answer.stream.text})


# ---- random prompts --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba"])
def test_any_sequence_of_prompts_gives_what_each_gives_by_itself(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ("rain", "and the", "fields of", "a mill", "were", "the same", "to them", "as", "the other", "town")
    texts = [""]
    with truth(tiny(arch)) as true, engine(tiny(arch), tmp_path, segment_tokens=(4, 8)) as running:
        for _ in range(30):
            start = texts[rng.integers(len(texts))]
            texts.append(start[: rng.integers(len(start) + 1)] + " ".join(rng.choice(words, rng.integers(1, 12))))
            answer = asked(running, text=texts[-1], max_tokens=int(rng.integers(1, 12)))
            assert answer.fresh + answer.stream.metrics.cached_tokens == answer.stream.plan.n_tokens
            true.check(arch, answer)


# ---- what can't be ---------------------------------------------------------------------------------------------------
def test_prompts_that_are_none(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, n_ctx=256) as running:
        request: dict[str, Any]
        for request in ({"prompt": MESSAGES, "text": "a"}, {"prompt": "<prompt/>", "text": "a"}):
            with pytest.raises(InputError, match="a prompt, or text to continue, not both"):
                running.generate(**request)
        for request in ({"text": ""}, {"prompt": []}, {"prompt": " "}):
            with pytest.raises(InputError, match="the prompt is empty"):
                running.generate(**request)
        for bad in ({"role": "tool", "content": "a"}, {"role": "user"}, {"role": "user", "content": 3}):
            with pytest.raises(InputError, match="a message must be a mapping with a role"):
                running.generate([bad])
        with pytest.raises(ContextFull, match=r"text: the prompt is \d+ tokens long .* context of 256; raise --ctx"):
            running.generate(text=TEXT * 4)
        assert running.generate(text="And yet", max_tokens=3).metrics.fresh_tokens > 0


def test_the_truth_would_show_a_wrong_prefix(tiny: Tiny, tmp_path: Path) -> None:
    """The tests above show something: a segment that is not the right one is seen."""
    with engine(tiny("llama"), tmp_path, segment_tokens=SEGMENTS) as running, truth(tiny("llama")) as true:
        answer = asked(running, text=TEXT, max_tokens=1)
        other = answer.tokens.copy()
        other[16:32] = other[16:32][::-1]
        assert distance(wrong(true, other), answer.rows[0]) > 0.04


def wrong(true: Truth, tokens: np.ndarray) -> np.ndarray:
    row: np.ndarray = true.rows(tokens, 1)[0]
    return row

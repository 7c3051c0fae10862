"""Saving: slices of a plain text and its answer, and notes for refining, for the benefit of later prompts."""

from __future__ import annotations

import numpy as np

from cpucache.engine.answer import Answer
from cpucache.engine.planner import PREFIX, Question
from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.reuse import KVCache, Span, asked, text_parts

_LEAST = 8  # tokens of a slice that is saved by itself


class Saving:
    """Hooks of an answer, which save slices of its text and note prompts that refining should make exact.

    Args:
        kv_cache: The llama.cpp context of the answer, and the store.
        question: The prompt that is answered.
    """

    def __init__(self, kv_cache: KVCache, question: Question) -> None:
        self._kv_cache = kv_cache
        self._question = question

    def save_prompt(self, answer: Answer) -> None:
        """Saves the fresh tokens of a plain text except the last. Called after the first token of the answer.

        The slices end before the answer, so that a later prompt finds them whatever its answer is.
        """
        if self._question.bound is not None:
            return
        before, rest = self._unsaved(answer)
        if len(rest) > _LEAST:
            answer.capture(self._kv_cache.slices.cut(before, rest[:-1]), PREFIX)
            answer.saved = len(rest) - 1

    def save_answer(self, answer: Answer) -> None:
        """Saves the answer to a plain text, and notes a prompt whose slices were not all exact. Called at the end."""
        slices, bound = self._kv_cache.slices, self._question.bound
        if bound is None:
            before, rest = self._unsaved(answer)
            tokens = joined([rest, np.array(answer.tokens[: answer.evaluated], np.int32)])
            answer.capture(slices.cut(before, tokens), PREFIX)
        if not answer.plan.exact:
            parts = text_parts(answer.plan) if bound is None else asked(bound)
            self._kv_cache.store.note_asked(slices.fingerprint, slices.scope, self._question.label, parts)

    def _unsaved(self, answer: Answer) -> tuple[list[Span], Tokens]:
        """The spans of a plain text that have slices, and the remaining tokens, which have none."""
        *before, fresh = answer.plan.spans
        if answer.saved:
            saved = fresh.tokens[: answer.saved]
            before += [slice_.span for slice_ in self._kv_cache.slices.cut(before, saved)]
        return before, fresh.tokens[answer.saved :]

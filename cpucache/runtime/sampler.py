"""Sampling of the next token, with llama.cpp's chain of samplers."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpucache.errors import InputError
from cpucache.runtime import llama
from cpucache.runtime.llama import api
from cpucache.runtime.model import Model, Tokens

_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # llama_token_data (llama.h)
_GRAMMAR, _RULES, _NESTED = 1 << 16, 1000, 500  # limits of a grammar: characters, rules, nested groups
_RECENT = 64  # tokens that the repetition penalty considers; llama.cpp's default


@dataclass(frozen=True)
class Sampling:
    """Parameters of sampling. ``temperature=0`` takes the most likely token; ``seed=None`` draws a random seed.

    ``top_k=0``, ``top_p=1``, ``min_p=0`` and ``repeat_penalty=1`` switch the respective filter off. ``stop`` strings
    end the answer and are not part of it. Raises ``InputError`` for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    grammar: str = ""
    """A GBNF grammar that the answer follows."""
    logprobs: int | None = None
    """Number of most likely tokens reported with each token's log probability; ``None``: report none."""

    def __post_init__(self) -> None:
        for name, fine, range_ in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p < 1, "from 0 to below 1"),
            ("repeat_penalty", self.repeat_penalty > 0, "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**32, "from 0 to 4294967295"),
            ("stop", all(self.stops), "without empty strings"),
            (
                "stop",
                len(self.stops) <= 64 and all(len(text) <= 1000 for text in self.stops),
                "64 short strings at most",
            ),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
        ):
            if not fine:
                raise InputError(f"{name}={getattr(self, name)!r:.200}: must be {range_}")
        _check_grammar(self.grammar)

    @property
    def stops(self) -> tuple[str, ...]:
        """The ``stop`` strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _check_grammar(grammar: str) -> None:
    """Refuses grammars that may overflow the stack of llama.cpp's recursive parser (ggml-org/llama.cpp issue 26600)."""
    depth = deepest = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if len(grammar) > _GRAMMAR or deepest > _NESTED or grammar.count("::=") > _RULES:
        raise InputError(
            f"grammar: at most {_GRAMMAR:,} characters, {_RULES} rules and {_NESTED} nested groups are allowed"
        )


class Sampler:
    """A chain of llama.cpp samplers: grammar, repetition penalty, filters, temperature."""

    def __init__(self, sampling: Sampling, model: Model) -> None:
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if sampling.grammar:
            grammar = api.llama_sampler_init_grammar(model.vocab, sampling.grammar.encode("utf-8", "replace"), b"root")
            if not grammar:
                self.close()
                raise InputError(f"grammar: llama.cpp can't read it: {llama.last_errors() or 'no reason given'}")
            self._add(grammar)
        self.constrained = bool(sampling.grammar)
        """Whether a grammar constrains the answer, so that no token may fit."""
        self._penalties: api.llama_sampler_p | None = None
        if sampling.repeat_penalty != 1:
            self._penalties = api.llama_sampler_init_penalties(
                model.n_vocab, _RECENT, sampling.repeat_penalty, 0.0, 0.0
            )
            self._add(self._penalties)
        if sampling.temperature == 0:
            self._add(api.llama_sampler_init_greedy())
            return
        if sampling.top_k:
            self._add(api.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            self._add(api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p:
            self._add(api.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(api.llama_sampler_init_temp(sampling.temperature))
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
        self._add(api.llama_sampler_init_dist(seed))

    def accept(self, tokens: Tokens) -> None:
        """Adds tokens of the prompt to those that the repetition penalty considers."""
        if self._penalties is not None:
            for token in tokens[-_RECENT:]:
                api.llama_sampler_accept(self._penalties, int(token))

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """Samples a token from ``logits``, as ``llama_sampler_sample`` does. Raises ``InputError`` if none fits.

        The check is needed because llama.cpp aborts the process if a grammar accepts a token that it does not allow.
        """
        candidates = np.empty(len(logits), _CANDIDATE)
        candidates["id"], candidates["logit"], candidates["p"] = np.arange(len(logits)), logits, 0
        array = api.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(api.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        api.llama_sampler_apply(self._chain, ctypes.byref(array))
        chosen = array.data[array.selected] if 0 <= array.selected < array.size else None
        if chosen is None or not np.isfinite(chosen.logit):
            raise InputError("grammar: no token of the model continues the answer as the grammar requires")
        api.llama_sampler_accept(self._chain, chosen.id)
        return int(chosen.id)

    def _add(self, sampler: api.llama_sampler_p) -> None:
        api.llama_sampler_chain_add(self._chain, sampler)

    @property
    def handle(self) -> Any:
        """llama.cpp's pointer, for ``Context.sample``."""
        return self._chain

    def close(self) -> None:
        """Frees the chain."""
        if self._chain:
            api.llama_sampler_free(self._chain)
            self._chain = None

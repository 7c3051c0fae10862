"""Shapes and random weights of tiny models, and the blocks that many architectures have in common."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    window: int

    @property
    def n_embd(self) -> int:
        """Floats of an embedding."""
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        """Floats of a cell's keys."""
        return self.n_kv_head * self.head_dim


class Weights:
    """Adds random tensors to a file. Shapes are NumPy's: (outputs, inputs)."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int) -> None:
        self._writer = writer
        self._rng = np.random.default_rng(seed)

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        """Normally distributed numbers."""
        self.put(name, mean + std * self._rng.standard_normal(shape))

    def put(self, name: str, values: NDArray[np.floating]) -> None:
        """These numbers."""
        self._writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))

    def matrix(self, name: str, outputs: int, inputs: int, gain: float = 1.0) -> None:
        """Maps inputs of unit variance to outputs of standard deviation ``gain``."""
        self.normal(f"{name}.weight", outputs, inputs, std=gain / inputs**0.5)

    def norm(self, name: str, size: int, *, gain: float = 1.0, bias: bool = False) -> None:
        """The weights of a normalisation, about ``gain``."""
        self.normal(f"{name}.weight", size, std=0.1, mean=gain)
        if bias:
            self.normal(f"{name}.bias", size, std=0.1)


# Queries and keys of standard deviation g give attention scores of standard deviation g squared.
QK_GAIN = 1.4
LOGIT_GAIN = 2.0


def separate_qkv(weights: Weights, block: str, shape: Shape, *, qk_gain: float, bias: bool = False) -> None:
    """Queries, keys and values as three matrices, and what goes out."""
    for name, size, gain in (("q", shape.n_embd, qk_gain), ("k", shape.n_kv, qk_gain), ("v", shape.n_kv, 1.0)):
        weights.matrix(f"{block}.attn_{name}", size, shape.n_embd, gain)
        if bias:
            weights.normal(f"{block}.attn_{name}.bias", size, std=0.5)
    weights.matrix(f"{block}.attn_output", shape.n_embd, shape.n_embd)


def fused_qkv(weights: Weights, block: str, shape: Shape) -> None:
    """Queries, keys and values as one matrix, and what goes out."""
    # One gain for all of the fused matrix: values come out as strong as keys, which attention averages down anyway.
    weights.matrix(f"{block}.attn_qkv", shape.n_embd + 2 * shape.n_kv, shape.n_embd, QK_GAIN)
    weights.matrix(f"{block}.attn_output", shape.n_embd, shape.n_embd)


def feed_forward(weights: Weights, block: str, shape: Shape, *, gate: bool) -> None:
    """The two or three matrices of the feed-forward network, after attention."""
    for name in ("ffn_gate", "ffn_up") if gate else ("ffn_up",):
        weights.matrix(f"{block}.{name}", shape.n_ff, shape.n_embd)
    weights.matrix(f"{block}.ffn_down", shape.n_embd, shape.n_ff)


_EXPERTS = 4


def experts(
    writer: gguf.GGUFWriter | None, weights: Weights, arch: str, block: str, shape: Shape, *, bias: bool = False
) -> None:
    """Four experts, all used for each token: rounding must not choose others. ``writer``: notes that, once."""
    size = shape.n_ff // 2
    if writer:
        for name, number in (("count", _EXPERTS), ("used_count", _EXPERTS), ("feed_forward_length", size)):
            writer.add_uint32(f"{arch}.expert_{name}", number)
    weights.matrix(f"{block}.ffn_gate_inp", _EXPERTS, shape.n_embd)
    for name, outputs, inputs in (
        ("gate", size, shape.n_embd),
        ("up", size, shape.n_embd),
        ("down", shape.n_embd, size),
    ):
        weights.normal(f"{block}.ffn_{name}_exps.weight", _EXPERTS, outputs, inputs, std=inputs**-0.5)
        if bias:
            weights.normal(f"{block}.ffn_{name}_exps.bias", _EXPERTS, outputs, std=0.1)
    if bias:
        weights.normal(f"{block}.ffn_gate_inp.bias", _EXPERTS, std=0.1)

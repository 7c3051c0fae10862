"""What a Llama computes, in NumPy: the independent definition that spliced logits are checked against.

The maths, for tokens at positions ``p`` and a mask ``visible``. Of layer input ``x`` (token embeddings at first):

    h = rms_norm(x) * attn_norm
    q, k, v = Wq h, Wk h, Wv h                      split into heads; a group of query heads shares one k/v head
    a[i] = sum over visible j of softmax_j( R(p_i) q_i . R(p_j) k_j / sqrt(head_dim) ) v_j
    x = x + Wo a
    h = rms_norm(x) * ffn_norm
    x = x + Wdown( silu(Wgate h) * (Wup h) )

and at the end ``logits = Wout (rms_norm(x) * output_norm)``. ``R(p)`` is RoPE of llama.cpp's "norm" kind, used for
architecture ``llama``: it turns each pair of *adjacent* dimensions ``(2i, 2i+1)`` by the angle
``p * base ** (-2i / head_dim)``.

**Reuse.** What a layer hands from one token to later ones is its key and value, nothing else, so a state slice *is* the
keys and values of its tokens, per layer. Both depend on what the token could attend to when it was evaluated, since
``x`` did in every layer but the first. A position enters only through ``R``. So a slice is kept here with its keys
*unrotated*, and whoever attends to it says at which positions it stands now: that is the whole definition of relocating
a slice. Its values, and its keys but for the rotation, stay what they were in the context in which they were evaluated.
llama.cpp reaches the same by turning stored keys by the difference of the positions, since ``R(b) = R(b - a) R(a)``.

Weights are the file's float32, all arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class KV:
    """The state of a run of tokens: ``keys[layer]`` (unrotated) and ``values[layer]``, each of shape
    (tokens, KV heads, head dim)."""

    keys: tuple[Floats, ...]
    values: tuple[Floats, ...]

    def __len__(self) -> int:
        return len(self.keys[0])

    def __getitem__(self, tokens: slice) -> KV:
        return KV(tuple(k[tokens] for k in self.keys), tuple(v[tokens] for v in self.values))

    @staticmethod
    def concat(parts: Sequence[KV]) -> KV:
        """The states one after the other, in the order given."""
        return KV(
            tuple(np.concatenate(layer) for layer in zip(*(part.keys for part in parts), strict=True)),
            tuple(np.concatenate(layer) for layer in zip(*(part.values for part in parts), strict=True)),
        )


def causal(n: int, before: int = 0) -> Mask:
    """The mask of plain prefill: each of ``n`` tokens attends to ``before`` cached ones, to those before it, itself."""
    return np.tri(n, before + n, before, dtype=np.bool_)


class ReferenceLlama:
    """The model in a float32 GGUF file of architecture ``llama``."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def field(name: str) -> float:
            return float(reader.fields[f"llama.{name}"].contents())

        self.n_layer = int(field("block_count"))
        self.n_head = int(field("attention.head_count"))
        self.n_kv_head = int(field("attention.head_count_kv"))
        self.head_dim = int(field("attention.key_length"))
        self.rms_eps = field("attention.layer_norm_rms_epsilon")
        self.rope_base = field("rope.freq_base")
        self._weights: dict[str, Floats] = {}
        for tensor in reader.tensors:
            if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
                raise ValueError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, not F32")
            # A plain array: each operation on one that is mapped to a file makes another of its kind.
            self._weights[tensor.name.removesuffix(".weight")] = np.array(tensor.data, np.float64)

    @classmethod
    @lru_cache(8)
    def of(cls, path: Path) -> ReferenceLlama:
        """The model in a file that does not change, read once for many tests."""
        return cls(path)

    def evaluate(self, tokens: Sequence[int], positions: ArrayLike, visible: ArrayLike) -> Floats:
        """Logits of shape (tokens, vocabulary). ``visible[i, j]`` says that token ``i`` attends to token ``j``; every
        token must see itself."""
        return self.forward(tokens, positions, visible=visible)[0]

    def kv(self, tokens: Sequence[int], positions: ArrayLike, visible: ArrayLike) -> KV:
        """The state of ``tokens``, evaluated under that mask with nothing before them."""
        return self.forward(tokens, positions, visible=visible)[1]

    def forward(
        self,
        tokens: Sequence[int],
        positions: ArrayLike,
        *,
        visible: ArrayLike,
        cache: KV | None = None,
        cache_positions: ArrayLike = (),
    ) -> tuple[Floats, KV]:
        """Logits and state of ``tokens``, which attend to ``cache`` and to one another.

        The cached entries stand at ``cache_positions``, wherever they were evaluated. The columns of ``visible`` are
        first the cached entries, then ``tokens``: shape (tokens, cached + tokens).
        """
        n, n_cached = len(tokens), 0 if cache is None else len(cache)
        query_positions = np.asarray(positions, dtype=np.float64)
        key_positions = np.concatenate([np.asarray(cache_positions, dtype=np.float64), query_positions])
        mask = np.asarray(visible, dtype=np.bool_)
        if query_positions.shape != (n,) or key_positions.shape != (n_cached + n,) or mask.shape != (n, n_cached + n):
            raise ValueError(f"{n} tokens after {n_cached}: positions or mask of the wrong shape")
        if not mask[:, n_cached:].diagonal().all():
            raise ValueError("every token must see itself")

        new_keys: list[Floats] = []
        new_values: list[Floats] = []
        x = self._weights["token_embd"][list(tokens)]
        for layer in range(self.n_layer):
            h = self._rms_norm(x, f"blk.{layer}.attn_norm")
            q = self._linear(h, f"blk.{layer}.attn_q").reshape(n, self.n_head, self.head_dim)
            k = self._linear(h, f"blk.{layer}.attn_k").reshape(n, self.n_kv_head, self.head_dim)
            v = self._linear(h, f"blk.{layer}.attn_v").reshape(n, self.n_kv_head, self.head_dim)
            new_keys.append(k)
            new_values.append(v)
            if cache is not None:
                k = np.concatenate([cache.keys[layer], k])
                v = np.concatenate([cache.values[layer], v])
            attended = self._attend(self._rope(q, query_positions), self._rope(k, key_positions), v, mask)
            x = x + self._linear(attended.reshape(n, self.n_head * self.head_dim), f"blk.{layer}.attn_output")
            h = self._rms_norm(x, f"blk.{layer}.ffn_norm")
            gate = self._linear(h, f"blk.{layer}.ffn_gate")
            silu = gate / (1.0 + np.exp(-gate))
            x = x + self._linear(silu * self._linear(h, f"blk.{layer}.ffn_up"), f"blk.{layer}.ffn_down")
        logits = self._linear(self._rms_norm(x, "output_norm"), "output")
        return logits, KV(tuple(new_keys), tuple(new_values))

    def _linear(self, x: Floats, name: str) -> Floats:
        product: Floats = x @ self._weights[name].T
        return product

    def _rms_norm(self, x: Floats, name: str) -> Floats:
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        normed: Floats = x / np.sqrt(mean_square + self.rms_eps) * self._weights[name]
        return normed

    def _rope(self, x: Floats, positions: Floats) -> Floats:
        """Rotate ``x`` (tokens, heads, head dim) as of ``positions``."""
        frequencies = self.rope_base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (positions[:, None] * frequencies)[:, None, :]
        even, odd = x[..., 0::2], x[..., 1::2]
        rotated = np.empty_like(x)
        rotated[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
        rotated[..., 1::2] = even * np.sin(angles) + odd * np.cos(angles)
        return rotated

    def _attend(self, q: Floats, k: Floats, v: Floats, mask: Mask) -> Floats:
        group = self.n_head // self.n_kv_head
        out = np.empty_like(q)
        for head in range(self.n_head):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(self.head_dim)
            scores = np.where(mask, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[:, head] = weights @ v[:, head // group]
        return out

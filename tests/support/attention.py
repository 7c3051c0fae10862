"""Tiny models with attention only, with and without sliding windows."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np

from tests.support.weights import QK_GAIN, Shape, Weights, experts, feed_forward, fused_qkv, separate_qkv


def _add_llama(writer: gguf.GGUFWriter, weights: Weights, shape: Shape, *, qkv_bias: bool = False) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        separate_qkv(weights, block, shape, qk_gain=QK_GAIN, bias=qkv_bias)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        feed_forward(weights, block, shape, gate=True)


def _add_qwen2(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    _add_llama(writer, weights, shape, qkv_bias=True)


def _add_falcon(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    writer.add_layer_norm_eps(1e-5)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd, bias=True)
        fused_qkv(weights, block, shape)
        feed_forward(weights, block, shape, gate=False)


def _add_mpt(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        fused_qkv(weights, block, shape)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        feed_forward(weights, block, shape, gate=False)


def _add_gemma3(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(shape.window)
    writer.add_sliding_window_pattern([i % 2 == 0 for i in range(shape.n_layer)])
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        separate_qkv(weights, block, shape, qk_gain=1.0)
        for name in ("attn_q_norm", "attn_k_norm"):
            weights.norm(f"{block}.{name}", shape.head_dim, gain=QK_GAIN)
        weights.norm(f"{block}.post_attention_norm", shape.n_embd)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        feed_forward(weights, block, shape, gate=True)
        weights.norm(f"{block}.post_ffw_norm", shape.n_embd)


def _add_gemma4(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Heads of full attention are twice as large as those of windows, and the last layers use the keys of others."""
    shared = 2 if shape.n_layer >= 4 else 0
    wide = 2 * shape.head_dim
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(shape.window)
    writer.add_sliding_window_pattern([i % 2 == 0 for i in range(shape.n_layer)])
    writer.add_key_length(wide)
    writer.add_value_length(wide)
    for name, number in (
        ("attention.key_length_swa", shape.head_dim),
        ("attention.value_length_swa", shape.head_dim),
        ("attention.shared_kv_layers", shared),
        ("rope.dimension_count", wide),
        ("rope.dimension_count_swa", shape.head_dim),
        ("embedding_length_per_layer_input", 0),
    ):
        writer.add_uint32(f"gemma4.{name}", number)
    writer.add_float32("gemma4.rope.freq_base_swa", 10000.0)
    weights.put("rope_freqs.weight", np.linspace(1.0, 4.0, wide // 2))
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        head = wide if i % 2 else shape.head_dim
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        weights.matrix(f"{block}.attn_q", shape.n_head * head, shape.n_embd)
        weights.norm(f"{block}.attn_q_norm", head, gain=0.4)
        if i < shape.n_layer - shared:
            for name in ("attn_k", "attn_v"):
                weights.matrix(f"{block}.{name}", shape.n_kv_head * head, shape.n_embd)
            weights.norm(f"{block}.attn_k_norm", head, gain=0.4)
        weights.matrix(f"{block}.attn_output", shape.n_embd, shape.n_head * head)
        weights.norm(f"{block}.post_attention_norm", shape.n_embd)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        feed_forward(weights, block, shape, gate=True)
        weights.norm(f"{block}.post_ffw_norm", shape.n_embd)


def _add_gpt_oss(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Windows and full attention in turn, with sinks, and experts."""
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(shape.window)
    writer.add_sliding_window_pattern([i % 2 == 0 for i in range(shape.n_layer)])
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        separate_qkv(weights, block, shape, qk_gain=2.0, bias=True)
        weights.normal(f"{block}.attn_output.bias", shape.n_embd, std=0.1)
        weights.normal(f"{block}.attn_sinks.weight", shape.n_head, std=1.0, mean=-1.0)
        weights.norm(f"{block}.post_attention_norm", shape.n_embd)
        experts(writer if i == 0 else None, weights, "gpt-oss", block, shape, bias=True)


ATTENTION: dict[str, Callable[[gguf.GGUFWriter, Weights, Shape], None]] = {
    "llama": _add_llama,
    "qwen2": _add_qwen2,
    "falcon": _add_falcon,
    "mpt": _add_mpt,
    "gemma3": _add_gemma3,
    "gemma4": _add_gemma4,
    "gpt-oss": _add_gpt_oss,
}

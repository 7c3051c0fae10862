"""Tiny models with a recurrent state: all layers, or some beside layers of attention."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np

from tests.support.weights import QK_GAIN, Shape, Weights, experts, feed_forward, separate_qkv

_RESIDUAL = 0.5  # how strongly layers add to what they are given


_STATE, _KERNEL, _RANK = 16, 4, 8


def _add_mamba(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    _add_ssm_sizes(writer, shape)
    for i in range(shape.n_layer):
        _ssm(weights, f"blk.{i}", shape)


def _add_ssm_sizes(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(_KERNEL)
    writer.add_ssm_inner_size(2 * shape.n_embd)
    writer.add_ssm_state_size(_STATE)
    writer.add_ssm_time_step_rank(_RANK)


def _ssm(weights: Weights, block: str, shape: Shape) -> None:
    inner = 2 * shape.n_embd
    weights.norm(f"{block}.attn_norm", shape.n_embd)
    weights.matrix(f"{block}.ssm_in", 2 * inner, shape.n_embd)
    weights.matrix(f"{block}.ssm_conv1d", inner, _KERNEL)
    weights.normal(f"{block}.ssm_conv1d.bias", inner, std=0.1)
    weights.matrix(f"{block}.ssm_x", _RANK + 2 * _STATE, inner)
    weights.matrix(f"{block}.ssm_dt", inner, _RANK)
    # Time steps of about exp(-2): the state remembers some tens of tokens.
    weights.normal(f"{block}.ssm_dt.bias", inner, std=0.5, mean=-2.0)
    weights.put(f"{block}.ssm_a", np.tile(-np.linspace(0.2, 2.0, _STATE), (inner, 1)))
    weights.normal(f"{block}.ssm_d", inner, std=0.1, mean=1.0)
    weights.matrix(f"{block}.ssm_out", shape.n_embd, inner)


def _add_jamba(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Mamba and attention in turn."""
    _add_ssm_sizes(writer, shape)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        if i % 2:
            weights.norm(f"{block}.attn_norm", shape.n_embd)
            separate_qkv(weights, block, shape, qk_gain=QK_GAIN)
        else:
            _ssm(weights, block, shape)
            for name, size in (("dt", _RANK), ("b", _STATE), ("c", _STATE)):
                weights.norm(f"{block}.ssm_{name}_norm", size)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        feed_forward(weights, block, shape, gate=True)


def _add_lfm2(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Short convolutions and attention in turn."""
    kernel = 3
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_shortconv_l_cache(kernel)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        if i % 2:
            separate_qkv(weights, block, shape, qk_gain=1.0)
            for name in ("attn_q_norm", "attn_k_norm"):
                weights.norm(f"{block}.{name}", shape.head_dim, gain=QK_GAIN)
        else:
            weights.matrix(f"{block}.shortconv.in_proj", 3 * shape.n_embd, shape.n_embd)
            weights.matrix(f"{block}.shortconv.conv", shape.n_embd, kernel)
            weights.matrix(f"{block}.shortconv.out_proj", shape.n_embd, shape.n_embd)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        feed_forward(weights, block, shape, gate=True)


def _add_lfm2_window(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """The same with a sliding window in all layers of attention."""
    writer.add_sliding_window(shape.window)
    _add_lfm2(writer, weights, shape)


def _add_mamba2(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    _add_ssm2_sizes(writer, "mamba2", shape)
    for i in range(shape.n_layer):
        weights.norm(f"blk.{i}.attn_norm", shape.n_embd)
        _ssm2(weights, f"blk.{i}", shape)


_HEADS = 8


def _add_ssm2_sizes(writer: gguf.GGUFWriter, arch: str, shape: Shape) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    _add_state_sizes(writer, arch, inner=2 * shape.n_embd, state=_STATE, rank=_HEADS, groups=1)


def _add_state_sizes(writer: gguf.GGUFWriter, arch: str, *, inner: int, state: int, rank: int, groups: int) -> None:
    sizes = {"conv_kernel": _KERNEL, "inner_size": inner, "state_size": state, "time_step_rank": rank}
    for name, size in (*sizes.items(), ("group_count", groups)):
        writer.add_uint32(f"{arch}.ssm.{name}", size)


def _ssm2(weights: Weights, block: str, shape: Shape) -> None:
    inner = 2 * shape.n_embd
    width = inner + 2 * _STATE
    weights.matrix(f"{block}.ssm_in", inner + width + _HEADS, shape.n_embd)
    weights.matrix(f"{block}.ssm_conv1d", width, _KERNEL)
    weights.normal(f"{block}.ssm_conv1d.bias", width, std=0.1)
    weights.normal(f"{block}.ssm_dt.bias", _HEADS, std=0.5, mean=-3.0)
    weights.put(f"{block}.ssm_a", -np.linspace(0.2, 2.0, _HEADS).reshape(_HEADS, 1))
    weights.put(f"{block}.ssm_d", np.linspace(0.5, 1.5, _HEADS).reshape(_HEADS, 1))
    weights.normal(f"{block}.ssm_norm.weight", 1, inner, std=0.1, mean=1.0)
    weights.matrix(f"{block}.ssm_out", shape.n_embd, inner)


def _add_falcon_h1(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Mamba 2 and attention side by side in every layer."""
    _add_ssm2_sizes(writer, "falcon-h1", shape)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        _ssm2(weights, block, shape)
        separate_qkv(weights, block, shape, qk_gain=QK_GAIN)
        weights.normal(f"{block}.ffn_norm", shape.n_embd, std=0.1, mean=1.0)  # llama.cpp wants no ".weight" here
        feed_forward(weights, block, shape, gate=True)


def _add_granite_hybrid(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Mamba 2 and attention in turn."""
    _add_ssm2_sizes(writer, "granitehybrid", shape)
    writer.add_float32("granitehybrid.residual_scale", _RESIDUAL)
    writer.add_float32("granitehybrid.logit_scale", 1.0)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        if i % 2:
            separate_qkv(weights, block, shape, qk_gain=QK_GAIN)
        else:
            _ssm2(weights, block, shape)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        feed_forward(weights, block, shape, gate=True)


_KEY_HEADS, _VALUE_HEADS, _HEAD = 2, 4, 32  # of the gated delta rule


def _add_qwen35(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Gated delta rule and gated attention in turn."""
    _delta_and_attention(writer, weights, "qwen35", shape)
    writer.add_rope_dimension_sections([shape.head_dim // 4, shape.head_dim // 8, shape.head_dim // 8, 0])
    for i in range(shape.n_layer):
        if i % 2 == 0:
            for name in ("ssm_alpha", "ssm_beta"):
                weights.matrix(f"blk.{i}.{name}", _VALUE_HEADS, shape.n_embd)
        feed_forward(weights, f"blk.{i}", shape, gate=True)


def _add_qwen3next(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """The same with experts."""
    _delta_and_attention(writer, weights, "qwen3next", shape)
    size = shape.n_ff // 2
    writer.add_uint32("qwen3next.expert_shared_feed_forward_length", size)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        if i % 2 == 0:
            weights.matrix(f"{block}.ssm_ba", 2 * _VALUE_HEADS, shape.n_embd)
        experts(writer if i == 0 else None, weights, "qwen3next", block, shape)
        weights.normal(f"{block}.ffn_gate_inp_shexp.weight", shape.n_embd, std=shape.n_embd**-0.5)
        for name in ("gate", "up"):
            weights.matrix(f"{block}.ffn_{name}_shexp", size, shape.n_embd)
        weights.matrix(f"{block}.ffn_down_shexp", shape.n_embd, size)


def _delta_and_attention(writer: gguf.GGUFWriter, weights: Weights, arch: str, shape: Shape) -> None:
    keys, values = _KEY_HEADS * _HEAD, _VALUE_HEADS * _HEAD
    writer.add_layer_norm_rms_eps(1e-6)
    _add_state_sizes(writer, arch, inner=values, state=_HEAD, rank=_VALUE_HEADS, groups=_KEY_HEADS)
    writer.add_uint32(f"{arch}.full_attention_interval", 2)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        weights.norm(f"{block}.post_attention_norm", shape.n_embd)
        if i % 2:
            weights.matrix(f"{block}.attn_q", 2 * shape.n_embd, shape.n_embd)
            for name in ("attn_k", "attn_v"):
                weights.matrix(f"{block}.{name}", shape.n_kv, shape.n_embd)
            weights.matrix(f"{block}.attn_output", shape.n_embd, shape.n_embd)
            for name in ("attn_q_norm", "attn_k_norm"):
                weights.norm(f"{block}.{name}", shape.head_dim, gain=QK_GAIN)
        else:
            weights.matrix(f"{block}.attn_qkv", 2 * keys + values, shape.n_embd)
            weights.matrix(f"{block}.attn_gate", values, shape.n_embd)
            weights.matrix(f"{block}.ssm_conv1d", 2 * keys + values, _KERNEL)
            weights.normal(f"{block}.ssm_dt.bias", _VALUE_HEADS, std=0.5, mean=-3.0)
            weights.put(f"{block}.ssm_a", -np.linspace(0.2, 2.0, _VALUE_HEADS))
            weights.norm(f"{block}.ssm_norm", _HEAD)
            weights.matrix(f"{block}.ssm_out", shape.n_embd, values)


def _add_deepseek4(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    """Nothing: the model is refused before its weights matter, and ``vocab_only`` is needed to open it."""


_SMALL = 8  # inner size of the low-rank parts of RWKV


def _add_rwkv(writer: gguf.GGUFWriter, weights: Weights, arch: str, shape: Shape) -> None:
    writer.add_layer_norm_eps(1e-5)
    writer.add_uint32(f"{arch}.wkv.head_size", shape.head_dim)
    weights.norm("token_embd_norm", shape.n_embd, bias=True)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            weights.norm(f"{block}.{name}", shape.n_embd, bias=True)
        for name in ("key", "value", "receptance", "output"):
            weights.matrix(f"{block}.time_mix_{name}", shape.n_embd, shape.n_embd)
        weights.normal(f"{block}.channel_mix_lerp_k.weight", shape.n_embd, std=0.1, mean=0.5)
        weights.matrix(f"{block}.channel_mix_key", shape.n_ff, shape.n_embd)
        weights.matrix(f"{block}.channel_mix_value", shape.n_embd, shape.n_ff, _RESIDUAL)


def _add_rwkv6(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    n_embd = shape.n_embd
    _add_rwkv(writer, weights, "rwkv6", shape)
    writer.add_uint32("rwkv6.time_mix_extra_dim", _SMALL)
    writer.add_uint32("rwkv6.time_decay_extra_dim", _SMALL)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.matrix(f"{block}.time_mix_w1", 5 * _SMALL, n_embd)
        weights.normal(f"{block}.time_mix_w2.weight", 5, n_embd, _SMALL, std=0.1)
        for name in "xwkvrg":
            weights.normal(f"{block}.time_mix_lerp_{name}.weight", n_embd, std=0.1, mean=0.5)
        weights.normal(f"{block}.time_mix_first.weight", shape.n_head, shape.head_dim, std=0.3)
        # Decays of about exp(-exp(-3)): the state remembers some tens of tokens.
        weights.normal(f"{block}.time_mix_decay.weight", n_embd, std=0.5, mean=-3.0)
        weights.matrix(f"{block}.time_mix_decay_w1", _SMALL, n_embd)
        weights.matrix(f"{block}.time_mix_decay_w2", n_embd, _SMALL, 0.3)
        weights.matrix(f"{block}.time_mix_gate", n_embd, n_embd)
        weights.normal(f"{block}.channel_mix_lerp_r.weight", n_embd, std=0.1, mean=0.5)
        weights.matrix(f"{block}.channel_mix_receptance", n_embd, n_embd)


def _add_rwkv7(writer: gguf.GGUFWriter, weights: Weights, shape: Shape) -> None:
    n_embd = shape.n_embd
    _add_rwkv(writer, weights, "rwkv7", shape)
    for name in ("decay", "iclr", "value_residual_mix", "gate"):
        writer.add_uint32(f"rwkv7.attention.{name}_lora_rank", _SMALL)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        for name, mean in (("w", -3.0), ("a", 0.0), ("v", 0.0)):
            weights.normal(f"{block}.time_mix_{name}0.weight", n_embd, std=0.5, mean=mean)
        for name in "wavg":
            weights.matrix(f"{block}.time_mix_{name}1", _SMALL, n_embd)
            weights.matrix(f"{block}.time_mix_{name}2", n_embd, _SMALL)
        weights.normal(f"{block}.time_mix_lerp_fused.weight", 6, 1, 1, n_embd, std=0.1, mean=0.5)
        for name, mean in (("k_k", 1.0), ("k_a", 1.0), ("r_k", 0.0)):
            weights.normal(f"{block}.time_mix_{name}.weight", n_embd, std=0.1, mean=mean)


RECURRENT: dict[str, Callable[[gguf.GGUFWriter, Weights, Shape], None]] = {
    "mamba": _add_mamba,
    "mamba2": _add_mamba2,
    "rwkv6": _add_rwkv6,
    "rwkv7": _add_rwkv7,
    "lfm2": _add_lfm2,
    "lfm2-window": _add_lfm2_window,
    "jamba": _add_jamba,
    "falcon-h1": _add_falcon_h1,
    "granitehybrid": _add_granite_hybrid,
    "qwen35": _add_qwen35,
    "qwen3next": _add_qwen3next,
    "deepseek4": _add_deepseek4,
}

"""Tiny random GGUF models of several architectures, written in milliseconds.

The weights are random but not careless: every tensor is float32, so that numerics are clean, and the scales are chosen
so that attention is far from uniform and logits spread with a standard deviation of about 2. A wrong mask, position or
cell therefore shows in the logits instead of drowning in near-equal averages.

Token ids are the same under both tokenizers up to ``BYTES``: the special tokens first, then one token for each byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import gguf
import numpy as np
from numpy.typing import NDArray

Arch = Literal["llama", "qwen2", "falcon", "mpt", "gemma3", "mamba", "lfm2", "jamba"]
Tokenizer = Literal["bpe", "spm"]

ARCHS: tuple[Arch, ...] = get_args(Arch)
HYBRID_ARCHS: tuple[Arch, ...] = ("lfm2", "jamba")
"""Attention in some layers, a recurrent state in the others."""
RECURRENT_ARCHS: tuple[Arch, ...] = ("mamba", *HYBRID_ARCHS)
ATTENTION_ARCHS: tuple[Arch, ...] = tuple(arch for arch in ARCHS if arch not in RECURRENT_ARCHS)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
UNK, BOS, EOS, PAD, IM_START, IM_END = range(len(SPECIAL_TOKENS))
BYTES = len(SPECIAL_TOKENS)
"""The id of byte 0; byte ``b`` is token ``BYTES + b``."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Each pair merges two symbols that exist by then; "_" stands for the space. They are common enough in English for the
# tokens of a text to depend on where the text is cut, as those of a real model do.
_MERGES = (
    "_ t,h e,_t he,i n,_ a,r e,o n,e r,_ s,a t,n d,_ w,e s,_a nd,o u,_ o,_o f,in g,e n,_ i,_i s,i t,_ b,_ c,_ m,o r,e d"
)


@dataclass(frozen=True)
class _Shape:
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    window: int

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        return self.n_kv_head * self.head_dim


class _Weights:
    """Adds random tensors to a file. Shapes are NumPy's: (outputs, inputs)."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int) -> None:
        self._writer = writer
        self._rng = np.random.default_rng(seed)

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        self.put(name, mean + std * self._rng.standard_normal(shape))

    def put(self, name: str, values: NDArray[np.floating]) -> None:
        self._writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))

    def matrix(self, name: str, outputs: int, inputs: int, gain: float = 1.0) -> None:
        """Maps inputs of unit variance to outputs of standard deviation ``gain``."""
        self.normal(f"{name}.weight", outputs, inputs, std=gain / inputs**0.5)

    def norm(self, name: str, size: int, *, gain: float = 1.0, bias: bool = False) -> None:
        self.normal(f"{name}.weight", size, std=0.1, mean=gain)
        if bias:
            self.normal(f"{name}.bias", size, std=0.1)


# Queries and keys of standard deviation g give attention scores of standard deviation g squared.
_QK_GAIN = 1.4
_LOGIT_GAIN = 2.0


def write_tiny(
    path: Path,
    arch: Arch,
    *,
    seed: int = 0,
    n_ctx: int = 4096,
    n_layer: int | None = None,
    n_head: int = 4,
    n_kv_head: int | None = None,
    head_dim: int = 64,
    n_ff: int = 192,
    window: int = 16,
    rope_base: float = 10000.0,
    rope_scaling: gguf.RopeScalingType | None = None,
    rope_factors: bool = False,
    tokenizer: Tokenizer = "bpe",
    add_bos: bool = False,
    add_space_prefix: bool = True,
    chat_template: str | None = CHATML,
) -> Path:
    """Write a random model of architecture ``arch`` to ``path`` and return ``path``.

    ``n_ctx`` is the trained context in tokens. ``n_layer`` defaults to 3, and to 4 for gemma3, whose layers alternate
    between a sliding window of ``window`` tokens and full attention. ``n_kv_head`` defaults to 2 (grouped queries)
    where the architecture has them, else to ``n_head``. ``head_dim`` is a multiple of 64 by default because llama.cpp
    crashes when it shifts quantized keys of any other size under RoPE. ``add_space_prefix`` goes with
    ``tokenizer="spm"`` only. ``chat_template=None`` leaves the template out. ``rope_scaling`` stretches
    positions by 4. ``rope_factors`` divides angles by some numbers.
    """
    add_arch = _ARCHS[arch]
    shape = _Shape(
        n_layer=n_layer if n_layer is not None else (4 if arch in ("gemma3", *HYBRID_ARCHS) else 3),
        n_head=n_head,
        n_kv_head=n_kv_head if n_kv_head is not None else (n_head if arch == "mpt" else 2),
        head_dim=head_dim,
        n_ff=n_ff,
        window=window,
    )
    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_name(f"tiny-{arch}-{seed}")
        writer.add_context_length(n_ctx)
        writer.add_embedding_length(shape.n_embd)
        writer.add_block_count(shape.n_layer)
        if arch != "mamba":
            writer.add_feed_forward_length(n_ff)
            writer.add_head_count(n_head)
            kv_heads = [shape.n_kv_head * (i % 2) for i in range(shape.n_layer)]
            writer.add_head_count_kv(kv_heads if arch in HYBRID_ARCHS else shape.n_kv_head)
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        if arch not in ("mpt", "mamba", "jamba"):
            writer.add_rope_freq_base(rope_base)
        if rope_scaling:
            writer.add_rope_scaling_type(rope_scaling)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(n_ctx)
        if arch in ("llama", "qwen2"):
            writer.add_rope_dimension_count(head_dim)
        add_vocab = _add_bpe if tokenizer == "bpe" else _add_spm
        n_vocab = add_vocab(writer)
        if tokenizer == "spm":
            writer.add_add_space_prefix(add_space_prefix)
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(EOS)
        writer.add_unk_token_id(UNK)
        writer.add_pad_token_id(PAD)
        writer.add_add_bos_token(add_bos)
        if chat_template is not None:
            writer.add_chat_template(chat_template)

        weights = _Weights(writer, seed)
        # Gemma multiplies embeddings by the square root of their length.
        weights.normal("token_embd.weight", n_vocab, shape.n_embd, std=shape.n_embd**-0.5 if arch == "gemma3" else 1.0)
        add_arch(writer, weights, shape)
        if rope_factors:
            weights.put("rope_freqs.weight", np.linspace(1.0, 8.0, head_dim // 2))
        last_norm = "token_embd_norm" if arch == "lfm2" else "output_norm"
        weights.norm(last_norm, shape.n_embd, bias=arch in ("falcon", "mpt"))
        weights.matrix("output", n_vocab, shape.n_embd, gain=_LOGIT_GAIN)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return path


def _separate_qkv(weights: _Weights, block: str, shape: _Shape, *, qk_gain: float, bias: bool = False) -> None:
    for name, size, gain in (("q", shape.n_embd, qk_gain), ("k", shape.n_kv, qk_gain), ("v", shape.n_kv, 1.0)):
        weights.matrix(f"{block}.attn_{name}", size, shape.n_embd, gain)
        if bias:
            weights.normal(f"{block}.attn_{name}.bias", size, std=0.5)
    weights.matrix(f"{block}.attn_output", shape.n_embd, shape.n_embd)


def _fused_qkv(weights: _Weights, block: str, shape: _Shape) -> None:
    # One gain for all of the fused matrix: values come out as strong as keys, which attention averages down anyway.
    weights.matrix(f"{block}.attn_qkv", shape.n_embd + 2 * shape.n_kv, shape.n_embd, _QK_GAIN)
    weights.matrix(f"{block}.attn_output", shape.n_embd, shape.n_embd)


def _feed_forward(weights: _Weights, block: str, shape: _Shape, *, gate: bool) -> None:
    for name in ("ffn_gate", "ffn_up") if gate else ("ffn_up",):
        weights.matrix(f"{block}.{name}", shape.n_ff, shape.n_embd)
    weights.matrix(f"{block}.ffn_down", shape.n_embd, shape.n_ff)


def _add_llama(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape, *, qkv_bias: bool = False) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        _separate_qkv(weights, block, shape, qk_gain=_QK_GAIN, bias=qkv_bias)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        _feed_forward(weights, block, shape, gate=True)


def _add_qwen2(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape) -> None:
    _add_llama(writer, weights, shape, qkv_bias=True)


def _add_falcon(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape) -> None:
    writer.add_layer_norm_eps(1e-5)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd, bias=True)
        _fused_qkv(weights, block, shape)
        _feed_forward(weights, block, shape, gate=False)


def _add_mpt(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape) -> None:
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        _fused_qkv(weights, block, shape)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        _feed_forward(weights, block, shape, gate=False)


def _add_gemma3(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape) -> None:
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(shape.window)
    writer.add_sliding_window_pattern([i % 2 == 0 for i in range(shape.n_layer)])
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        _separate_qkv(weights, block, shape, qk_gain=1.0)
        for name in ("attn_q_norm", "attn_k_norm"):
            weights.norm(f"{block}.{name}", shape.head_dim, gain=_QK_GAIN)
        weights.norm(f"{block}.post_attention_norm", shape.n_embd)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        _feed_forward(weights, block, shape, gate=True)
        weights.norm(f"{block}.post_ffw_norm", shape.n_embd)


_STATE, _KERNEL, _RANK = 16, 4, 8


def _add_mamba(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape) -> None:
    _add_ssm_sizes(writer, shape)
    for i in range(shape.n_layer):
        _ssm(weights, f"blk.{i}", shape)


def _add_ssm_sizes(writer: gguf.GGUFWriter, shape: _Shape) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(_KERNEL)
    writer.add_ssm_inner_size(2 * shape.n_embd)
    writer.add_ssm_state_size(_STATE)
    writer.add_ssm_time_step_rank(_RANK)


def _ssm(weights: _Weights, block: str, shape: _Shape) -> None:
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


def _add_jamba(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape) -> None:
    """Mamba and attention in turn."""
    _add_ssm_sizes(writer, shape)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        if i % 2:
            weights.norm(f"{block}.attn_norm", shape.n_embd)
            _separate_qkv(weights, block, shape, qk_gain=_QK_GAIN)
        else:
            _ssm(weights, block, shape)
            for name, size in (("dt", _RANK), ("b", _STATE), ("c", _STATE)):
                weights.norm(f"{block}.ssm_{name}_norm", size)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        _feed_forward(weights, block, shape, gate=True)


def _add_lfm2(writer: gguf.GGUFWriter, weights: _Weights, shape: _Shape) -> None:
    """Short convolutions and attention in turn."""
    kernel = 3
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_shortconv_l_cache(kernel)
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", shape.n_embd)
        if i % 2:
            _separate_qkv(weights, block, shape, qk_gain=1.0)
            for name in ("attn_q_norm", "attn_k_norm"):
                weights.norm(f"{block}.{name}", shape.head_dim, gain=_QK_GAIN)
        else:
            weights.matrix(f"{block}.shortconv.in_proj", 3 * shape.n_embd, shape.n_embd)
            weights.matrix(f"{block}.shortconv.conv", shape.n_embd, kernel)
            weights.matrix(f"{block}.shortconv.out_proj", shape.n_embd, shape.n_embd)
        weights.norm(f"{block}.ffn_norm", shape.n_embd)
        _feed_forward(weights, block, shape, gate=True)


_ARCHS: dict[Arch, Callable[[gguf.GGUFWriter, _Weights, _Shape], None]] = {
    "llama": _add_llama,
    "qwen2": _add_qwen2,
    "falcon": _add_falcon,
    "mpt": _add_mpt,
    "gemma3": _add_gemma3,
    "mamba": _add_mamba,
    "lfm2": _add_lfm2,
    "jamba": _add_jamba,
}

_SPECIAL_TYPES = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * (len(SPECIAL_TOKENS) - 1)


def _merges(space: str) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") for merge in _MERGES.replace("_", space).split(","))
    return [(left, right) for left, right in pairs]


def _add_bpe(writer: gguf.GGUFWriter) -> int:
    # Byte-level BPE spells a byte as itself where that is a visible Latin-1 character, and as the next free character
    # from U+0100 on where it isn't: the space becomes U+0120.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    spelling = [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]
    merges = _merges(spelling[0x20])
    pieces = [left + right for left, right in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*SPECIAL_TOKENS, *spelling, *pieces]
    writer.add_token_list(tokens)
    writer.add_token_types([*_SPECIAL_TYPES, *[gguf.TokenType.NORMAL] * (256 + len(pieces))])
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    return len(tokens)


def _add_spm(writer: gguf.GGUFWriter) -> int:
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    letters = [space, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:"]
    pieces = [left + right for left, right in _merges(space)]
    normal = [*pieces, *letters]
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    # SentencePiece merges the pair of the highest score first.
    writer.add_token_scores([0.0] * (BYTES + 256) + [-1.0 - i for i in range(len(normal))])
    writer.add_token_types([*_SPECIAL_TYPES, *[gguf.TokenType.BYTE] * 256, *[gguf.TokenType.NORMAL] * len(normal)])
    return len(tokens)

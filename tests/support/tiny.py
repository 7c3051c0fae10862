"""Tiny random GGUF models of several architectures, written in milliseconds.

The weights are random but not careless: every tensor is float32, so that numerics are clean, and the scales are chosen
so that attention is far from uniform and logits spread with a standard deviation of about 2. A wrong mask, position or
cell therefore shows in the logits instead of drowning in near-equal averages.

Token ids are the same under both tokenizers up to ``BYTES``: the special tokens first, then one token for each byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import gguf
import numpy as np

from tests.support.attention import ATTENTION
from tests.support.recurrent import RECURRENT
from tests.support.weights import LOGIT_GAIN, Shape, Weights

Arch = Literal[
    "llama",
    "qwen2",
    "falcon",
    "mpt",
    "gemma3",
    "gemma4",
    "gpt-oss",
    "mamba",
    "mamba2",
    "rwkv6",
    "rwkv7",
    "lfm2",
    "lfm2-window",
    "jamba",
    "falcon-h1",
    "granitehybrid",
    "qwen35",
    "qwen3next",
]
Tokenizer = Literal["bpe", "spm"]

ARCHS: tuple[Arch, ...] = get_args(Arch)
HYBRID_ARCHS: tuple[Arch, ...] = ("lfm2", "lfm2-window", "jamba", "falcon-h1", "granitehybrid", "qwen35", "qwen3next")
"""Attention in some layers, a recurrent state in the others (or in the same)."""
RECURRENT_ARCHS: tuple[Arch, ...] = ("mamba", "mamba2", "rwkv6", "rwkv7", *HYBRID_ARCHS)
ATTENTION_ARCHS: tuple[Arch, ...] = tuple(arch for arch in ARCHS if arch not in RECURRENT_ARCHS)
WINDOW_ARCHS: tuple[Arch, ...] = ("gemma3", "gemma4", "gpt-oss", "lfm2-window")
"""Windows in some layers, full attention or a recurrent state in the others."""

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

    ``n_ctx`` is the trained context in tokens. ``n_layer`` defaults to 3, and to 4 where layers alternate: of
    gemma3, gemma4 and gpt-oss between a sliding window of ``window`` tokens and full attention, of hybrids between a
    recurrent state and attention. ``lfm2-window`` is LFM2 with such a window in its layers of attention. ``n_kv_head``
    defaults to 2 (grouped queries) where the architecture has them, else to ``n_head``. ``head_dim`` is a multiple of
    64 by default because llama.cpp crashes when it shifts quantized keys of any other size under RoPE.
    ``add_space_prefix`` goes with ``tokenizer="spm"`` only. ``chat_template=None`` leaves the template out.
    ``rope_scaling`` scales positions by 4. ``rope_factors`` divides angles by some numbers.
    """
    add_arch = {**ATTENTION, **RECURRENT}[arch]
    architecture = arch.removesuffix("-window")
    shape = Shape(
        n_layer=n_layer if n_layer is not None else (4 if arch in (*WINDOW_ARCHS, *HYBRID_ARCHS) else 3),
        n_head=n_head,
        n_kv_head=n_kv_head if n_kv_head is not None else (n_head if arch == "mpt" else 2),
        head_dim=head_dim,
        n_ff=n_ff,
        window=window,
    )
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_name(f"tiny-{arch}-{seed}")
        writer.add_context_length(n_ctx)
        writer.add_embedding_length(shape.n_embd)
        writer.add_block_count(shape.n_layer)
        if arch in ("rwkv6", "rwkv7"):
            writer.add_feed_forward_length(n_ff)
            writer.add_head_count(0)
        elif arch not in ("mamba", "mamba2"):
            writer.add_feed_forward_length(n_ff)
            writer.add_head_count(n_head)
            kv_heads = [shape.n_kv_head * (i % 2) for i in range(shape.n_layer)]
            in_turn = architecture in ("lfm2", "jamba", "granitehybrid")  # others say otherwise which layers attend
            writer.add_head_count_kv(kv_heads if in_turn else shape.n_kv_head)
            if arch != "gemma4":
                writer.add_key_length(head_dim)
                writer.add_value_length(head_dim)
        if arch not in ("mpt", "mamba", "mamba2", "rwkv6", "rwkv7", "jamba"):
            writer.add_rope_freq_base(rope_base)
        if rope_scaling:
            writer.add_rope_scaling_type(rope_scaling)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(n_ctx)
        if arch in ("llama", "qwen2", "falcon-h1", "granitehybrid", "qwen35", "qwen3next"):
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

        weights = Weights(writer, seed)
        # Gemma multiplies embeddings by the square root of their length.
        weights.normal(
            "token_embd.weight", n_vocab, shape.n_embd, std=shape.n_embd**-0.5 if arch.startswith("gemma") else 1.0
        )
        add_arch(writer, weights, shape)
        if rope_factors:
            weights.put("rope_freqs.weight", np.linspace(1.0, 8.0, head_dim // 2))
        last_norm = "token_embd_norm" if architecture == "lfm2" else "output_norm"
        weights.norm(last_norm, shape.n_embd, bias=arch in ("falcon", "mpt", "rwkv6", "rwkv7"))
        weights.matrix("output", n_vocab, shape.n_embd, gain=LOGIT_GAIN)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return path


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

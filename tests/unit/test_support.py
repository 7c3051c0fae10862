"""The test support is itself right: the tiny models load, and the NumPy Llama computes what llama.cpp does."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.reference import KV, ReferenceLlama, causal
from tests.support.tiny import (
    ARCHS,
    ATTENTION_ARCHS,
    BOS,
    BYTES,
    CHATML,
    EOS,
    HYBRID_ARCHS,
    IM_END,
    IM_START,
    PAD,
    RECURRENT_ARCHS,
    UNK,
    write_tiny,
)

TinyModel = Callable[..., Path]
Logits = NDArray[np.float32]

# llama.cpp's float32 sums are good to 2e-5 here, its float32 angles to 5e-4 at positions in the thousands. Logits have
# a standard deviation of about 2.
TOLERANCE = 1e-3


class LlamaCpp:
    """A model and a context, through plain calls of llama.cpp."""

    def __init__(self, path: Path, key_type: int = llama_cpp.GGML_TYPE_F32) -> None:
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        assert self.model, f"llama.cpp refused {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_seq_max = 8
        params.kv_unified = True
        params.swa_full = True
        params.n_threads = params.n_threads_batch = 2
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = key_type
        params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, f"no context for {path}"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def decode(self, tokens: Sequence[int], start: int, sequence: int = 0) -> Logits:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = True
            assert llama_cpp.llama_decode(self.context, batch) == 0
        finally:
            llama_cpp.llama_batch_free(batch)
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.array(np.ctypeslib.as_array(pointer, shape=(len(tokens), self.n_vocab)), dtype=np.float32)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        raw = text.encode()
        tokens = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), tokens, len(tokens), add_special, True)
        return list(tokens[:n])

    def text(self, tokens: Sequence[int]) -> str:
        pieces = b""
        buffer = ctypes.create_string_buffer(32)
        for token in tokens:
            n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
            pieces += buffer.raw[:n]
        return pieces.decode()


@pytest.fixture(autouse=True)
def _errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("llama-cpp-python"), "level", logging.ERROR)


@contextmanager
def opened(path: Path, key_type: int = llama_cpp.GGML_TYPE_F32) -> Iterator[LlamaCpp]:
    llama = LlamaCpp(path, key_type)
    try:
        yield llama
    finally:
        llama.close()


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return list(map(int, np.random.default_rng(seed).integers(BYTES, BYTES + 256, n)))


def assert_close(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < TOLERANCE


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_loads_and_spreads_its_logits(arch: str, tiny: TinyModel) -> None:
    with opened(tiny(arch)) as llama:
        logits = llama.decode(some_tokens(40), 0)
        assert np.isfinite(logits).all()
        assert logits.std(axis=1).min() > 1.0
        assert logits.std(axis=1).max() < 4.0
        # True of recurrent memories, too (nothing but a number would change), which only the next checks distinguish.
        # (Not with positions in several dimensions.)
        assert llama_cpp.llama_memory_can_shift(llama.memory) == (arch != "qwen35")
        assert llama_cpp.llama_model_is_recurrent(llama.model) == (arch in RECURRENT_ARCHS and arch not in HYBRID_ARCHS)
        assert llama_cpp.llama_model_is_hybrid(llama.model) == (arch in HYBRID_ARCHS)
        assert llama_cpp.llama_model_n_ctx_train(llama.model) == 4096


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_depends_on_earlier_tokens(arch: str, tiny: TinyModel) -> None:
    tokens = some_tokens(12)
    changed = [tokens[0] + 1, *tokens[1:]]
    with opened(tiny(arch)) as llama:
        difference = llama.decode(tokens, 0, 0)[-1] - llama.decode(changed, 0, 1)[-1]
    assert difference.std() > 0.02


@pytest.mark.parametrize("arch", ATTENTION_ARCHS)
def test_every_attention_depends_on_distance(arch: str, tiny: TinyModel) -> None:
    first, second = some_tokens(10), some_tokens(4, seed=1)
    with opened(tiny(arch)) as llama:
        llama.decode(first, 0, 0)
        near = llama.decode(second, len(first), 0)
        llama.decode(first, 0, 1)
        llama_cpp.llama_memory_seq_add(llama.memory, 1, 5, -1, 3)
        far = llama.decode(second, len(first) + 3, 1)
    assert (far - near).std() > 0.05


def test_gemma3_alternates_window_and_full_attention(tiny: TinyModel) -> None:
    tokens = some_tokens(60)
    changed = [tokens[0] + 1, *tokens[1:]]

    def effect(path: Path) -> Logits:
        with opened(path) as llama:
            largest: Logits = np.abs(llama.decode(tokens, 0, 0) - llama.decode(changed, 0, 1)).max(axis=1)
        return largest

    # The first layer attends to 16 tokens, itself among them: beyond them, only rounding is left of the first one.
    windowed = effect(tiny("gemma3", n_layer=1))
    assert windowed[:16].min() > 0.1
    assert windowed[16:].max() < TOLERANCE
    # A second window would reach no further than token 30.
    assert effect(tiny("gemma3", n_layer=2))[31:].min() > 0.1


@pytest.mark.parametrize("arch", ATTENTION_ARCHS)
def test_q8_0_keys_work_and_can_be_shifted(arch: str, tiny: TinyModel) -> None:
    path = tiny(arch)
    first, second = some_tokens(20), some_tokens(6, seed=1)

    def shifted(key_type: int) -> Logits:
        with opened(path, key_type) as llama:
            llama.decode(first, 0)
            llama_cpp.llama_memory_seq_add(llama.memory, 0, 10, -1, 7)
            return llama.decode(second, len(first) + 7)

    exact = shifted(llama_cpp.GGML_TYPE_F32)
    error = shifted(llama_cpp.GGML_TYPE_Q8_0) - exact
    assert 0.0 < error.std() < 0.05 * exact.std()


def test_only_the_seed_and_the_settings_determine_the_file(tmp_path: Path) -> None:
    one, same, other = (write_tiny(tmp_path / f"{i}.gguf", "llama", seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
def test_tokenizers_round_trip_and_merge(tokenizer: str, tiny: TinyModel) -> None:
    text = "the other\nthing \u00e9\u4f60 1"
    with opened(tiny("llama", tokenizer=tokenizer)) as llama:
        tokens = llama.tokenize(text)
        assert llama.text(tokens) == (" " + text if tokenizer == "spm" else text)
        assert len(tokens) <= len(text.encode()) - 5
        assert BYTES + ord("\n") in tokens
        # Where a text is cut changes its tokens.
        assert llama.tokenize("oth") + llama.tokenize("er") != llama.tokenize("other")


@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
def test_special_tokens(tokenizer: str, tiny: TinyModel) -> None:
    with opened(tiny("llama", tokenizer=tokenizer, add_bos=True)) as llama:
        assert llama.tokenize("<|im_start|><|im_end|><pad>") == [IM_START, IM_END, PAD]
        assert llama.tokenize("", add_special=True) == [BOS]
        assert llama_cpp.llama_vocab_bos(llama.vocab) == BOS
        assert llama_cpp.llama_vocab_eos(llama.vocab) == EOS
        assert llama_cpp.llama_vocab_pad(llama.vocab) == PAD
        assert llama_cpp.llama_vocab_is_eog(llama.vocab, IM_END)
        assert llama_cpp.llama_vocab_get_attr(llama.vocab, UNK) & llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
    with opened(tiny("llama", tokenizer=tokenizer, add_bos=False)) as llama:
        assert llama.tokenize("", add_special=True) == []


def test_spm_without_space_prefix(tiny: TinyModel) -> None:
    with opened(tiny("llama", tokenizer="spm", add_space_prefix=False)) as llama:
        assert llama.text(llama.tokenize("the")) == "the"


def test_context_length_and_chat_template(tiny: TinyModel) -> None:
    with opened(tiny("qwen2", n_ctx=128)) as llama:
        assert llama_cpp.llama_model_n_ctx_train(llama.model) == 128
        assert llama_cpp.llama_model_chat_template(llama.model, None) == CHATML.encode()
    with opened(tiny("qwen2", chat_template=None)) as llama:
        assert llama_cpp.llama_model_chat_template(llama.model, None) is None


@pytest.mark.parametrize(
    "settings", [{}, {"n_kv_head": 4, "seed": 3}, {"head_dim": 32, "n_kv_head": 1, "rope_base": 500000.0}]
)
def test_reference_computes_full_prefill(settings: dict[str, float], tiny: TinyModel) -> None:
    path = tiny("llama", **settings)
    tokens = some_tokens(60)
    with opened(path) as llama:
        expected = llama.decode(tokens, 0)
    assert_close(ReferenceLlama(path).evaluate(tokens, range(60), causal(60)), expected)


def test_reference_computes_positions_beyond_the_first(tiny: TinyModel) -> None:
    path = tiny("llama")
    tokens = some_tokens(30)
    with opened(path) as llama:
        expected = llama.decode(tokens, 3000)
    assert_close(ReferenceLlama(path).evaluate(tokens, range(3000, 3030), causal(30)), expected)


def test_reference_computes_removed_and_moved_entries(tiny: TinyModel) -> None:
    path = tiny("llama")
    first, second = some_tokens(30), some_tokens(12, seed=1)
    with opened(path) as llama:
        llama.decode(first, 0)
        llama_cpp.llama_memory_seq_rm(llama.memory, 0, 8, 12)
        llama_cpp.llama_memory_seq_add(llama.memory, 0, 20, -1, 9)
        expected = llama.decode(second, 39)
    reference = ReferenceLlama(path)
    state = reference.kv(first, range(30), causal(30))
    cache = KV.concat([state[:8], state[12:]])
    logits, _ = reference.forward(
        second,
        range(39, 51),
        cache=cache,
        cache_positions=[*range(8), *range(12, 20), *range(29, 39)],
        visible=causal(12, before=len(cache)),
    )
    assert_close(logits, expected)


def test_reference_computes_slices_evaluated_separately(tiny: TinyModel) -> None:
    """The modular reuse itself: two slices with no context, the second moved, and fresh tokens after both."""
    path = tiny("llama")
    one, two, fresh = some_tokens(16), some_tokens(20, seed=1), some_tokens(10, seed=2)
    with opened(path) as llama:
        llama.decode(one, 0, 1)
        llama.decode(two, 0, 2)
        llama_cpp.llama_memory_seq_add(llama.memory, 2, 0, -1, 16)
        for sequence in (1, 2):
            llama_cpp.llama_memory_seq_cp(llama.memory, sequence, 0, -1, -1)
        expected = llama.decode(fresh, 36, 0)
        full = llama.decode([*one, *two, *fresh], 0, 3)[-10:]
    reference = ReferenceLlama(path)
    cache = KV.concat([reference.kv(one, range(16), causal(16)), reference.kv(two, range(20), causal(20))])
    logits, _ = reference.forward(
        fresh, range(36, 46), cache=cache, cache_positions=range(36), visible=causal(10, before=36)
    )
    assert_close(logits, expected)
    # The same as one evaluation under a mask, in which the second slice does not attend to the first.
    visible = causal(46)
    visible[16:36, :16] = False
    assert_close(reference.evaluate([*one, *two, *fresh], range(46), visible)[-10:], logits)
    # And it is not what full prefill gives, or the checks above would show nothing.
    assert np.abs(full - expected).max() > 100 * TOLERANCE


def test_reference_refuses_a_token_that_does_not_attend_to_itself(tiny: TinyModel) -> None:
    reference = ReferenceLlama(tiny("llama"))
    with pytest.raises(ValueError, match="see itself"):
        reference.evaluate([BYTES, BYTES], [0, 1], [[True, False], [True, False]])
    with pytest.raises(ValueError, match="wrong shape"):
        reference.evaluate([BYTES, BYTES], [0, 1, 2], causal(2))


def test_tiny_models_are_written_once(tiny: TinyModel) -> None:
    assert tiny("llama", seed=5) == tiny("llama", seed=5) != tiny("llama", seed=6)


def test_the_store_is_empty_and_not_the_users(store_home: Path) -> None:
    assert os.environ["CPUCACHE_HOME"] == str(store_home)
    assert list(store_home.iterdir()) == []


def test_the_network_is_out_of_reach_and_the_loopback_is_not() -> None:
    for method in ("connect", "connect_ex"):
        with socket.socket() as outside, pytest.raises(AssertionError, match=r"192\.0\.2\.1:80"):
            outside.settimeout(1)
            getattr(outside, method)(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()

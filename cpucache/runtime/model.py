"""A GGUF model: vocabulary, metadata, and the weights that llama.cpp contexts use."""

from __future__ import annotations

import ctypes
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cpucache.errors import ModelError
from cpucache.runtime import llama
from cpucache.runtime.hardware import gpu_layers
from cpucache.runtime.llama import api

Tokens = npt.NDArray[np.int32]

_VOCAB_SPM = 1  # LLAMA_VOCAB_TYPE_SPM (llama.h)
_ROPE_NONE = -1  # LLAMA_ROPE_TYPE_NONE
# Architectures that bias attention by distance (ALiBi) although their metadata does not say so.
_ALIBI = frozenset({"bloom", "refact"})


class Model:
    """Weights and vocabulary of one GGUF file.

    ``gpu_layers_`` is ``"auto"`` (all layers, if this build of llama.cpp can offload) or a number. ``vocab_only`` loads
    no weights: it takes milliseconds and suffices to lay out schemas.

    Raises ``ModelError`` if llama.cpp refuses the file.
    """

    def __init__(self, path: Path | str, *, gpu_layers_: int | str = "auto", vocab_only: bool = False) -> None:
        llama.start()
        self.path = Path(path)
        self.gpu_layers = gpu_layers(gpu_layers_)
        self.vocab_only = vocab_only
        params = api.llama_model_default_params()
        params.n_gpu_layers = self.gpu_layers
        params.vocab_only = vocab_only
        llama.last_errors(clear=True)
        self._model = api.llama_model_load_from_file(str(self.path).encode(), params)
        if not self._model:
            raise ModelError(
                f"{self.path}: llama.cpp can't load this model: {llama.last_errors() or 'no reason given'}"
            )

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Frees the weights. Contexts of the model must be closed first."""
        if self._model:
            api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """llama.cpp's pointer, for ``Context``."""
        if not self._model:
            raise ModelError(f"{self.path}: the model has been closed")
        return self._model

    @property
    def vocab(self) -> Any:
        """llama.cpp's pointer to the vocabulary."""
        return api.llama_model_get_vocab(self.handle)

    # -- facts -------------------------------------------------------------------------------------------------------
    def meta(self, key: str) -> str | None:
        """Scalar of the GGUF's metadata as text; ``None`` if the key is missing."""
        name = key.encode()
        size = api.llama_model_meta_val_str(self.handle, name, ctypes.create_string_buffer(1), 1)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        api.llama_model_meta_val_str(self.handle, name, buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    @cached_property
    def architecture(self) -> str:
        return self.meta("general.architecture") or "unknown"

    @cached_property
    def name(self) -> str:
        """Name in the metadata, else the file's name without suffix."""
        return self.meta("general.name") or self.path.stem

    @cached_property
    def n_ctx_train(self) -> int:
        """Context length that the model was trained on, in tokens."""
        # From the metadata: llama_model_n_ctx_train returns 0 if only the vocabulary is loaded.
        return int(self.meta(f"{self.architecture}.context_length") or api.llama_model_n_ctx_train(self.handle))

    @cached_property
    def n_vocab(self) -> int:
        return int(api.llama_vocab_n_tokens(self.vocab))

    @cached_property
    def n_layers(self) -> int:
        return int(api.llama_model_n_layer(self.handle))

    @cached_property
    def head_size(self) -> int:
        """Size of one attention head's key, in floats."""
        named = self.meta(f"{self.architecture}.attention.key_length")
        heads = max(1, int(api.llama_model_n_head(self.handle)))
        return int(named) if named else int(api.llama_model_n_embd(self.handle)) // heads

    @cached_property
    def window(self) -> int:
        """Sliding window of the layers that have one, in tokens; 0 if every layer attends to all tokens."""
        return int(api.llama_model_n_swa(self.handle))

    @cached_property
    def recurrent(self) -> bool:
        """Whether the model is recurrent or hybrid: slices cannot be spliced at other positions."""
        return bool(api.llama_model_is_recurrent(self.handle) or api.llama_model_is_hybrid(self.handle))

    @cached_property
    def rotary(self) -> bool:
        """Whether keys are rotated by their position (RoPE)."""
        return int(api.llama_model_rope_type(self.handle)) != _ROPE_NONE

    @cached_property
    def relative(self) -> bool:
        """Whether attention depends only on the distance between tokens (RoPE, ALiBi), so that states can be moved."""
        if self.rotary:
            return True
        alibi = float(self.meta(f"{self.architecture}.attention.max_alibi_bias") or 0)
        return alibi > 0 or self.architecture in _ALIBI

    @cached_property
    def chat_template(self) -> str | None:
        """Jinja source of the chat template in the file; ``None`` if it has none."""
        text = api.llama_model_chat_template(self.handle, None)
        return text.decode("utf-8", "replace") if text else None

    # -- vocabulary --------------------------------------------------------------------------------------------------
    def tokenize(self, text: str, *, special: bool = False) -> Tokens:
        """Token ids of ``text`` as part of a longer text: no tokens are added before or after it.

        With ``special=True`` (for template text), control tokens such as ``<|im_start|>`` are recognised. Otherwise
        they are plain characters, so that a document cannot forge a turn.
        """
        if not text:
            return np.empty(0, np.int32)
        if not self._prefixes_space:
            return self._tokenize(text, special)
        # A SentencePiece vocabulary adds a space before the first word of a text, but not after a line break,
        # and a line break never merges with the text after it.
        prefix = self._tokenize("\n", False)
        return self._tokenize("\n" + text, special)[len(prefix) :]

    def _tokenize(self, text: str, special: bool) -> Tokens:
        data = text.encode("utf-8", "replace")
        out = np.empty(len(data) + 8, np.int32)
        count = api.llama_tokenize(
            self.vocab, data, len(data), out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(out), False, special
        )
        if count < 0:
            raise ModelError(f"{self.path}: llama.cpp can't tokenize this text ({len(data)} bytes)")
        tokens: Tokens = out[:count].copy()
        return tokens

    @cached_property
    def _prefixes_space(self) -> bool:
        if int(api.llama_vocab_type(self.vocab)) != _VOCAB_SPM:
            return False
        return (self.meta("tokenizer.ggml.add_space_prefix") or "true") == "true"

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of a token, which may be only part of a character. Control tokens are empty unless ``special``."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = api.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def text(self, tokens: Tokens | list[int], *, special: bool = False) -> str:
        """Text of ``tokens``. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(int(token), special=special) for token in tokens).decode("utf-8", "replace")

    @cached_property
    def bos(self) -> int | None:
        """Id of the token that begins every text; ``None`` if the model uses none."""
        token = int(api.llama_vocab_bos(self.vocab))
        return token if token >= 0 and api.llama_vocab_get_add_bos(self.vocab) else None

    def special_text(self, name: str) -> str:
        """Text of the token called ``name`` (``bos`` or ``eos``), as chat templates write it."""
        token = int({"bos": api.llama_vocab_bos, "eos": api.llama_vocab_eos}[name](self.vocab))
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def ends_generation(self, token: int) -> bool:
        """Whether the token ends the model's answer (``llama_vocab_is_eog``)."""
        return bool(api.llama_vocab_is_eog(self.vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether a token is a control token, which stands for no text (``llama_vocab_is_control``)."""
        return bool(api.llama_vocab_is_control(self.vocab, token))

    @cached_property
    def filler(self) -> int:
        """Id of the token that pads a parameter while its schema is encoded: unknown, padding or end of text."""
        unknown = self.meta("tokenizer.ggml.unknown_token_id")
        candidates = (
            int(unknown) if unknown else -1,
            api.llama_vocab_pad(self.vocab),
            api.llama_vocab_eos(self.vocab),
        )
        return next((int(token) for token in candidates if int(token) >= 0), 0)

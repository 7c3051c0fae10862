"""The layer over llama.cpp: tokens and their text, and the facts of a model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.errors import CpucacheError, ModelError
from cpucache.runtime import Context, Model, Run
from tests.support.tiny import BOS, BYTES, CHATML, EOS, IM_END, IM_START, PAD, UNK
from tests.support.tries import tries

TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Iterator[Model]:
    with Model(tiny("llama", n_layer=2)) as opened:
        yield opened


@pytest.fixture(scope="module", params=["bpe", "spm", "spm without space"])
def vocabulary(tiny: TinyModel, request: pytest.FixtureRequest) -> Iterator[Model]:
    tokenizer, _, bare = request.param.partition(" ")
    path = tiny("llama", tokenizer=tokenizer, add_space_prefix=not bare, add_bos=True)
    with Model(path, vocab_only=True) as opened:
        yield opened


# ---- tokens ----------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from("the ring\n\t.0\u00e9\u4f60\U0001f600") | st.characters(exclude_categories=["Cs"]))


@tries(150)
@given(TEXTS.filter(lambda text: "\u2581" not in text))
def check_round_trip(vocabulary: Model, text: str) -> None:
    tokens = vocabulary.tokenize(text)
    assert b"".join(vocabulary.piece(token, special=True) for token in tokens.tolist()) == text.encode()
    assert vocabulary.text(tokens) == text
    assert tokens.dtype == np.int32


def test_the_pieces_of_a_text_are_the_text(vocabulary: Model) -> None:
    check_round_trip(vocabulary)


@pytest.mark.parametrize("text", ["the other", " the other", "\nthe", "\n\n the", " ", "\n", "e"])
def test_nothing_is_put_before_a_piece_of_text(vocabulary: Model, text: str) -> None:
    assert vocabulary.text(vocabulary.tokenize(text)) == text
    assert BOS not in vocabulary.tokenize(text, special=True)


def test_text_is_tokenized_and_not_spelled(vocabulary: Model) -> None:
    assert len(vocabulary.tokenize(" the")) == 1
    assert len(vocabulary.tokenize("")) == 0


def test_control_tokens_are_read_in_template_text_only(vocabulary: Model) -> None:
    text = "<|im_start|>the<|im_end|>\n"
    control = vocabulary.tokenize(text, special=True).tolist()
    assert (control[0], control.count(IM_END)) == (IM_START, 1)
    plain = vocabulary.tokenize(text)
    assert not {IM_START, IM_END, BOS, EOS, PAD} & set(plain.tolist())
    assert vocabulary.text(plain) == text
    # Control tokens are no text unless asked for.
    assert vocabulary.piece(IM_END) == b""
    assert vocabulary.piece(IM_END, special=True) == b"<|im_end|>"
    assert vocabulary.text([BYTES + ord("a"), IM_END], special=True) == "a<|im_end|>"


def test_bytes_that_are_no_text_become_replacements(vocabulary: Model) -> None:
    assert vocabulary.piece(BYTES + 0xE4) == b"\xe4"
    assert vocabulary.text([BYTES + 0xE4, BYTES + ord("a")]) == "\ufffda"
    assert vocabulary.text(vocabulary.tokenize("a\ud800b")) == "a?b"


def test_facts_of_a_vocabulary(vocabulary: Model, tiny: TinyModel) -> None:
    assert (vocabulary.bos, vocabulary.filler) == (BOS, UNK)
    assert (vocabulary.special_text("bos"), vocabulary.special_text("eos")) == ("<s>", "</s>")
    assert [vocabulary.ends_generation(token) for token in (EOS, IM_END, IM_START, BYTES)] == [True, True, False, False]
    assert vocabulary.chat_template == CHATML
    assert vocabulary.n_vocab > BYTES + 256
    with Model(tiny("llama", chat_template=None), vocab_only=True) as without:
        assert without.chat_template is None
        assert without.bos is None
        assert without.special_text("bos") == "<s>"


# ---- models ----------------------------------------------------------------------------------------------------------


def test_facts_of_a_model(model: Model, tiny: TinyModel) -> None:
    assert (model.architecture, model.name, model.n_layers, model.head_size) == ("llama", "tiny-llama-0", 2, 64)
    assert model.meta("no.such.key") is None
    assert (model.recurrent, model.relative, model.window) == (False, True, 0)
    with Model(tiny("gemma3", window=16)) as gemma:
        assert (gemma.window, gemma.relative) == (16, True)
    with Model(tiny("mpt")) as mpt:
        assert mpt.relative
    with Model(tiny("mamba")) as mamba:
        assert mamba.recurrent


def test_the_trained_context_is_known_without_the_weights(tiny: TinyModel) -> None:
    for vocab_only in (False, True):
        with Model(tiny("llama", n_ctx=300), vocab_only=vocab_only) as model:
            assert model.n_ctx_train == 300


@pytest.mark.parametrize("content", [None, b"", b"no model", b"GGUF" + bytes(50)])
def test_what_is_no_model_is_refused_with_its_path(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.gguf: llama\.cpp can't load this model: .+") as caught:
        Model(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_whose_text_cannot_be_cut_is_refused(tiny: TinyModel) -> None:
    """llama.cpp would end the process as soon as a slice is saved."""
    path = tiny("deepseek4")
    with Model(path, vocab_only=True) as model, pytest.raises(ModelError, match=f"{path.name}: .* deepseek4 model"):
        Context(model, n_ctx=64, n_threads=1)


def test_what_has_been_closed_says_so(tiny: TinyModel) -> None:
    model = Model(tiny("llama", n_layer=1))
    context = Context(model, n_ctx=64, n_threads=1)
    context.close()
    context.close()
    with pytest.raises(CpucacheError, match="the context has been closed"):
        context.decode([Run(0, 0, np.array([BYTES], np.int32))])
    with pytest.raises(CpucacheError, match="the context has been closed"):
        context.clear()
    model.close()
    model.close()
    for use in (lambda: model.tokenize("a"), lambda: model.piece(1), lambda: Context(model, n_ctx=64)):
        with pytest.raises(ModelError, match="the model has been closed"):
            use()


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
    ids=["default", "own count", "own policy"],
)
def test_waiting_threads_spin_for_a_short_time(given: dict[str, str], expected: str) -> None:
    """Read where llama.cpp's library is about to be loaded, which loads libgomp, which reads it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
    code = (
        "import os, sys\n"
        "def hook(event, args):\n"
        "    if event == 'ctypes.dlopen' and 'libllama' in str(args[0]):\n"
        "        print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.addaudithook(hook)\n"
        "import cpucache.runtime\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[:1] == [expected]

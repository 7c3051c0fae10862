"""The snippets of the documentation run as they stand there: Python on SmolLM2, and the whole tutorial."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import PATIENCE
from tests.support.pages import DOCS, PAGES, ROOT, snippets
from tests.support.serving import serving

SERVED = DOCS / "clients.md"
"""The page whose snippets talk to a server."""
TUTORIAL = DOCS / "tutorial.md"
PYTHON = [page for page in PAGES if snippets(page, "python") and page not in (SERVED, TUTORIAL)]
PRINTED = {
    "README.md": r"\w",
    "python.md": r"[1-9]\d* of \d+ tokens from cache\n(?s:.*)tokens evaluated ahead\n[1-9]\d* of",
    "embedding.md": r"slices imported: [1-9]",
    "format.md": r"cpucache-slice-2 \[\d+\] \[\d+\]",
    "pml.md": r"did you mean <module>\?(?s:.*)\ntrip\n",
}
"""What the snippets of a page print."""


@pytest.fixture
def folder(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the examples and the models of the checkout."""
    (tmp_path / "schemas").symlink_to(ROOT / "schemas")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPUCACHE_MODELS", str(smollm2.parent))
    return tmp_path


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets(page, "python")):
        # In a file: prompt functions are compiled from their source.
        file = folder / f"snippet_{number}.py"
        file.write_text(snippet.text)
        exec(compile(snippet.text, str(file), "exec"), names)

    assert re.search(PRINTED[page.name], capsys.readouterr().out)


def test_clients(folder: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    with serving(smollm2, folder, n_ctx=4096) as served:
        for snippet in snippets(SERVED, "python"):
            assert "http://127.0.0.1:8080" in snippet.text or "client" in names
            exec(compile(snippet.text.replace("http://127.0.0.1:8080", served.url), str(snippet), "exec"), names)

    assert len(re.findall(r"^\d+ tokens from cache$", capsys.readouterr().out, re.MULTILINE)) == 2


def test_tutorial(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file and every command of the tutorial, in order, as a reader would enter them."""
    command = folder / "bin" / "cpucache"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cpucache.cli.main "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    said = ""
    for snippet in snippets(TUTORIAL):
        if snippet.title:
            file = folder / snippet.title
            file.parent.mkdir(exist_ok=True)
            file.write_text(snippet.text)
        elif snippet.language == "python":
            exec(compile(snippet.text, str(snippet), "exec"), {})
        else:
            assert snippet.language == "sh"
            done = subprocess.run(
                ["sh", "-e", "-c", snippet.text],
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert done.returncode == 0, f"{snippet}: {done.stderr}"
            said += f"$ {snippet.text}{done.stdout}{done.stderr}"

    # The first prompt finds everything encoded; the second plan is exact.
    assert re.search(r"\d+ of \d+ prompt tokens from cache \(.*related", said), said
    plans = re.findall(r"^(\d+) tokens: (.*) from slices", said, re.MULTILINE)
    assert [("related" in each, "exact" in each) for _, each in plans] == [(True, True), (False, True)], said
    assert len(re.findall(r"tokens from cache", capsys.readouterr().out)) == 2

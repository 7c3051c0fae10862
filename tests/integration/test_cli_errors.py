"""What goes wrong is said in one line on standard error, with the exit status that scripts rely on."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpucache.cli.main import main
from tests.support.command import PATIENCE, PROMPT, SCHEMA, cpucache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: good files, bad ones, and models as ``llama.gguf``, ``odd.gguf`` and ``mamba.gguf``."""
    for name, text in {
        "schema.xml": SCHEMA,
        "prompt.xml": PROMPT,
        "module.xml": '<prompt schema="shop"><ours opens="ten"/></prompt>',
        "both.xml": '<prompt schema="shop">\n<summer/>\n<winter/></prompt>',
        "argument.xml": '<prompt schema="shop">\n<hours opens="half past ten in the morning"/></prompt>',
        "missing.xml": '<prompt schema="shop">\n<hours/></prompt>',
        "stranger.xml": '<prompt schema="shoe"><hours opens="ten"/></prompt>',
        "long.xml": f'<prompt schema="shop"><summer/>{"and so on " * 200}</prompt>',
        "open.xml": '<schema name="s">\n<module name="m">text</schema>',
        "entity.xml": '<!DOCTYPE s [<!ENTITY e "x">]>\n<schema name="s">&e;</schema>',
        "src.xml": '<schema name="s">\n\n<module name="m" src="../secret.txt"/></schema>',
        "empty.xml": "",
        "no.gguf": "GGU and not F",
        "cut.gguf": "GGUF\3\0\0\0",
        "file": "",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge.xml").open("wb") as huge:
        huge.truncate(2 << 30)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def models(folder: Path, tiny: Callable[..., Path]) -> None:
    for name, path in {
        "llama.gguf": tiny("llama"),
        "odd.gguf": tiny("llama", head_dim=32),
        "mamba.gguf": tiny("mamba"),
    }.items():
        (folder / name).symlink_to(path)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """``main`` is called once in the life of a process, and sets the log up for it."""
    log = logging.getLogger("cpucache")
    before = list(log.handlers)
    yield
    log.handlers[:] = before


def failed(
    arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stdin: str = ""
) -> tuple[int, str]:
    """Status and message of a command that fails, run here: nothing on standard output, one line on the other."""
    monkeypatch.setattr(sys, "argv", ["cpucache", *arguments.split()])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert out == ""
    line, end, rest = err.partition("\n")
    assert line.startswith("cpucache: ")
    assert (end, rest) == ("\n", "")
    assert isinstance(ended.value.code, int)
    return ended.value.code, line.removeprefix("cpucache: ")


RUN = "run prompt.xml -s schema.xml --threads 1"
ON = "-s schema.xml -m llama.gguf --threads 1"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        # Models
        (f"{RUN} -m smollm2-135m-instuct", ["unknown model", "did you mean 'smollm2-135m-instruct'?"]),
        (f"{RUN} -m nowhere/model.gguf", ["no such model file: nowhere/model.gguf"]),
        (f"{RUN} -m no.gguf", ["no.gguf", "not a GGUF"]),
        (f"{RUN} -m cut.gguf", ["cut.gguf"]),
        (f"{RUN} -m folder", ["folder", "directory"]),
        (f"{RUN} -m odd.gguf --kv-type q8_0", ["odd.gguf", "32", "q8_0", "f16"]),
        (f"{RUN} -m mamba.gguf", ["mamba", "--no-cache"]),
        ("schema show schema.xml -m nothing-like-it", ["unknown model 'nothing-like-it'", "cpucache models list"]),
        ("schema check schema.xml -m no.gguf", ["not a GGUF"]),
        ("models path tinylama-1.1b-chat", ["did you mean 'tinyllama-1.1b-chat'?"]),
        ("bench ttft -m nowhere/model.gguf", ["no such model file"]),
        ("demo -m nowhere/model.gguf", ["no such model file"]),
        # Files
        (f"run nothing.xml {ON}", ["nothing.xml", "No such file"]),
        (f"run folder {ON}", ["folder", "directory"]),
        ("run prompt.xml -s nothing.xml -m llama.gguf", ["nothing.xml", "No such file"]),
        ("run prompt.xml -s folder -m llama.gguf", ["folder", "directory"]),
        ("encode schema.xml nothing.xml -m llama.gguf", ["nothing.xml", "No such file"]),
        ("schema show folder -m llama.gguf", ["folder", "directory"]),
        ("schema check empty.xml", ["empty.xml:1: ", "<schema>"]),
        # PML
        ("schema check open.xml", ["open.xml:2:", "<module>"]),
        ("schema check entity.xml", ["entity.xml:1: "]),
        ("schema check src.xml", ["src.xml:3: ", "../secret.txt"]),
        ("schema check prompt.xml", ["prompt.xml:1: ", "<schema>", "<prompt>"]),
        (f"run schema.xml {ON}", ["schema.xml:2: ", "<prompt>", "<schema>"]),
        (f"run module.xml {ON}", ["module.xml:1: ", "'hours'"]),
        (f"run both.xml {ON}", ["both.xml:3: ", "summer", "winter"]),
        (f"run argument.xml {ON}", ["argument.xml:2: ", "'opens'", " 8 "]),
        (f"run missing.xml {ON}", ["missing.xml:2: ", "'opens'"]),
        (f"run stranger.xml {ON}", ["stranger.xml:1: ", "'shoe'", "schema.xml is 'shop'", "did you mean 'shop'?"]),
        (f"fidelity stranger.xml {ON}", ["stranger.xml:1: ", "'shoe'", "schema.xml is 'shop'"]),
        ("run module.xml -s schema.xml -m nowhere/model.gguf", ["module.xml:1: ", "'hours'"]),
        ("chat --prompt stranger.xml -s schema.xml -m nowhere/model.gguf", ["stranger.xml:1: ", "'shoe'"]),
        ("schema check fifo", ["fifo: ", "not a regular file"]),
        ("schema check huge.xml", ["huge.xml: ", "more than the maximum of 16,777,216 bytes", "src files"]),
        ("schema check schema.xml - - -p prompt.xml", ["only one schema or prompt", "standard input (-)"]),
        (f"run - {ON}", ["<stdin>:1: ", "<prompt>"]),
        ("run - -s - -m llama.gguf", ["prompt and schema can't both be standard input"]),
        # Sizes
        (f"run long.xml {ON} --ctx 300", ["long.xml", "context", "--ctx"]),
        (f"{RUN} -m llama.gguf --ram plenty", ["'plenty'", "2GiB"]),
        # Options
        (f"{RUN} --tempo 1", ["no such option", "--temp", "`cpucache run --help`"]),
        (f"{RUN} --no-cache --compare", ["--no-cache and --compare", "`cpucache run --help`"]),
        (f"{RUN} --temp -1", ["'--temp'", "x>=0"]),
        (f"{RUN} --top-p 2", ["'--top-p'"]),
        (f"{RUN} -n 0", ["'--max-tokens'", "x>=1"]),
        (f"{RUN} --gpu-layers most", ["'most'", "auto"]),
        (f"{RUN} --kv-type f64", ["'f64'", "'q8_0'"]),
        ("run prompt.xml", ["missing option", "--schema"]),
        ("run", ["missing argument", "PROMPT"]),
        ("run one.xml two.xml -s schema.xml", ["two.xml"]),
        ("encode", ["SCHEMA", "`cpucache encode --help`"]),
        ("schema check", ["FILE"]),
        ("bench ttft --tokens many", ["'many'"]),
        ("rum prompt.xml", ["no command 'rum'", "did you mean 'run'?", "`cpucache --help`"]),
        ("schema shwo schema.xml", ["'shwo'", "`cpucache schema --help`"]),
        ("--verbos", ["--verbos"]),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: str, parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, message = failed(arguments, capsys, monkeypatch)

    assert status == 2
    for part in parts:
        assert part in message


def test_a_store_that_is_no_folder_stops_no_answer_but_encode(folder: Path) -> None:
    answered = cpucache("run", "prompt.xml", *ON.split(), "-n", "2", CPUCACHE_HOME=str(folder / "file"))
    encoded = cpucache("encode", "schema.xml", "-m", "llama.gguf", CPUCACHE_HOME=str(folder / "file"))

    assert answered.status == 0
    warning, figures = answered.err.splitlines()
    assert warning.startswith("cpucache: warning: ")
    assert str(folder / "file") in warning
    assert "encoded" in figures
    assert "saved" not in figures
    assert (encoded.status, encoded.out) == (1, "")
    assert [line.split(" ")[0] for line in encoded.err.splitlines()] == ["cpucache:"] * 2
    assert "can't be saved" in encoded.err


def test_info_copes_with_a_store_that_is_no_folder(folder: Path) -> None:
    assert cpucache("info", CPUCACHE_HOME=str(folder / "file" / "below")).status == 0


def test_a_model_that_was_not_fetched_is_told_how_to(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPUCACHE_MODELS", str(folder / "weights"))

    status, message = failed(RUN, capsys, monkeypatch)

    assert status == 2
    assert "cpucache models pull smollm2-135m-instruct" in message


def test_statuses_and_streams_of_the_real_command() -> None:
    fine = cpucache("schema", "check", "schema.xml")
    assert (fine.status, fine.out, fine.err) == (0, "schema.xml: schema 'shop' is fine\n", "")
    bad = cpucache("schema", "check", "open.xml")
    assert (bad.status, bad.out, bad.err.count("\n")) == (2, "", 1)
    usage = cpucache("encode", "--bogus")
    assert (usage.status, usage.out) == (2, "")
    assert usage.err.startswith("cpucache: no such option")


def test_a_group_without_a_command_shows_its_help() -> None:
    for group in ([], ["schema"], ["models"], ["bench"]):
        done = cpucache(*group)
        assert "Commands:" in done.out + done.err
        assert "cpucache: " not in done.err


@pytest.mark.parametrize("command", ["run prompt.xml -s schema.xml -m llama.gguf", "info", "models list --json"])
def test_a_reader_that_has_gone_is_not_complained_about(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cpucache.cli.main", *command.split()],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            timeout=PATIENCE,
        )
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_can_not_be_written_is_a_failure() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cpucache.cli.main", "schema", "check", "schema.xml"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )

    assert done.returncode != 0
    assert done.stderr.startswith(b"cpucache: ")
    assert b"Traceback" not in done.stderr


def test_characters_that_a_terminal_lacks_become_question_marks() -> None:
    done = cpucache("schema", "show", "schema.xml", "-m", "llama.gguf", PYTHONIOENCODING="ascii")

    assert done.status == 0, done.err
    assert "hours" in done.out
    assert "?" in done.out

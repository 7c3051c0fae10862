"""Commands that inform, the demo, and that none but ``models pull`` needs a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import cpucache as package
from cpucache.cli.main import cli
from cpucache.models import default_model, known_models
from tests.support.command import cpucache, invoke

pytestmark = pytest.mark.usefixtures("folder")


def test_info_tells_what_is_used(tmp_path: Path) -> None:
    store = tmp_path / "not" / "there"

    shown = cpucache("info", CPUCACHE_HOME=str(store), COLUMNS="200")
    facts = json.loads(cpucache("info", "--json", CPUCACHE_HOME=str(store)).out)

    assert shown.status == 0
    assert (facts["cpucache"], facts["store"], facts["store_bytes"]) == (package.__version__, str(store), 0)
    assert 0 < facts["threads"] <= facts["physical_cores"] <= facts["logical_cores"]
    assert 0 < facts["memory_available"] <= facts["memory_total"]
    assert facts["store_free"] > 0
    for text in (facts["cpucache"], facts["llama_cpp"], facts["cpu"], str(store), facts["models"], "GPU", "flash"):
        assert text in shown.out
    assert not store.parent.exists(), "info must not create folders"


def test_info_counts_the_store(model: Path, store_home: Path) -> None:
    invoke("encode", "schema.xml", "-m", model, "--threads", "1")

    facts = json.loads(invoke("info", "--json"))

    assert facts["store_bytes"] > sum(file.stat().st_size for file in (store_home / "slices").rglob("*.safetensors"))


def test_models_list_names_the_catalogue() -> None:
    rows = json.loads(invoke("models", "list", "--json"))
    shown = cpucache("models", "list", COLUMNS="100").out

    assert [row["name"] for row in rows if row["licence"]] == list(known_models())
    assert [row["name"] for row in rows if row["default"]] == [default_model()]
    assert all(name in shown for name in known_models())
    assert f"{default_model()} *" in shown


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every command, also of the groups."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_explains_the_command_and_each_of_its_options(path: tuple[str, ...]) -> None:
    shown = invoke(*path, "--help")

    assert shown.startswith(f"Usage: cli {' '.join(path)} ")
    context = click.Context(cli)
    command: click.Command | None = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.get_command(context, name)
    assert command
    assert command.help
    assert command.help.split()[0] in shown
    unexplained = [option.opts for option in command.params if isinstance(option, click.Option) and not option.help]
    assert not unexplained


def test_help_lists_every_command() -> None:
    done = cpucache("--help")

    assert (done.status, done.err) == (0, "")
    assert all(f"\n  {path[0]} " in done.out for path in commands())
    assert cpucache("--version").out.split()[-1] == package.__version__


def test_demo_answers_twice_and_compares(smollm2: Path) -> None:
    done = cpucache("demo", "-n", "4", COLUMNS="100")

    assert done.status == 0, done.err
    assert f"{smollm2.stem}, " in done.out
    assert "question: Create a main entry for the game." in done.out
    assert re.search(r"time to first token +\S+ m?s +\S+ m?s \(\S+ times faster\)", done.out)
    spliced = re.search(r"from cache +0 +([\d,]+)", done.out)
    assert spliced
    assert int(spliced[1].replace(",", "")) > 3000
    # The command that is suggested at the end works as it stands.
    suggested = re.search(r"cpucache (schema show .*)", done.out)
    assert suggested
    assert "storage.py" in invoke(*suggested[1].split())


# -- no network --------------------------------------------------------------------------------------------------------
def test_no_command_reaches_for_the_network(model: Path, tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"""
import socket

def refuse(*arguments, **settings):
    with open({str(attempts)!r}, "a") as log:
        print(arguments, file=log)
    raise OSError("no network here")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = refuse
"""
    )

    for command in (
        ("info",),
        ("models", "list"),
        ("schema", "check", "schema.xml", "-m", model),
        ("encode", "schema.xml", "-m", model, "--threads", "1"),
        ("run", "prompt.xml", "-s", "schema.xml", "-m", model, "-n", "2", "--threads", "1"),
    ):
        done = cpucache(*command, PYTHONPATH=str(site))
        assert done.status == 0, done.err
        assert not attempts.exists(), f"{command}: {attempts.read_text()}"

    # What does reach for it would have been caught.
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment, capture_output=True).returncode
    assert attempts.read_text()

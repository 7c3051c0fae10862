"""Ctrl-C ends a command at once, and what it leaves can be built on."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

from cpucache.store.index import Index
from tests.support.command import PATIENCE, cpucache, slices, started, until


def words(count: int, seed: int) -> str:
    """Text of so many words."""
    return " ".join(random.Random(seed).choices(("rain", "and", "sun", "fell", "on", "the", "old", "house"), k=count))


def test_encode_goes_on_where_it_was_interrupted(smollm2: Path, store_home: Path, tmp_path: Path) -> None:
    # Encoded in this order: what is beside "second" and "inner" does not attend to them, so each needs an evaluation.
    schema = tmp_path / "schema.xml"
    schema.write_text(
        f"""<schema name="papers">{words(50, 0)}
        <module name="first">{words(200, 1)}<module name="inner">{words(200, 2)}</module></module>
        <module name="second">{words(800, 3)}</module>
        </schema>"""
    )
    command = ("encode", schema, "-m", smollm2, "--threads", "1")

    with started(*command) as encoding:
        until(lambda: any(store_home.rglob("*.safetensors")), encoding)
        # The slices of the first evaluation are being saved, and the next one begins.
        time.sleep(0.2)
        encoding.send_signal(signal.SIGINT)
        out, err = encoding.communicate(timeout=PATIENCE)

    assert encoding.returncode == 130
    assert out == ""
    assert err.split("\n") == [
        "the slices encoded so far are saved; the same command encodes the rest",
        # Where a terminal has shown "^C".
        "",
        "cpucache: interrupted",
        "",
    ]
    kept = slices(store_home)
    assert kept
    assert not [path for path in (store_home / "slices").rglob("*") if path.is_file() and path.suffix != ".safetensors"]

    done = cpucache(*command)
    assert done.status == 0, done.err
    everything = slices(store_home)
    assert done.out.startswith(f"papers: {len(everything) - len(kept)} slices, ")
    assert kept < everything
    assert "already" in cpucache(*command).out


def test_an_answer_that_is_interrupted_has_been_printed_so_far(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "s.xml").write_text('<schema name="s"><system>You tell long stories.</system></schema>')
    (tmp_path / "p.xml").write_text('<prompt schema="s"><user>Tell me a very long story about a fox.</user></prompt>')

    command = ("run", tmp_path / "p.xml", "-s", tmp_path / "s.xml", "-m", smollm2, "--threads", "1")
    with started(*command, "-n", "4000") as running:
        assert running.stdout
        begin = running.stdout.read(20)
        running.send_signal(signal.SIGINT)
        rest, err = running.communicate(timeout=PATIENCE)

    assert running.returncode == 130
    assert len(begin) == 20
    assert rest.endswith("\n")
    # The system text is there for the next time; the template's last token, and the message, are not.
    told, interrupted = err.split("\n", 1)
    assert interrupted == "\ncpucache: interrupted\n"
    kept = re.fullmatch(r"(\d+) of (\d+) prompt tokens are saved; the same command evaluates the rest", told)
    assert kept, err
    metrics = json.loads(cpucache(*command, "-n", "1", "--json").out)
    assert kept.groups() == (str(metrics["cached_tokens"]), str(metrics["prompt_tokens"]))


def test_reading_a_long_prompt_can_be_interrupted(smollm2: Path, store_home: Path, tmp_path: Path) -> None:
    (tmp_path / "s.xml").write_text('<schema name="s"><module name="m">A short one.</module></schema>')
    (tmp_path / "p.xml").write_text(f'<prompt schema="s"><m/>{words(6000, 0)}</prompt>')

    with started("run", tmp_path / "p.xml", "-s", tmp_path / "s.xml", "-m", smollm2, "--threads", "1") as running:
        # The slice has been encoded, and the rest is being evaluated; the slice goes to the disk when that is done.
        index = Index(store_home / "index.sqlite")
        until(lambda: index.totals()["bytes"] > 0, running)
        index.close()
        time.sleep(1)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE)

    assert (running.returncode, out) == (130, "")
    assert re.fullmatch(
        r"\d of 6,\d\d\d prompt tokens are saved; the same command evaluates the rest\n\ncpucache: interrupted\n",
        err,
    )


def test_where_nothing_is_kept_nothing_is_said(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("Tell me a very long story about a fox.")
    with started("run", tmp_path / "q.txt", "-m", smollm2, "-n", "4000", "--threads", "1", "--no-cache") as running:
        assert running.stdout
        running.stdout.read(20)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (130, "\ncpucache: interrupted\n")

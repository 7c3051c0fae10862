"""``cpucache fidelity``, and the options of ``run`` that say how exact a prompt is to be."""

from __future__ import annotations

import builtins
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpucache.engine import Engine
from cpucache.errors import InputError
from cpucache.pml import parse_schema
from tests.support.command import PROMPT, SCHEMA, cpucache, invoke, started

TRIALS = {"--recompute 0.1", "--recompute 0.2", "--fidelity high, or cpucache encode --refine"}
"""What is tried where nothing is recomputed."""


pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def command(tiny: Callable[..., Path]) -> tuple[str | Path, ...]:
    return ("fidelity", "prompt.xml", "-s", "schema.xml", "-m", tiny("llama"), "--threads", "1", "-n", "4")


def report(command: tuple[str | Path, ...], *more: str | Path, stdin: str | None = None) -> dict[str, Any]:
    """What ``--json`` prints."""
    parsed: dict[str, Any] = json.loads(invoke(*command, "--json", *more, stdin=stdin))
    return parsed


# ---- fidelity --------------------------------------------------------------------------------------------------------


def test_json_is_the_report(command: tuple[str | Path, ...], tiny: Callable[..., Path]) -> None:
    shown = report(command)

    with Engine(tiny("llama"), threads=1) as engine:
        engine.add_schema(parse_schema(SCHEMA))
        expected = engine.fidelity(PROMPT, max_tokens=4).as_dict()
    assert set(shown) == {"uncached", "cached", "tokens", "advice"}
    assert shown["uncached"]["text"] == expected["uncached"]["text"]
    for token, other in zip(shown["tokens"], expected["tokens"], strict=True):
        assert token["kl"] == pytest.approx(other["kl"], abs=1e-3)
        assert (token["text"], token["of"]) == (other["text"], other["of"])
    assert {trial["change"] for trial in shown["advice"]} == TRIALS
    assert set(shown["advice"][0]) == set(shown["cached"]) - {"text"} | {"change", "bytes"}


def test_the_tables_have_everything(command: tuple[str | Path, ...]) -> None:
    command = (*command, "--fidelity", "fast", "-n", "12")
    shown = cpucache(*command, COLUMNS="140")
    figures = report(command)

    assert (shown.status, shown.err) == (0, ""), "a bar is for terminals"
    assert f"the 12 tokens with the largest divergence, of {len(figures['tokens'])}" in shown.out
    worst = sorted(figures["tokens"], key=lambda token: -token["kl"])[:12]
    rows = re.findall(r'(\d+) +(".*?[^\\]") +(\d+\.\d{4}) +(━*) +(same|differs) +[+-]\d+\.\d{4}', shown.out)
    assert len(rows) == 12
    assert max(float(kl) for _, _, kl, _, _ in rows) == pytest.approx(worst[0]["kl"], abs=1e-3)
    assert max(rows, key=lambda row: float(row[2]))[3] == "━" * 16
    for of in ("prompt", "answer"):
        mean = re.search(rf"^  {of} +(\d+) +(\d+\.\d+) +\d+% +[+-]\d+\.\d+", shown.out, re.MULTILINE)
        assert mean is not None
        assert int(mean[1]) == sum(token["of"] == of for token in figures["tokens"])
        assert float(mean[2]) == pytest.approx(figures["cached"][f"kl_{of}"], abs=1e-3)
    assert re.search(r"without reuse +from slices", shown.out)
    assert re.search(r"first difference +at character \d+: \".+\" +at character \d+: \".+\"", shown.out)
    assert re.search(r"time to first token +\S+ [mµ]?s +\S+ [mµ]?s", shown.out)
    for trial in TRIALS:
        assert re.search(re.escape(trial) + r" +\d\.\d{4} → \d\.\d{4} +\d+% → \d+% +[+-]\S+ [mµ]?s", shown.out)
    assert re.search(r"encode --refine .*\+\d+\.\d kB", shown.out)
    last = shown.out.splitlines()[-1]
    wanted = r"Use (--recompute 0.[12]|--fidelity high, or cpucache encode --refine)"
    wanted += r": KL goes from \d\.\d+ to \d\.\d+, the first token comes .+\."
    assert re.fullmatch(wanted, last)


def test_more_is_tried_where_nothing_is_recomputed_and_nothing_where_all_is_exact(
    command: tuple[str | Path, ...], store_home: Path
) -> None:
    fast, high = (report(command, "--fidelity", level) for level in ("fast", "high"))

    assert {trial["change"] for trial in fast["advice"]} == TRIALS | {"--recompute 0.1"}
    exact = next(trial for trial in fast["advice"] if "high" in trial["change"])
    assert exact["kl_answer"] < 1e-4 < fast["cached"]["kl_answer"]
    assert exact["bytes"] > 0
    assert high["advice"] == []
    assert high["cached"]["kl_answer"] < 1e-4


def test_what_is_tried_does_not_stay(command: tuple[str | Path, ...], store_home: Path) -> None:
    report(command, "--no-advice")
    before = sorted(file.name for file in store_home.rglob("*.safetensors"))

    report(command)

    assert sorted(file.name for file in store_home.rglob("*.safetensors")) == before


def test_all_shows_every_token(command: tuple[str | Path, ...]) -> None:
    shown = invoke(*command, "--all", "--no-advice")

    assert len(re.findall(r" (same|differs) +[+-]", shown)) == len(report(command, "--no-advice")["tokens"])
    assert "with the largest divergence" not in shown


def test_without_advice_nothing_is_tried(command: tuple[str | Path, ...], store_home: Path) -> None:
    shown = invoke(*command, "--no-advice")

    assert "what was tried" not in shown
    assert shown.rstrip().splitlines()[-1].lstrip().startswith("time to first token")
    assert report(command, "--no-advice")["advice"] == []


def test_settings_are_those_of_the_prompt(command: tuple[str | Path, ...]) -> None:
    fast, default, balanced, whole, high = (
        report(command, "--no-advice", *more)["cached"]["kl_prompt"]
        for more in (("--recompute", "0"), (), ("--fidelity", "balanced"), ("--recompute", "1"), ("--fidelity", "high"))
    )

    assert balanced != default == pytest.approx(fast, abs=1e-3)
    assert whole < 1e-4 < fast
    assert high < 1e-4


def test_one_module_needs_nothing(command: tuple[str | Path, ...], folder: Path) -> None:
    (folder / "schema.xml").write_text('<schema name="s">Root. <module name="a">the only one</module></schema>')
    (folder / "prompt.xml").write_text('<prompt schema="s"><a/><user>What?</user></prompt>')

    shown = invoke(*command)

    assert re.search(r"first difference +none +none", shown)
    assert shown.endswith("Nothing needs to be done: the model predicts the same with and without reuse.\n")


def test_a_prompt_from_standard_input(command: tuple[str | Path, ...]) -> None:
    text = report(("fidelity", "-", *command[2:]), "--no-advice", stdin=PROMPT)["uncached"]["text"]

    assert text == report(command, "--no-advice")["uncached"]["text"]


def test_texts_are_shown_as_they_are_and_do_nothing(command: tuple[str | Path, ...], folder: Path) -> None:
    (folder / "prompt.xml").write_text(PROMPT.replace("What is", "[bold]\t[/] \\"))

    shown = invoke(*command, "--all", "--no-advice")

    assert '"["' in shown and '"\\t"' in shown and '"\\\\"' in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", shown)


def test_plot(command: tuple[str | Path, ...], folder: Path) -> None:
    invoke(*command, "--plot", "plot.svg")
    drawn = (folder / "plot.svg").read_text()
    invoke(*command, "--plot", "plot.png", "--no-advice")

    assert drawn.startswith("<?xml") and drawn.count("<!-- ") > 10
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    for name, message in (("plot.doc", "its suffix must be one of"), ("no/plot.png", "there is no folder")):
        with pytest.raises(InputError, match=message):
            invoke(*command, "--plot", name)


def test_a_plot_needs_the_extra(command: tuple[str | Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'cpucache\[bench\]'"):
        invoke(*command, "--plot", "plot.png")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recompute", "1.5"), "--recompute"),
        (("--fidelity", "best"), "--fidelity"),
        (("-n", "0"), "--max-tokens"),
    ],
)
def test_wrong_settings(more: tuple[str, ...], message: str, command: tuple[str | Path, ...]) -> None:
    done = cpucache(*command, *more)

    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_ctrl_c(command: tuple[str | Path, ...], folder: Path, store_home: Path, tiny: Callable[..., Path]) -> None:
    words = " ".join(f"number {number} and" for number in range(250))
    modules = "".join(f'<module name="m{number}">{number} {words}</module>' for number in range(4))
    (folder / "schema.xml").write_text(f'<schema name="s">{modules}</schema>')
    references = "".join(f"<m{number}/>" for number in range(2))
    (folder / "prompt.xml").write_text(f'<prompt schema="s">{references}What?</prompt>')
    with started(*command, "-m", tiny("llama", n_ctx=16384), "--ctx", "16384") as running:
        while running.poll() is None and not any(store_home.rglob("*.safetensors")):
            pass
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)

    assert (running.returncode, out) == (130, "")
    assert err.endswith("cpucache: interrupted\n")
    assert "Traceback" not in err


# ---- run -------------------------------------------------------------------------------------------------------------


def test_run_recomputes_what_it_is_told_to(command: tuple[str | Path, ...]) -> None:
    run = ("run", *command[1:], "--json")

    def fresh(*more: str) -> int:
        answer = json.loads(invoke(*run, *more))
        assert answer["fresh_tokens"] + answer["cached_tokens"] == answer["prompt_tokens"]
        return int(answer["fresh_tokens"])

    fresh()
    plain = fresh("--fidelity", "fast")
    tenth = fresh("--recompute", "0.1")
    assert fresh() == plain < tenth == fresh("--fidelity", "balanced") < fresh("--recompute", "0.9")
    # The second time, what the prompt brings between modules is a slice, too.
    assert fresh("--fidelity", "high") > plain > fresh("--fidelity", "high")


def test_compare_takes_them_too(command: tuple[str | Path, ...]) -> None:
    run = ("run", *command[1:], "--json")

    both = json.loads(invoke(*run, "--compare", "--fidelity", "high"))

    assert both["cached"]["text"] == both["uncached"]["text"]
    assert both["same"] is True
    assert both["cached"]["cached_tokens"] == both["cached"]["exact_tokens"] > 0 == both["uncached"]["cached_tokens"]


@pytest.mark.parametrize("more", [("--fidelity", "high"), ("--fidelity", "fast")])
def test_a_level_says_what_is_recomputed(more: tuple[str, ...], command: tuple[str | Path, ...]) -> None:
    done = cpucache("run", *command[1:], *more, "--recompute", "0.1")

    assert (done.status, done.out) == (2, "")
    assert done.err == (
        "cpucache: give a fidelity or a share to recompute, not both: a fidelity decides what is recomputed\n"
    )


@pytest.mark.parametrize("more", [("--recompute", "0"), ("--fidelity", "fast")])
def test_they_are_for_pml(more: tuple[str, ...], command: tuple[str | Path, ...], folder: Path) -> None:
    (folder / "question.txt").write_text("What is there?")

    done = cpucache("run", "question.txt", *command[4:], *more)

    assert (done.status, done.out) == (2, "")
    assert "--fidelity and --recompute need --schema or --reuse anywhere: other prompts are always exact" in done.err

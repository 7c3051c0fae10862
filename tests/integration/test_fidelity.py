"""``Engine.fidelity``: the distance between cached and uncached answers, and what would shrink it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.engine import Engine, Fidelity
from cpucache.engine.advice import FidelityReport, Trial
from cpucache.engine.fidelity import WATCHED, Distance, Truth, between, log_probabilities
from cpucache.errors import ContextFull, InputError, ModelError
from cpucache.pml import parse_schema
from cpucache.store import SliceInfo
from tests.support.sessions import engine, logits

Tiny = Callable[..., Path]

ASK = "<user>and where is it, and when?</user>"
MODULES = (
    "<module name='a'>the first of all the modules, it stands at the head </module>"
    "<module name='b'>here is another one that has a good deal of text </module>"
    "<module name='c'>and the end of it is this one, after the others.</module>"
)
INCLUDED = "<c/><a/><b/>"
HIGH = "--fidelity high, or cpucache encode --refine"


@pytest.fixture
def running(tiny: Tiny, tmp_path: Path) -> Iterator[Engine]:
    with engine(tiny("llama"), tmp_path) as opened:
        yield opened


def measured(running: Engine, content: str = INCLUDED, schema: str = MODULES, **settings: Any) -> FidelityReport:
    """The fidelity of a prompt on the inside of a schema, all of which has been encoded."""
    running.add_schema(parse_schema(f"<schema name='s'>Root. {schema}</schema>"))
    running.encode("s")
    return running.fidelity(f"<prompt schema='s'>{content}{ASK}</prompt>", **{"max_tokens": 6, **settings})


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_definitions() -> None:
    """Two rows over three words, by hand."""
    wanted = np.log(np.array([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]], np.float32)) + np.float32(3)
    found = np.log(np.array([[0.25, 0.5, 0.25], [0.7, 0.2, 0.1]], np.float32)) - np.float32(2)
    p, q = log_probabilities(wanted), log_probabilities(found)
    assert np.exp(p).sum(axis=1) == pytest.approx([1, 1])
    kl, agrees, nll = between(p, q, np.array([1, 0], np.int32))
    # 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5)
    assert kl == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)
    assert agrees.tolist() == [False, True]
    # The second word has become twice as likely.
    assert nll == pytest.approx([-math.log(2), 0], abs=1e-6)
    summary = Distance(kl, agrees, nll, asked=1).summary()
    assert summary == pytest.approx(
        {"kl_prompt": 0.25 * math.log(2), "kl_answer": 0, "top1_prompt": 0, "top1_answer": 1, "nll_change": 0}, abs=1e-6
    )


def test_divergence_is_from_the_truth_not_to_it() -> None:
    p, q = (np.log(np.array([row], np.float32)) for row in ([0.9, 0.1], [0.5, 0.5]))
    kl, _, _ = between(p, q, np.array([0], np.int32))
    assert kl == pytest.approx([0.9 * math.log(1.8) + 0.1 * math.log(0.2)], abs=1e-6)


def test_rows_are_those_of_the_model(running: Engine) -> None:
    """Each token against plain evaluation in a context emptied before."""
    report = measured(running, advise=False)
    plan = running.plan(f"<prompt schema='s'>{INCLUDED}{ASK}</prompt>")
    asked, answer = plan.spans[-1].tokens, report.truth.answer
    rows = []
    for plain in (True, False):
        for count in range(len(asked) - 1 + len(answer)):
            running.forget()
            following = np.concatenate([asked, answer])[: count + 1]
            before = plan.spans[:-1]
            whole = type(plan)((*before, type(before[0])(plan.spans[-1].start, following)))
            tried = whole.without_reuse() if plain else whole
            rows.append(logits(running, tried))
    true, found = np.split(log_probabilities(np.stack(rows)), 2)
    kl, agrees, nll = between(true, found, np.concatenate([asked[1:], answer]))
    now = report.now.distance
    assert now.asked == len(asked) - 1
    assert now.kl == pytest.approx(kl, abs=1e-3)
    assert now.nll == pytest.approx(nll, abs=1e-3)
    assert (now.agrees == agrees).mean() > 0.9
    assert kl.mean() > 0.05


# ---- near and far ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["<a/>", ""])
def test_one_module_is_as_good_as_none(content: str, running: Engine) -> None:
    report = measured(running, content)
    assert running.plan(f"<prompt schema='s'>{content}{ASK}</prompt>").n_cached > 0
    assert report.now.distance.kl.max() < 1e-3
    assert report.now.distance.agrees.all()
    assert report.now.distance.text == report.truth.text
    assert report.best is None or report.gain(report.best) < 1e-3


def test_a_scaffold_set_is_as_good_as_none(running: Engine) -> None:
    schema = MODULES + "<scaffold modules='a c'/>"
    before = measured(running, "<a/><c/>", schema, advise=False)
    running.encode_likely("s")
    together = measured(running, "<a/><c/>", schema, advise=False)
    assert together.now.distance.kl.max() < 1e-3
    assert before.now.distance.kl_mean > 0.02


def test_a_slice_of_other_tokens_is_far_off(running: Engine) -> None:
    right = measured(running, "<a/>", advise=False)
    plan = running.plan(f"<prompt schema='s'><a/>{ASK}</prompt>")
    slice_ = plan.slices[-1]
    assert slice_.module == "a"
    other = running.slices.create(slice_.context or (), slice_.tokens[::-1].copy(), "a")
    running.host.do(lambda slot, _: running.kv_cache.encode(slot, [other]))
    state = running.store.get(other.key)
    assert state is not None
    running.store.discard(slice_.key)
    running.store.put(slice_.key, state.copy(), slice_.tokens, SliceInfo("", "", "", "", 0, 0, "", "", 0.0))
    broken = running.fidelity(f"<prompt schema='s'><a/>{ASK}</prompt>", max_tokens=6, advise=False)
    assert right.now.distance.kl_mean < 1e-3
    assert broken.now.distance.kl_mean > 0.05
    assert not broken.now.distance.agrees.all()


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_without_tokens(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        monkeypatch.setattr(running.model, "ends_generation", lambda token: True)
        report = measured(running)
    now = report.now.distance
    assert (len(report.truth.answer), report.truth.text) == (0, "")
    assert len(now.kl) == now.asked == len(report.pieces) > 0
    assert now.summary()["kl_answer"] == now.summary()["nll_change"] == 0
    assert {token["of"] for token in report.as_dict()["tokens"]} == {"prompt"}
    with engine(tiny("llama"), tmp_path) as running:
        monkeypatch.setattr(running.model, "ends_generation", lambda token: True)
        # A single fresh token, after which nothing is predicted.
        running.add_schema(parse_schema("<schema name='s'><module name='a'>some text</module></schema>"))
        report = running.fidelity("<prompt schema='s'><a/></prompt>", max_tokens=3)
    assert (report.pieces, report.now.distance.kl_mean, report.as_dict()["tokens"]) == ([], 0, [])


def test_the_report_is_of_both_answers(running: Engine) -> None:
    prompt = f"<prompt schema='s'>{INCLUDED}{ASK}</prompt>"
    report = measured(running, max_tokens=5)
    uncached = running.generate(prompt, max_tokens=5, use_cache=False)
    assert report.truth.text == uncached.text
    assert report.now.distance.text == running.generate(prompt, max_tokens=5).text
    assert len(report.truth.answer) == 5
    shown = report.as_dict()
    assert shown["uncached"]["text"] == uncached.text
    assert shown["cached"]["text"] == report.now.distance.text
    assert "".join(token["text"] for token in shown["tokens"]).startswith("user\nand where is it")
    assert [token["of"] for token in shown["tokens"]] == ["prompt"] * report.now.distance.asked + ["answer"] * 5
    answer = [token["kl"] for token in shown["tokens"] if token["of"] == "answer"]
    assert shown["cached"]["kl_answer"] == pytest.approx(np.mean(answer), abs=1e-5)
    assert min(shown["uncached"]["ttft_ms"], shown["cached"]["ttft_ms"]) > 0


def test_of_a_long_question_the_end_is_looked_at(running: Engine) -> None:
    report = measured(running, INCLUDED + "x" * 400, max_tokens=2, advise=False)
    assert report.now.distance.asked == WATCHED - 1
    assert len(report.now.distance.kl) == WATCHED + 1


def test_what_does_not_fit_is_refused(running: Engine, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ContextFull, match="leaves no room for an answer in a context of 1024"):
        measured(running, max_tokens=1024)
    with pytest.raises(InputError, match="max_tokens=0"):
        measured(running, max_tokens=0)
    with engine(tiny("mamba"), tmp_path / "mamba") as recurrent, pytest.raises(ModelError, match="recurrent"):
        measured(recurrent)


# ---- advice ----------------------------------------------------------------------------------------------------------


def changes(report: FidelityReport) -> set[str]:
    return {trial.change for trial in report.trials}


def test_shares_and_exact_slices_are_tried_one_by_one(running: Engine) -> None:
    told: list[tuple[int, int, str]] = []
    report = measured(running, fidelity="fast", progress=lambda *step: told.append(step))
    assert changes(report) == {"--recompute 0.1", "--recompute 0.2", HIGH}
    assert [done for done, _, _ in told] == list(range(len(report.trials) + 3))
    assert {total for _, total, _ in told} == {len(report.trials) + 2}
    trials = {trial.change: trial for trial in report.trials}
    assert trials[HIGH].distance.kl.max() < 1e-3
    assert trials[HIGH].bytes > 0
    assert all(trial.bytes == 0 for trial in report.trials if trial.change != HIGH)
    assert [report.worth(trial) for trial in report.trials] == sorted(map(report.worth, report.trials), reverse=True)
    assert report.best is report.trials[0]


def test_what_is_done_already_is_not_tried(running: Engine) -> None:
    assert changes(measured(running, fidelity="balanced")) == {"--recompute 0.2", HIGH}
    assert changes(measured(running, fidelity=Fidelity(0.2))) == {HIGH}
    assert changes(measured(running, fidelity="high")) == set()


@pytest.mark.parametrize("settings", [{}, {"add_bos": True}], ids=["", "BOS"])
def test_what_is_advised_is_what_one_gets(settings: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    # A share that holds a module.
    schema = MODULES + "".join(f"<module name='{name}'>{'and the rest of it ' * 9}</module>" for name in "de")
    content = f"<d/>{INCLUDED}<e/>"
    with engine(tiny("llama", **settings), tmp_path) as running:
        report = measured(running, content, schema, fidelity="fast")
        trials = {trial.change: trial.distance for trial in report.trials}
        for share in (0.1, 0.2):
            done = measured(running, content, schema, advise=False, fidelity=Fidelity(share)).now.distance
            assert trials[f"--recompute {share}"].kl == pytest.approx(done.kl, abs=1e-3)
        assert trials["--recompute 0.2"].kl != pytest.approx(report.now.distance.kl, abs=1e-3)
        done = measured(running, content, schema, advise=False, fidelity="high").now.distance
        assert trials[HIGH].kl == pytest.approx(done.kl, abs=1e-3)


def test_trials_leave_nothing_in_the_store(running: Engine, tmp_path: Path) -> None:
    def there() -> set[str]:
        running.store.flush()
        return {path.name for path in tmp_path.rglob("*.safetensors")}

    report = measured(running, advise=False)
    before = there()
    assert before
    again = measured(running)
    assert there() == before
    assert again.now.distance.kl == pytest.approx(report.now.distance.kl, abs=1e-4)
    # Measured once more, they cost what they cost.
    costs = {trial.change: trial.bytes for trial in again.trials}
    assert {trial.change: trial.bytes for trial in measured(running).trials} == costs


def test_high_is_exact_from_the_second_time_on_as_fast_as_ever(running: Engine) -> None:
    running.add_schema(parse_schema(f"<schema name='s'>Root. {MODULES}</schema>"))
    prompt = f"<prompt schema='s'>{INCLUDED}{ASK}</prompt>"
    first, second = (running.generate(prompt, max_tokens=6, fidelity="high").metrics for _ in range(2))
    plan = running.plan(prompt, fidelity="high")
    assert first.encoded_tokens == plan.n_cached
    assert (second.encoded_tokens, second.fresh_tokens <= plan.n_tokens - plan.n_cached) == (0, True)
    # Another that begins alike is evaluated from where they part, another combination of them almost whole.
    running.forget()
    shorter = running.generate(prompt.replace("<b/>", ""), max_tokens=6, fidelity="high").metrics
    other = running.generate(prompt.replace("<c/>", ""), max_tokens=6, fidelity="high").metrics
    assert shorter.encoded_tokens == 0 < other.encoded_tokens
    exact = measured(running, advise=False, fidelity="high").now.distance
    assert exact.kl.max() < 1e-5 and exact.agrees.all()


def test_the_best_is_what_brings_most_for_its_time() -> None:
    def trial(change: str, kl: float, ttft_ms: float) -> Trial:
        return Trial(
            change, Distance(np.array([kl], np.float32), np.array([True]), np.zeros(1, np.float32), 0, "", ttft_ms)
        )

    now = trial("", 1.0, 10.0)
    true = Truth(np.zeros(1, np.int32), "", 0.0, np.zeros(1, np.int32), np.zeros((1, 2), np.float32))
    worse, slow, quick, free = (
        *(trial("worse", 1.5, 10.0), trial("slow", 0.1, 100.0), trial("quick", 0.5, 12.0), trial("free", 0.6, 5.0)),
    )
    report = FidelityReport(true, [""], now, [free, quick, slow, worse])
    assert report.worth(slow) == pytest.approx(0.01)
    assert report.worth(quick) == pytest.approx(0.25)
    # What costs no more than runs differ by costs nothing to speak of.
    assert report.worth(free) == pytest.approx(0.4)
    assert report.best is free
    assert FidelityReport(true, [""], now, [worse]).best is None

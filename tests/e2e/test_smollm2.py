"""The real model: reuse answers as full prefill does, and the examples run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest

from cpucache import Engine, Sampling
from cpucache.errors import ModelError
from cpucache.layout import ChatTemplate, SchemaLayout, Segment, bind
from cpucache.models import known_models, resolve_model
from cpucache.pml import load_prompt, load_schema, parse_schema, resolve
from cpucache.resources import resource
from cpucache.reuse import OnProgress, Plan
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import answer, nothing
from cpucache.reuse.work import Task
from cpucache.runtime import Model
from tests.support.templates import Conversation, assembled, rendered

EXAMPLES = sorted(resource("schemas").glob("*/schema.xml"))
STEPS = 64

examples = pytest.mark.parametrize("schema", EXAMPLES, ids=lambda path: path.parent.name)


def prompts_of(schema: Path) -> list[Path]:
    return sorted(path for path in schema.parent.glob("*.xml") if path != schema)


@pytest.fixture(scope="module")
def engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for all, so that no slice is encoded twice."""
    with Engine(smollm2, store=tmp_path_factory.mktemp("slices")) as engine:
        for schema in EXAMPLES:
            engine.add_schema(schema)
        yield engine


@dataclass
class Step:
    """The model's next token: its first choice, and by how much its logit exceeds that of the second."""

    token: int
    margin: float


def steps(engine: Engine, plan: Plan, forced: list[int] | None = None) -> list[Step]:
    """Greedy steps after ``plan``; ``forced`` tokens are appended instead of the first choices."""

    def task(slot: Slot, _: OnProgress) -> Task[list[Step]]:
        kv_cache = engine.kv_cache
        yield from answer(kv_cache, lambda: plan, nothing, slot=slot, fresh=True)
        taken: list[Step] = []
        for i in range(STEPS):
            logits = kv_cache.context.logits(slot.index)
            second, first = np.argsort(logits)[-2:]
            taken.append(Step(int(first), float(logits[first] - logits[second])))
            yield from kv_cache.append(slot, np.array([forced[i] if forced else first], np.int32))
        return taken

    return engine.host.do(task)


@pytest.mark.parametrize("question", ["in the module", "in the prompt"])
def test_a_prompt_as_one_module_answers_as_full_prefill(question: str, engine: Engine) -> None:
    """Compared at each of 64 greedy steps."""
    lease = escape((resource("schemas") / "contract" / "files" / "equipment-lease.txt").read_text(encoding="utf-8"))
    asked = "<user>Who pays for repairs, and who decides on them?</user>"
    inside, outside = (asked, "") if question == "in the module" else ("", asked)
    engine.add_schema(
        parse_schema(f"<schema name='whole'><module name='all'><system>{lease}</system>{inside}</module></schema>")
    )
    plan = engine.plan(f"<prompt schema='whole'><all/>{outside}</prompt>")
    assert plan.exact and plan.n_cached > 300
    uncached = steps(engine, plan.without_reuse())
    cached = steps(engine, plan, [step.token for step in uncached])
    differing = [(one, other) for one, other in zip(uncached, cached, strict=True) if one.token != other.token]
    # Batches of another size round otherwise: what was all but a tie may fall the other way.
    assert all(one.margin < 0.1 and other.margin < 0.1 for one, other in differing)
    assert len(differing) <= 3
    assert np.mean([abs(one.margin - other.margin) for one, other in zip(uncached, cached, strict=True)]) < 0.1


@examples
def test_every_example_runs(schema: Path, engine: Engine) -> None:
    for prompt in prompts_of(schema):
        first, second = (engine.generate(prompt, max_tokens=4).metrics for _ in range(2))
        plan = engine.plan(prompt)
        for metrics in (first, second):
            assert 1 <= metrics.completion_tokens <= 4
            assert metrics.prompt_tokens == plan.n_tokens == metrics.cached_tokens + metrics.fresh_tokens
        assert second.encoded_tokens == 0
        assert second.cached_tokens >= plan.n_cached > 0.6 * plan.n_tokens
        (whole,) = plan.without_reuse().spans
        assert whole.slice is None
        assert whole.tokens.tolist() == plan.tokens.tolist()


@pytest.mark.parametrize("name", ["lesson", "robot", "trip"])
def test_an_example_runs_without_reuse(name: str, engine: Engine) -> None:
    prompt = min(prompts_of(resource("schemas") / name / "schema.xml"), key=lambda path: engine.plan(path).n_tokens)
    metrics = engine.generate(prompt, max_tokens=4, use_cache=False).metrics
    assert metrics.fresh_tokens == metrics.prompt_tokens == engine.plan(prompt).n_tokens
    assert metrics.cached_tokens == metrics.encoded_tokens == 0


@pytest.mark.parametrize("name", known_models())
def test_every_example_fits_every_model(name: str) -> None:
    try:
        path = resolve_model(name)
    except ModelError:
        pytest.skip("has not been fetched")
    with Model(path, vocab_only=True) as model:
        template = ChatTemplate(model.chat_template, bos=model.special_text("bos"), eos=model.special_text("eos"))
        for each in EXAMPLES:
            layout = SchemaLayout(load_schema(each), model, template)
            assert layout.packed or layout.length <= model.n_ctx_train
            for prompt in prompts_of(each):
                bound = bind(layout, resolve(load_prompt(prompt), layout.schema))
                assert any(isinstance(piece, Segment) for piece in bound.pieces)
                assert bound.n_tokens < model.n_ctx_train


def test_the_python_interface(engine: Engine) -> None:
    """As one would use it: encode ahead, ask, and read the answer as it comes."""
    prompt = resource("schemas") / "lesson" / "floating-for-mia.xml"
    told: list[tuple[int, int]] = []
    engine.encode("lesson", progress=lambda done, total: told.append((done, total)))
    assert engine.encode("lesson").slices == 0
    assert all(done <= total for done, total in told)
    assert not told or told[-1][0] == told[-1][1]

    reply = engine.generate(prompt, max_tokens=5)
    assert reply.text
    assert reply.metrics.encoded_tokens == 0
    stream = engine.stream(prompt, max_tokens=5)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.text == reply.text
    # All but its last token is still in the context.
    assert stream.metrics.fresh_tokens == 1
    drawn = Sampling(temperature=0.8, seed=7)
    assert engine.generate(prompt, max_tokens=12, sampling=drawn).text == (
        engine.generate(prompt, max_tokens=12, sampling=drawn).text
    )
    assert set(reply.as_dict()) >= {
        "text",
        "prompt_tokens",
        "cached_tokens",
        "fresh_tokens",
        "completion_tokens",
        "ttft_ms",
        "splice_ms",
        "prefill_ms",
        "total_ms",
        "model",
    }


def test_a_real_model_s_template(smollm2: Path) -> None:
    with Model(smollm2, vocab_only=True) as model:
        source = model.chat_template
        assert source is not None
        template = ChatTemplate(source, bos=model.special_text("bos"), eos=model.special_text("eos"))
        asked: Conversation = [("user", "U"), ("assistant", "A"), ("user", "V")]
        for conversation in (asked, [("system", "S"), *asked]):
            assert assembled(template, conversation) == rendered(source, conversation)
        assert template.start("system", previous=None, first=False) == "<|im_start|>system\n"

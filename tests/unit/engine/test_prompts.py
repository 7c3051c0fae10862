"""The forms of a prompt, which its type distinguishes: the same tokens, whichever form says them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cpucache import Engine, InputError, Sampling
from cpucache.layout import Text
from cpucache.pml import is_prompt, parse_prompt, parse_schema

PML = "<prompt schema='s'><a/><user>Why?</user></prompt>"


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tiny("llama"), store=tmp_path_factory.mktemp("store")) as running:
        running.add_schema(parse_schema("<schema name='s'><module name='a'>Abc.</module></schema>"))
        yield running


def ids(engine: Engine, *forms: object) -> list[list[int]]:
    return [engine.plan(form).tokens.tolist() for form in forms]  # type: ignore[arg-type]


def test_a_str_is_a_message_of_the_user(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Hello").write_text(PML)  # a file of that name changes nothing
    said, written = ids(engine, "Hello", [{"role": "user", "content": "Hello"}])
    assert said == written
    assert engine.generate("Hello", max_tokens=2).metrics.prompt_tokens == len(said)


@pytest.mark.parametrize("text", ["<b>Hi</b>", "see <prompt schema='s'/>", "<prompts/>", "a b.xml", "x.xml is what?"])
def test_what_does_not_begin_with_a_prompt_is_a_message(engine: Engine, text: str) -> None:
    assert not is_prompt(text)
    said, written = ids(engine, text, [{"role": "user", "content": text}])
    assert said == written


@pytest.mark.parametrize("head", ["", "\n ", "<?xml version='1.0'?>\n", "<!-- a --> <!-- b -->\n"])
def test_pml_is_text_a_path_or_parsed(engine: Engine, head: str, tmp_path: Path) -> None:
    path = tmp_path / "p.xml"
    path.write_text(head.lstrip() + PML)
    text, parsed, file = ids(engine, head + PML, parse_prompt(PML), path)
    assert text == parsed == file
    assert engine.plan(head + PML).spans[0].start == 0


def test_tokens_are_a_list_an_array_or_a_text(engine: Engine) -> None:
    numbers = engine.model.tokenize("abc").tolist()
    array = np.array(numbers, np.int32)
    assert ids(engine, numbers, tuple(numbers), array, Text(array)) == [numbers] * 4


def test_text_is_gone_on_with_as_it_is(engine: Engine) -> None:
    plain = engine.plan(text=PML).tokens.tolist()
    bos = [] if engine.model.bos is None else [engine.model.bos]
    assert plain == bos + engine.model.tokenize(PML).tolist()


@pytest.mark.parametrize("stop", ["b", ["b"], ("b",)])
def test_texts_to_stop_at_are_one_or_several(stop: str | list[str]) -> None:
    assert Sampling(stop=stop).stops == ("b",)


@pytest.mark.parametrize("sampling", [0.7, {"temperature": 0.7}, "greedy"])
def test_sampling_is_a_sampling(engine: Engine, sampling: object) -> None:
    with pytest.raises(InputError, match="sampling must be a Sampling"):
        engine.generate("Hello", sampling=sampling)  # type: ignore[arg-type]

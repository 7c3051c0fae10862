"""What the Python API says to whoever passes something else than it takes: a sentence each, with what to pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpucache import Engine, InputError


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tiny("llama"), store=tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.mark.parametrize("prompt", [5, b"<prompt/>", None, {"role": "user", "content": "x"}, "", " \n", object()])
def test_what_is_no_prompt_is_told_what_is(engine: Engine, prompt: Any) -> None:
    with pytest.raises(InputError, match=r"message.* PML .*Path\(.*role.*token ids.*text="):
        engine.generate(prompt)


@pytest.mark.parametrize("prompt", ["no/such/file.xml", "x.XML", "prompt-with-a-name.xml"])
def test_a_str_that_looks_like_a_path_is_not_answered(engine: Engine, prompt: str) -> None:
    with pytest.raises(InputError, match=r"pass Path\("):
        engine.generate(prompt)


@pytest.mark.parametrize("prompt", ["Hello", 5, b"<prompt/>", ["a"], None])
def test_a_session_begins_with_pml_only(engine: Engine, prompt: Any) -> None:
    with pytest.raises(InputError, match=r"begins with <prompt, a Path\("):
        engine.planner.first_prompt(prompt)


@pytest.mark.parametrize("message", ["hi", {}, {"role": "wizard", "content": "x"}, {"role": "user", "content": 5}])
def test_a_message_has_a_role_and_text(engine: Engine, message: Any) -> None:
    with pytest.raises(InputError, match="role"):
        engine.generate([message])


@pytest.mark.parametrize("text", [5, b"text", ["text"]])
def test_text_is_a_str(engine: Engine, text: Any) -> None:
    with pytest.raises(InputError, match="text must be a str"):
        engine.generate(text=text)


@pytest.mark.parametrize("max_tokens", ["5", 0, -1, 2.5, None])
def test_max_tokens_is_a_number(engine: Engine, max_tokens: Any) -> None:
    with pytest.raises(InputError, match="max_tokens"):
        engine.generate(text="text", max_tokens=max_tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"segment_tokens": (9, 8)},
        {"positions": "zzz"},
        {"threads": -3},
        {"refine": "always"},
        {"fidelity": "best"},
        {"ram_budget": "much"},
        {"n_ctx": 0},
    ],
)
def test_settings_are_checked_before_anything_is_loaded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpucache.engine.opening.Model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(InputError):
        Engine("smollm2-135m-instruct", store=tmp_path, **settings)

"""The public API can be remembered: few parameters a method, all of them named and typed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import cpucache

MOST = 8


def public_methods() -> list[tuple[str, Callable[..., Any]]]:
    found: list[tuple[str, Callable[..., Any]]] = []
    for name in cpucache.__all__:
        kind = getattr(cpucache, name)
        if inspect.isclass(kind) and not issubclass(kind, BaseException):
            members = inspect.getmembers(kind, inspect.isroutine)
            found += [(f"{name}.{method}", each) for method, each in members if not method.startswith("_")]
    return found


@pytest.mark.parametrize(("name", "method"), public_methods())
def test_a_method_can_be_remembered(name: str, method: Callable[..., Any]) -> None:
    parameters = [each for each in inspect.signature(method).parameters.values() if each.name != "self"]
    assert len(parameters) <= MOST, f"{name} has {len(parameters)} parameters"
    for parameter in parameters:
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), f"{name}: {parameter}"
        assert parameter.annotation is not parameter.empty, f"{name}: {parameter} has no type"
        assert parameter.annotation != "Any", f"{name}: {parameter} may be anything"
    assert inspect.signature(method).return_annotation is not inspect.Signature.empty, name


def test_what_scripts_rely_on_is_there() -> None:
    found = dict(public_methods())
    assert {f"Engine.{name}" for name in ("add_schema", "encode", "generate", "stream", "session", "refine")} <= set(
        found
    )
    assert "Session.send" in found
    assert {"prompt", "max_tokens", "use_cache"} <= set(inspect.signature(cpucache.Engine.generate).parameters)
    settings = set(inspect.signature(cpucache.Engine).parameters)
    assert {"model", "n_ctx", "store", "ram_budget"} <= settings

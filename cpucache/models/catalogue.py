"""The model catalogue: models that can be fetched by name. ``gguf_models/README.md`` describes the file."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from cpucache.errors import InputError
from cpucache.models.sources import KINDS, Source
from cpucache.resources import resource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file of weights that can be fetched: ``size`` in bytes, ``sha256`` if known, ``sources`` in order of trial."""

    name: str
    filename: str
    size: int
    sha256: str | None
    sources: tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class Model(Weights):
    """A model of the catalogue. ``context``: trained context length in tokens; ``parameters``: number of weights."""

    description: str
    licence: str
    architecture: str
    parameters: int
    context: int


@cache
def known_models() -> Mapping[str, Model]:
    """Models by name, in the order of the catalogue. Raises ``InputError`` when the catalogue is malformed."""
    return read_catalogue(resource("gguf_models/catalogue.toml"))


def default_model() -> str:
    """Name of the model that commands use by default: the first of the catalogue."""
    return next(iter(known_models()))


def read_catalogue(path: Path) -> dict[str, Model]:
    """Reads a catalogue file. Raises ``InputError``, which names the entry and what is wrong with it."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    tables = document.get("model")
    if document.keys() != {"model"} or not isinstance(tables, list) or not tables:
        raise InputError(f"{path}: expected [[model]] tables and nothing else")
    models = {}
    for number, table in enumerate(tables, start=1):
        model = _model(table, f"{path}: model {number}")
        if model.name in models:
            raise InputError(f"{path}: two models are called {model.name}")
        models[model.name] = model
    return models


def _model(table: dict[str, Any], where: str) -> Model:
    rest = dict(table)
    name, sources = rest.get("name"), rest.pop("source", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise InputError(f"{where}: name must be lower-case letters, digits, '.' and '-'")
    where = f"{where} ({name})"
    if not isinstance(sources, list) or not sources:
        raise InputError(f"{where}: it needs at least one [[model.source]]")
    built = tuple(_source(source, f"{where} source {number}") for number, source in enumerate(sources, start=1))
    model = _build(Model, {**rest, "filename": f"{name}.gguf", "sources": built}, where)
    if not re.fullmatch(r"[0-9a-f]{64}", model.sha256 or ""):
        raise InputError(f"{where}: sha256 must be 64 lower-case hexadecimal digits")
    return model


def _source(table: dict[str, Any], where: str) -> Source:
    rest = dict(table)
    kind, parts = rest.pop("kind", None), rest.get("parts")
    if kind not in KINDS:
        raise InputError(f"{where}: kind must be one of {', '.join(KINDS)}")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{where}: parts must be a list of tables")
    return _build(Source, {**rest, "parts": tuple(_build(KINDS[kind], part, where) for part in parts)}, where)


def _build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Builds a dataclass from a TOML table. Raises ``InputError`` for a missing, unknown or mistyped field."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise InputError(f"{where}: {missing[0]} is missing")
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{where}: unknown key {name}; known: {', '.join(fields)}")
        if fields[name].type == "int" and not (type(value) is int and value > 0):
            raise InputError(f"{where}: {name} must be a whole number above 0")
        if str(fields[name].type).startswith("str") and not (isinstance(value, str) and value):
            raise InputError(f"{where}: {name} must be a text")
    return cls(**values)

"""GBNF grammars for answers: JSON, JSON schemas and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from cpucache.errors import InputError

ANY_JSON: str = JSON_GBNF
"""Grammar of a JSON object."""
_ANY, _PRINTED = r'[^"\\]', r'[^"\\\x7F\x00-\x1F]'
"""Characters of a string as the converter of llama-cpp-python has them, and without those that JSON wants escaped."""
_MOST = 256  # maximum number of repetitions: each is a nested group of the grammar
_REPEATED = re.compile(r"\{\s*(\d+)?\s*(?:,\s*(\d+)?\s*)?\}")


def grammar_of(schema: Mapping[str, Any]) -> str:
    """GBNF grammar of the JSON that a JSON schema describes. Raises ``InputError`` if the schema is not valid."""
    try:
        schema = _bounded(schema)
        return str(json_schema_to_gbnf(json.dumps(schema))).replace(_ANY, _PRINTED)
    except InputError:
        raise
    except Exception as error:  # the converter fails with assertions and KeyErrors on invalid schemas
        raise InputError(f"the JSON schema can't be turned into a grammar: {error!r}") from error


def _bounded(value: Any) -> Any:
    """A schema without upper bounds that are too large for a grammar; the answer's length is limited in any case."""
    if isinstance(value, Mapping):
        kept = {}
        for name, each in value.items():
            number = each if isinstance(each, int | float) else 0
            if name in ("minLength", "minItems") and number > _MOST:
                raise InputError(f"the JSON schema: {name} may be at most {_MOST}")
            if name == "pattern" and isinstance(each, str):
                bounds = [int(bound) for found in _REPEATED.findall(each) for bound in found if bound]
                if max(bounds, default=0) > _MOST:
                    raise InputError(f"the JSON schema: a pattern may repeat a part at most {_MOST} times")
            if name not in ("maxLength", "maxItems") or number <= _MOST:
                kept[name] = _bounded(each)
        return kept
    return [_bounded(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class CallForm:
    """Form in which a model writes function calls: JSON objects and the texts around them."""

    head: str = ""
    begin: str = ""
    """Text before each call."""
    end: str = ""
    """Text after each call."""
    between: str | None = None
    """Text between two calls; ``None``: the form allows only one call."""
    tail: str = ""
    arguments: str = "arguments"
    """Key of the arguments in the JSON object; the other key is ``name``."""


def calls_grammar(functions: Mapping[str, Mapping[str, Any]], form: CallForm, *, several: bool) -> str:
    """GBNF grammar of an answer that consists of function calls.

    Args:
        functions: JSON schema of each function's arguments, by the function's name.
        form: Form in which calls are written.
        several: Whether more than one call is allowed, if the form has a text between calls.

    Raises:
        InputError: A JSON schema is not valid.
    """
    shared: dict[str, Any] = {}
    calls = []
    for number, (name, parameters) in enumerate(functions.items()):
        arguments = _without_refs(parameters, parameters, f"f{number}", shared, {})
        properties = {"name": {"const": name}, form.arguments: {"type": "object", **arguments}}
        calls.append({"type": "object", "properties": properties, "required": list(properties)})
    rules = grammar_of({"anyOf": calls, "$shared": shared})
    rules = re.sub(r"^root ::=", "call ::=", rules, flags=re.MULTILINE)
    call = f"{_literal(form.begin)} call {_literal(form.end)}"
    more = f"({_literal(form.between)} {call})*" if several and form.between is not None else ""
    return f"root ::= {_literal(form.head)} {call} {more} {_literal(form.tail)}\n{rules}"


def _literal(text: str) -> str:
    return json.dumps(text)


def _without_refs(value: Any, root: Any, prefix: str, shared: dict[str, Any], named: dict[str, str]) -> Any:
    """A schema whose references point into ``shared``, so that references of several schemas do not collide.

    Raises ``InputError`` for a reference without a target.
    """
    if isinstance(value, list):
        return [_without_refs(each, root, prefix, shared, named) for each in value]
    if not isinstance(value, Mapping):
        return value
    reference = value.get("$ref")
    if not isinstance(reference, str):
        return {name: _without_refs(each, root, prefix, shared, named) for name, each in value.items()}
    if reference not in named:
        named[reference] = f"{prefix}x{len(named)}"
        target = root
        for step in reference.removeprefix("#").split("/")[1:]:
            target = target.get(step) if isinstance(target, Mapping) else None
        if not reference.startswith("#") or not isinstance(target, Mapping):
            raise InputError(f"the JSON schema: the reference {reference!r:.100} leads to nothing")
        shared[named[reference]] = _without_refs(target, root, prefix, shared, named)
    return {"$ref": f"#/$shared/{named[reference]}"}

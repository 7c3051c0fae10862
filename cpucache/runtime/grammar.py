"""Grammars for answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from cpucache.errors import InputError

ANY_JSON: str = JSON_GBNF
"""The grammar of a JSON object."""
_MOST = 256  # repetitions, each of which is a nested group of the grammar
_REPEATED = re.compile(r"\{\s*(\d+)?\s*(?:,\s*(\d+)?\s*)?\}")


def grammar_of(schema: Mapping[str, Any]) -> str:
    """The GBNF grammar of the JSON that a schema describes. Raises ``InputError`` for what is no such schema."""
    try:
        schema = _bounded(schema)
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except InputError:
        raise
    except Exception as error:  # the converter asserts, and looks up keys, in whatever it is given
        raise InputError(f"the JSON schema can't be turned into a grammar: {error!r}") from error


def _bounded(value: Any) -> Any:
    """A schema without upper bounds that are too large for a grammar: an answer is bounded anyway."""
    if isinstance(value, Mapping):
        kept = {}
        for name, each in value.items():
            number = each if isinstance(each, int | float) else 0
            if name in ("minLength", "minItems") and number > _MOST:
                raise InputError(f"the JSON schema: {name} may be {_MOST} at most")
            if name == "pattern" and isinstance(each, str):
                bounds = [int(bound) for found in _REPEATED.findall(each) for bound in found if bound]
                if max(bounds, default=0) > _MOST:
                    raise InputError(f"the JSON schema: a pattern may repeat a part {_MOST} times at most")
            if name not in ("maxLength", "maxItems") or number <= _MOST:
                kept[name] = _bounded(each)
        return kept
    return [_bounded(each) for each in value] if isinstance(value, list) else value

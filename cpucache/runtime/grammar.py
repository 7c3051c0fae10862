"""Grammars for answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from cpucache.errors import InputError

ANY_JSON: str = JSON_GBNF
"""The grammar of a JSON object."""


def grammar_of(schema: Mapping[str, Any]) -> str:
    """The GBNF grammar of the JSON that a schema describes. Raises ``InputError`` for what is no such schema."""
    try:
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except Exception as error:  # the converter asserts, and looks up keys, in whatever it is given
        raise InputError(f"the JSON schema can't be turned into a grammar: {error!r}") from error

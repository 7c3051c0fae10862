"""PML, the Prompt Markup Language: text in, validated trees out. Knows nothing of tokens or models."""

from cpucache.pml.canonical import canonical
from cpucache.pml.limits import Limits
from cpucache.pml.prompt import is_prompt, load_prompt, parse_prompt
from cpucache.pml.resolve import resolve, schema_for
from cpucache.pml.schema import load_schema, parse_schema

__all__ = [
    "Limits",
    "canonical",
    "is_prompt",
    "load_prompt",
    "load_schema",
    "parse_prompt",
    "parse_schema",
    "resolve",
    "schema_for",
]

"""Prompts without PML: a text, or messages, in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cpucache.cli.console import check_prompt, read_prompt, read_schema
from cpucache.cli.options import check_text_fidelity
from cpucache.errors import InputError
from cpucache.pml import is_prompt
from cpucache.pml.tree import Schema


def read_asked(
    prompt: str, schema_file: str | None, exactness: dict[str, Any], *, raw: bool = False
) -> tuple[dict[str, Any], Schema | None]:
    """Returns a prompt as ``Engine.plan`` takes it, and its schema, if there is one.

    Args:
        prompt: File of the prompt; ``-`` for standard input.
        schema_file: File of its schema.
        exactness: Fidelity and reuse, as returned by ``split_fidelity``.
        raw: Whether a text without a schema is continued instead of answered as a message.

    Raises ``UsageError``, ``InputError`` and ``PMLError``.
    """
    if schema_file is None:
        check_text_fidelity(exactness)
        return read_text(prompt, raw=raw), None
    if raw:
        raise click.UsageError("--raw and --schema exclude each other")
    asked, schema = read_prompt(prompt, schema=schema_file), read_schema(schema_file)
    check_prompt(asked, [schema])
    return {"prompt": asked}, schema


def read_text(name: str, *, raw: bool) -> dict[str, Any]:
    """Returns a prompt without PML as ``Engine.stream`` takes it. Raises ``InputError``."""
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text: {error}") from error
    if is_prompt(text):
        raise click.UsageError(f"missing option '-s' / '--schema': {name} is a PML prompt, which needs its schema")
    if name.endswith(".json"):
        if raw:
            raise click.UsageError("--raw needs a text, not a .json file of messages")
        return {"prompt": _messages(name, text)}
    if not text.strip():
        raise InputError(f"{name}: the prompt is empty")
    return {"text": text} if raw else {"prompt": [{"role": "user", "content": text.strip("\r\n")}]}


def _messages(name: str, text: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: not JSON: {error}") from error
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{name}: expected a list of messages, each with a role and content")
    return messages

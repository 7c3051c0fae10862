"""``cpucache schema``: check, format, show, compare and make schemas."""

from __future__ import annotations

import click

from cpucache.cli.lazy import LazyGroup

_COMMANDS = {
    "check": ("cpucache.cli.schema_check", "check", "Check schemas and prompts, and list every mistake."),
    "fmt": ("cpucache.cli.schema_fmt", "fmt", "Write canonical PML, or escape stray < and & (--fix)."),
    "show": ("cpucache.cli.schema_show", "show", "Draw how a schema is laid out, and how much of it is cached."),
    "diff": (
        "cpucache.cli.schema_diff",
        "diff",
        "Show which slices stay valid after an edit, and what the rest costs.",
    ),
    "grammar": ("cpucache.cli.schema_show", "grammar", "Print the folder of the RELAX NG grammars of PML."),
    "from-jinja": ("cpucache.cli.schema_from", "from_jinja", "Turn a Jinja template into a schema."),
    "from-files": ("cpucache.cli.schema_from", "from_files", "Make a schema of files, with a module for each file."),
    "from-messages": (
        "cpucache.cli.schema_from",
        "from_messages",
        "Make a schema of text that repeats in recorded requests.",
    ),
}


@click.group(cls=LazyGroup, lazy=_COMMANDS)
def schema() -> None:
    """Check, format, show and compare schemas, or make them of what there is already."""

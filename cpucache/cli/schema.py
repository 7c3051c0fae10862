"""``cpucache schema``: check, format, show, compare and make schemas."""

from __future__ import annotations

import click

from cpucache.cli.schema_check import check
from cpucache.cli.schema_diff import diff
from cpucache.cli.schema_fmt import fmt
from cpucache.cli.schema_from import from_files, from_jinja, from_messages
from cpucache.cli.schema_show import grammar, show


@click.group()
def schema() -> None:
    """Check, format, show and compare schemas, or make them of what there is already."""


for _command in (check, fmt, show, diff, grammar, from_jinja, from_files, from_messages):
    schema.add_command(_command)

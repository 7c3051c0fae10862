"""``cpucache schema``: check, format, show and compare schemas."""

from __future__ import annotations

import click

from cpucache.cli.schema_check import check
from cpucache.cli.schema_diff import diff
from cpucache.cli.schema_fmt import fmt
from cpucache.cli.schema_show import grammar, show


@click.group()
def schema() -> None:
    """Check, format, show and compare schemas."""


for _command in (check, fmt, show, diff, grammar):
    schema.add_command(_command)

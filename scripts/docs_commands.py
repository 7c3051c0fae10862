"""Help of every command as Markdown, for docs/commands.md.

python scripts/docs_commands.py        print the Markdown
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from cpucache.cli.main import cli

WIDTH = 96
"""Width of the help, in columns."""


def helps() -> str:
    """Returns a section for each command, with the output of ``--help``."""
    return "\n".join(_sections(cli, click.Context(cli, info_name="cpucache", **cli.context_settings)))


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    context.terminal_width = WIDTH
    depth = context.command_path.count(" ")
    yield f"{'#' * (2 + depth)} {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from _sections(inner, inner.context_class(inner, info_name=name, parent=context))


if __name__ == "__main__":
    print(helps())

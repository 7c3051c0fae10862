"""Groups of commands that import a command when it is run: ``cpucache --help`` needs no llama.cpp."""

from __future__ import annotations

import difflib
import gc
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from cpucache.cli.logs import with_log_options


class LazyGroup(click.Group):
    """Group that imports a command when the command is run.

    Args:
        lazy: For each command by name: its module, its name in the module, and its line in the help of the group.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str, str]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in self._lazy:
            return None
        module, name, _ = self._lazy[cmd_name]
        with _importing():
            command: click.Command = getattr(importlib.import_module(module), name)
        return with_log_options(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self._lazy and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self._lazy, 1)
            raise click.UsageError(f"no command '{name}'" + (f": did you mean '{near[0]}'?" if near else ""), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, _, about) in self._lazy.items()])


@contextmanager
def _importing() -> Iterator[None]:
    """Pauses garbage collection during imports: imported objects stay, so that examining them is useless."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

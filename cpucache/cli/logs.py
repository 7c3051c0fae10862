"""Seeing inside: ``-v`` and ``--debug`` of every command. What is logged goes to standard error."""

from __future__ import annotations

import logging

import click

_logger = logging.getLogger("cpucache")


def show_logs(level: int) -> None:
    """Show what is logged from a level on. The finest level that was asked for holds."""
    if not following() or level < _logger.level:
        _logger.setLevel(level)


def following() -> bool:
    """Whether somebody asked to see inside."""
    return _logger.level in (logging.DEBUG, logging.INFO)


def debugging() -> bool:
    """Whether everything is to be seen, tracebacks included."""
    return _logger.level == logging.DEBUG


def _option(name: str, *names: str, level: int, text: str) -> click.Option:
    def show(_ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
        if asked:
            show_logs(level)

    return click.Option([*names, name], is_flag=True, is_eager=True, expose_value=False, callback=show, help=text)


def _options() -> list[click.Option]:
    return [
        _option(
            "--verbose",
            "-v",
            level=logging.INFO,
            text="Tell what is done and why: what is evaluated, evicted, refused and waited for.",
        ),
        _option(
            "--debug",
            level=logging.DEBUG,
            text="Tell everything, for each part of a prompt, and show tracebacks of errors.",
        ),
    ]


def with_log_options(command: click.Command) -> click.Command:
    """A command that has ``-v`` and ``--debug``, as far as it has no such options of its own; so do those below it."""
    taken = {name for each in command.params for name in each.opts}
    command.params += [option for option in _options() if taken.isdisjoint(option.opts)]
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        with_log_options(each)
    return command

"""The options ``-v`` and ``--debug`` of every command. Logs go to standard error."""

from __future__ import annotations

import logging

import click

_logger = logging.getLogger("cpucache")


def show_logs(level: int) -> None:
    """Shows logs from a level on. Of several calls, the most detailed level holds."""
    if not following() or level < _logger.level:
        _logger.setLevel(level)


def following() -> bool:
    """Whether logs are shown."""
    return _logger.level in (logging.DEBUG, logging.INFO)


def debugging() -> bool:
    """Whether all logs are shown, and tracebacks of errors."""
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
            text="Log what is evaluated, evicted, refused and waited for, and why.",
        ),
        _option(
            "--debug",
            level=logging.DEBUG,
            text="Log details of each part of a prompt, and show tracebacks of errors.",
        ),
    ]


def with_log_options(command: click.Command) -> click.Command:
    """Adds ``-v`` and ``--debug`` to a command and its subcommands. A second call adds nothing."""
    taken = {name for each in command.params for name in each.opts}
    command.params += [option for option in _options() if taken.isdisjoint(option.opts)]
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        with_log_options(each)
    return command

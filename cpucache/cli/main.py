"""``cpucache``: the command."""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

import cpucache
from cpucache.cli.logs import debugging, following, show_logs, with_log_options
from cpucache.errors import CpucacheError, InputError

# The modules behind the commands are imported when a command is run: `cpucache --help` needs no llama.cpp.
_COMMANDS = {
    "demo": ("cpucache.cli.demo", "demo", "See the main job: a long prompt, uncached against cached."),
    "run": ("cpucache.cli.run", "run", "Answer a prompt."),
    "chat": ("cpucache.cli.chat", "chat", "Talk with a model; conversations go on where they stood."),
    "ask": ("cpucache.cli.ask", "ask", "Pick modules from a list, and ask questions on them."),
    "sessions": ("cpucache.cli.sessions", "sessions", "List, check, delete and export conversations."),
    "serve": ("cpucache.cli.serve", "serve", "Answer programs that speak OpenAI's or Anthropic's API."),
    "why": ("cpucache.cli.why", "why", "Show why a request to the server was no hit, and what to switch on."),
    "plan": ("cpucache.cli.plan", "plan", "Show which slice each part of a prompt takes, and why."),
    "fidelity": ("cpucache.cli.fidelity", "fidelity", "Measure how far a cached answer is from the uncached one."),
    "encode": ("cpucache.cli.encode", "encode", "Evaluate and save every module of schemas."),
    "schema": ("cpucache.cli.schema", "schema", "Check schemas, and show how they are laid out."),
    "models": ("cpucache.cli.models", "models", "Fetch, list, find and remove model weights."),
    "cache": ("cpucache.cli.cache", "cache", "Look at the saved slices and look after them."),
    "bench": ("cpucache.cli.bench", "bench", "Measure on this machine."),
    "info": ("cpucache.cli.info", "info", "Show what this machine offers and what is used of it."),
}


@contextmanager
def _importing() -> Iterator[None]:
    """Imports without garbage collection, which would look at every new function and class, several times, for nothing.

    What has been imported stays, so no later collection looks at it either.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


class _Commands(click.Group):
    """A group that knows its commands by name and imports them when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        with _importing():
            command: click.Command = getattr(importlib.import_module(module), name)
        return with_log_options(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, _COMMANDS, 1)
            raise click.UsageError(f"no command '{name}'" + (f": did you mean '{near[0]}'?" if near else ""), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, _, about) in _COMMANDS.items()])


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(cpucache.__version__, "-V", "--version", prog_name="cpucache")
def cli() -> None:
    """Answer long, repetitive prompts at once on an ordinary CPU.

    The parts of a prompt that repeat are described as modules in a schema. They are evaluated once, saved, and spliced
    into every later prompt that names them, so that only what is new has to be evaluated.

    \b
    cpucache models pull smollm2-135m-instruct     fetch a small model
    cpucache demo                                  see what it is about
    cpucache run PROMPT -s SCHEMA                  answer a prompt of your own
    cpucache chat                                  talk, and go on another day
    cpucache serve                                 answer other programs

    -v and --debug may stand behind any command, too. $CPUCACHE_DEBUG=1 is --debug.

    Slices are kept in $CPUCACHE_HOME, else in the platform's cache folder; conversations in $CPUCACHE_SESSIONS, else in
    the platform's user data folder.
    """


with_log_options(cli)


def main() -> None:
    """Run the command. Exit status: 0 done, 1 failed, 2 wrong usage or bad input, 130 interrupted."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("cpucache: %(message)s"))
    logging.getLogger("cpucache").addHandler(handler)
    if os.environ.get("CPUCACHE_DEBUG", "0") not in ("", "0"):
        show_logs(logging.DEBUG)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character of an answer or of a drawing gets a question mark instead.
        sys.stdout.reconfigure(errors="replace")
    try:
        status = cli.main(prog_name="cpucache", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.UsageError as error:
        click.echo(_safe(_usage(error)), err=True)
        sys.exit(2)
    except CpucacheError as error:
        _trace()
        click.echo(_safe(f"cpucache: {error}"), err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except (KeyboardInterrupt, click.Abort):
        _trace()
        click.echo("cpucache: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more while it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _trace()
        click.echo(_safe(f"cpucache: {error}"), err=True)
        sys.exit(1)


def _trace() -> None:
    """Show where an error was raised, if everything is to be seen."""
    if debugging():
        click.echo(_safe(traceback.format_exc().rstrip()), err=True)


class _Formatter(logging.Formatter):
    """Messages name what others wrote, such as slices and conversations.

    A line that is there because somebody asked to see inside tells when it was written, and which room it is from.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = _safe(super().format(record))
        if record.levelno >= logging.WARNING:
            return text.replace(": ", ": warning: ", 1)
        if not following():
            return text
        room = ".".join(record.name.split(".")[:2])
        return text.replace("cpucache: ", f"{record.relativeCreated / 1000:9.3f} {room}: ", 1)


def _safe(text: str) -> str:
    # Imported when there is something to say: it takes rich along.
    from cpucache.cli.console import safe

    return safe(text)


def _usage(error: click.UsageError) -> str:
    """One line, except where a group was called without a command: that shows its help."""
    message = error.format_message()
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # click 8.2 and later
        return message
    line = " ".join(message.split()).rstrip(".")
    command = error.ctx.command_path if error.ctx else "cpucache"
    return f"cpucache: {line[:1].lower()}{line[1:]} (see `{command} --help`)"


if __name__ == "__main__":
    main()

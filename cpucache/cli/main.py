"""``cpucache``: the command-line program and its list of commands."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback

import click

import cpucache
from cpucache.cli.lazy import LazyGroup
from cpucache.cli.logs import debugging, following, show_logs, with_log_options
from cpucache.errors import CpucacheError, InputError

_COMMANDS = {
    "demo": ("cpucache.cli.demo", "demo", "Answer a long prompt without the cache and with it, and compare."),
    "run": ("cpucache.cli.run", "run", "Answer a prompt."),
    "chat": ("cpucache.cli.chat", "chat", "Talk with a model in conversations that can be resumed."),
    "ask": ("cpucache.cli.ask", "ask", "Pick modules from a list, and ask questions about them."),
    "sessions": ("cpucache.cli.sessions", "sessions", "List, check, delete and export conversations."),
    "serve": ("cpucache.cli.serve", "serve", "Serve OpenAI's and Anthropic's APIs over HTTP."),
    "why": ("cpucache.cli.why", "why", "Show why a request missed the cache, and which setting helps."),
    "plan": ("cpucache.cli.plan", "plan", "Show which slice each part of a prompt uses, and why."),
    "fidelity": ("cpucache.cli.fidelity", "fidelity", "Measure how far a cached answer is from the uncached one."),
    "encode": ("cpucache.cli.encode", "encode", "Evaluate and save every module of schemas."),
    "schema": ("cpucache.cli.schema", "schema", "Check, format, show, compare and make schemas."),
    "models": ("cpucache.cli.models", "models", "Fetch, list, find and remove model weights."),
    "cache": ("cpucache.cli.cache", "cache", "List, verify, evict and export saved slices."),
    "bench": ("cpucache.cli.bench", "bench", "Measure times, memory and accuracy on this machine."),
    "info": ("cpucache.cli.info", "info", "Show CPU, memory, GPU and folders that cpucache uses."),
}


@click.group(
    cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(cpucache.__version__, "-V", "--version", prog_name="cpucache")
def cli() -> None:
    """Answer long, repetitive prompts on an ordinary CPU without evaluating the repeated text again.

    A schema describes the repeated parts of prompts as modules. Each module is evaluated once and its KV state saved.
    Later prompts that name the module use the saved state; only their new text is evaluated.

    \b
    cpucache models pull smollm2-135m-instruct     fetch a small model
    cpucache demo                                  compare uncached with cached
    cpucache run PROMPT -s SCHEMA                  answer a prompt of your own
    cpucache chat                                  hold a conversation
    cpucache serve                                 serve other programs

    Every command also accepts -v and --debug. $CPUCACHE_DEBUG=1 means --debug.

    Slices are saved in $CPUCACHE_HOME, by default in the platform's cache folder. Conversations are saved in
    $CPUCACHE_SESSIONS, by default in the platform's user data folder.
    """


with_log_options(cli)


def main() -> None:
    """Runs the command. Exit status: 0 done, 1 failed, 2 wrong usage or bad input, 130 interrupted."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("cpucache: %(message)s"))
    logging.getLogger("cpucache").addHandler(handler)
    if os.environ.get("CPUCACHE_DEBUG", "0") not in ("", "0"):
        show_logs(logging.DEBUG)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the terminal's encoding lacks are printed as question marks.
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
        # The reader of the output has closed the pipe. Python would report that again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _trace()
        click.echo(_safe(f"cpucache: {error}"), err=True)
        sys.exit(1)


def _trace() -> None:
    """Prints the traceback of the current error if ``--debug`` is on."""
    if debugging():
        click.echo(_safe(traceback.format_exc().rstrip()), err=True)


class _Formatter(logging.Formatter):
    """Formats log messages, which contain text of others, such as names of slices and conversations.

    With ``-v`` or ``--debug``, each line also has its time and the room that wrote it.
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
    # Imported when there is something to print: the module imports rich.
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

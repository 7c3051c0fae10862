"""Input of ``chat`` and ``ask``: messages and commands, from a terminal or a pipe."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cpucache.cli.console import err
from cpucache.errors import InputError
from cpucache.private import private_file

if TYPE_CHECKING:
    from prompt_toolkit.buffer import Buffer
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

COMMANDS = {
    "help": ("", "show this"),
    "save": ("[NAME]", "not needed, since every message is saved at once; with NAME: the same as /fork"),
    "fork": ("NAME", "copy the conversation under another name"),
    "edit": ("[N] TEXT", "replace your message N (default: the last) by TEXT, and drop all messages after it"),
    "regen": ("", "replace the last answer by another, or answer the last message"),
    "stats": ("", "show the size of the conversation and how much was reused"),
    "quit": ("", "quit (as does Ctrl-D)"),
}
KEYS = (
    "Enter sends the message. Alt+Enter, or a backslash at the end of a line, starts a new line; pasted text keeps its "
    'lines; text between """ and """ is sent unchanged. Ctrl-C stops an answer and keeps its text so far.'
)
_QUOTES = '"""'
# A message in quotes, or a command whose text is.
_QUOTED = re.compile(r'\s*(?:/\w+\s+(?:\d+\s+)?)?"""')


class Command(NamedTuple):
    """Command, typed as ``/name argument``."""

    name: str
    argument: str


class Reader(Protocol):
    """Source of messages: a terminal or a pipe."""

    interactive: bool
    """Whether a user is at a terminal and can correct a mistake."""

    def read(self, prompt: str, draft: str = "", typed: Callable[[str], None] | None = None) -> str | None:
        """Returns the next line of input, or ``None`` at its end.

        Args:
            prompt: Printed before the input field.
            draft: Text that the input field starts with.
            typed: Called after each change with the text typed so far.
        """


def parse(typed: str, commands: Collection[str] = COMMANDS) -> Command | str:
    """Returns a line of input as a command or as a message. Raises ``InputError`` for an unknown command."""
    said = typed.strip()
    if not said.startswith("/"):
        return unquoted(said)
    name, argument = [*said[1:].split(maxsplit=1), "", ""][:2]
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise InputError(f'no command /{name}: {hint} (to send this as a message, put it between """ and """)')
    return Command(name, argument)


def unfinished(typed: str, commands: Collection[str] = COMMANDS) -> str | None:
    """Returns the message typed so far, trailing blanks included, or ``None`` for a command."""
    try:
        said = parse(typed, commands)
    except InputError:
        return None
    return None if isinstance(said, Command) else said + typed[len(typed.rstrip()) :]


def unquoted(text: str) -> str:
    """Returns the text without its enclosing triple quotes, if it has any."""
    if not text.startswith(_QUOTES):
        return text
    return text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")


def is_open(typed: str) -> bool:
    """Whether the text begins with triple quotes that are not closed at its end."""
    opened = _QUOTED.match(typed)
    return opened is not None and not typed[opened.end() :].rstrip().endswith(_QUOTES)


class Lines:
    """Messages from a pipe or a file, one per line; a backslash or quotes continue a message on the next line."""

    interactive = False

    def read(
        self,
        prompt: str,  # noqa: ARG002
        draft: str = "",  # noqa: ARG002
        typed: Callable[[str], None] | None = None,  # noqa: ARG002
    ) -> str | None:
        said = self._line()
        while said is not None and (is_open(said) or said.endswith("\\")):
            more = self._line()
            if more is None:
                return said.removesuffix("\\")
            said = f"{said if is_open(said) else said[:-1]}\n{more}"
        return said

    def _line(self) -> str | None:
        line = sys.stdin.buffer.readline()
        try:
            return line.decode().removesuffix("\n").removesuffix("\r") if line else None
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 text: {error}") from error


class Terminal:
    """Messages typed at a terminal, with an input history in ``folder``."""

    interactive = True

    def __init__(self, folder: Path) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.output import create_output

        history = folder / "history"
        # The history holds private messages: only its owner may read it.
        private_file(history)
        self._leaving = False
        self._typed: Callable[[str], None] | None = None
        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(history)),
            key_bindings=self._keys(),
            multiline=True,
            prompt_continuation=lambda width, _line, wrapped: " " * width if wrapped else "· ".rjust(width),
            output=create_output(always_prefer_tty=True),
        )
        self._session.default_buffer.on_text_changed += self._changed

    def _changed(self, buffer: Buffer) -> None:
        if self._typed is not None:
            self._typed(buffer.text)

    def read(self, prompt: str, draft: str = "", typed: Callable[[str], None] | None = None) -> str | None:
        self._leaving = False
        self._typed = typed
        while True:
            try:
                return self._session.prompt(prompt, default=draft)
            except EOFError:
                return None
            except KeyboardInterrupt:
                err.print("[dim]Ctrl-C once more, or Ctrl-D, quits[/dim]")
                draft = ""

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.current_line_before_cursor.endswith("\\") and not is_open(buffer.text):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            elif is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        @keys.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            # The first Ctrl-C clears the line; Ctrl-C on an empty line quits.
            if event.current_buffer.text:
                event.current_buffer.reset()
            elif self._leaving:
                event.app.exit(exception=EOFError)
            else:
                event.app.exit(exception=KeyboardInterrupt)
            self._leaving = True

        return keys


@contextmanager
def unechoed() -> Iterator[None]:
    """Turns the terminal's echo off; the next prompt receives what was typed meanwhile."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

"""What the user of ``chat`` types, or pipes into it, as messages and commands."""

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
    "save": ("[NAME]", "everything is saved as it is said; with a name, like /fork"),
    "fork": ("NAME", "give the conversation so far another name too, under which it goes its own way"),
    "edit": ("[N] TEXT", "go back to your message N (the last) and say TEXT in its place"),
    "regen": ("", "another answer in place of the last, or the first where there is none"),
    "stats": ("", "show the size of the conversation and what was reused for it"),
    "quit": ("", "leave (Ctrl-D does it too)"),
}
KEYS = (
    "Enter sends. Alt+Enter, or a backslash at the end of a line, breaks the line; pasted text keeps its lines; "
    'what stands between """ and """ is sent as it is. Ctrl-C ends an answer and keeps it.'
)
_QUOTES = '"""'
# A message in quotes, or a command whose text is.
_QUOTED = re.compile(r'\s*(?:/\w+\s+(?:\d+\s+)?)?"""')


class Command(NamedTuple):
    """``/name argument``."""

    name: str
    argument: str


class Reader(Protocol):
    """Where messages come from."""

    interactive: bool
    """Somebody sits there, who can put right what went wrong."""

    def read(self, prompt: str, draft: str = "", typed: Callable[[str], None] | None = None) -> str | None:
        """The next that was said, possibly ``draft`` after some editing; None when there is nothing more to come.

        ``typed`` is told, after each change, what somebody has typed so far.
        """


def parse(typed: str, commands: Collection[str] = COMMANDS) -> Command | str:
    """A command or a message. Raises ``InputError`` for one that is none of the ``commands``."""
    said = typed.strip()
    if not said.startswith("/"):
        return unquoted(said)
    name, argument = [*said[1:].split(maxsplit=1), "", ""][:2]
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1)
        hint = f"did you mean /{near[0]}?" if near else "/help shows them"
        raise InputError(f'no command /{name}: {hint} (a message that begins so goes between """ and """)')
    return Command(name, argument)


def unfinished(typed: str, commands: Collection[str] = COMMANDS) -> str | None:
    """The message that somebody is typing, as far as it has come, with the blanks at its end; None for a command."""
    try:
        said = parse(typed, commands)
    except InputError:
        return None
    return None if isinstance(said, Command) else said + typed[len(typed.rstrip()) :]


def unquoted(text: str) -> str:
    """The text between the quotes, if it is in quotes."""
    if not text.startswith(_QUOTES):
        return text
    return text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")


def is_open(typed: str) -> bool:
    """Whether quotes have been opened at the beginning, and not been closed at the end."""
    opened = _QUOTED.match(typed)
    return opened is not None and not typed[opened.end() :].rstrip().endswith(_QUOTES)


class Lines:
    """Messages from a pipe or a file, a line each but for backslashes and quotes."""

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
    """Messages that somebody types, with a history of them below ``folder``."""

    interactive = True

    def __init__(self, folder: Path) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.output import create_output

        history = folder / "history"
        # What somebody wrote is nobody else's business.
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
            # The first clears the line, and the one on the empty line leaves.
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
    """What is typed meanwhile is not shown in the middle of what is printed; the next prompt gets it."""
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

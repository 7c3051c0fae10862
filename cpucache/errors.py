"""Errors that reach a user. Each message is one line that says what is wrong and what to do about it."""

from __future__ import annotations


class CpucacheError(Exception):
    """A failure at run time. The command line prints the message and exits with status 1."""


class InputError(CpucacheError):
    """Wrong input from the user (a file, an argument, a name). The command line exits with status 2."""


class PMLError(InputError):
    """A schema or prompt that breaks the rules of PML.

    The message is ``file:line: reason`` or ``file:line:column: reason``.

    Attributes:
        file: Name of the document.
        line: Line, 1-based; ``None`` where it is unknown.
        column: Column, 1-based; ``None`` where it is unknown.
        reason: The message without file, line and column.
        others: Further errors in the same document, by line.
    """

    def __init__(self, message: str, *, file: str, line: int | None, column: int | None = None) -> None:
        self.file = file
        self.line = line
        self.column = column
        self.reason = message
        self.others: tuple[PMLError, ...] = ()
        where = ":".join(str(part) for part in (file, line, column) if part is not None)
        super().__init__(f"{where}: {message}")


class ModelError(InputError):
    """A model that can't be found, opened, or used for the request."""


class ContextFull(InputError):
    """A prompt that needs more cells than the llama.cpp context has (``n_ctx``)."""

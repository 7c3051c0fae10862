"""The errors that reach a user. Each carries one line that says what is wrong and what to do about it."""

from __future__ import annotations


class CpucacheError(Exception):
    """Something failed while running: the command line prints the message and exits with status 1."""


class InputError(CpucacheError):
    """What the user gave is wrong (a file, an argument, a name): the command line exits with status 2."""


class PMLError(InputError):
    """A schema or prompt breaks the rules of PML.

    ``file``, ``line`` and ``column`` (both 1-based, the column only where it is known) say where. All are part of the
    message, as ``file:line: what is wrong`` or ``file:line:column: what is wrong``. ``others`` are the further mistakes
    in the same document, by line.
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
    """A model can't be found, opened or used for what was asked."""


class ContextFull(InputError):
    """A prompt needs more cells than the context holds (``n_ctx``)."""

"""The errors that reach a user. Each carries one line that says what is wrong and what to do about it."""

from __future__ import annotations


class CpucacheError(Exception):
    """Something failed while running: the command line prints the message and exits with status 1."""


class InputError(CpucacheError):
    """What the user gave is wrong (a file, an argument, a name): the command line exits with status 2."""


class PMLError(InputError):
    """A schema or prompt breaks the rules of PML.

    ``file`` and ``line`` (1-based) say where; both are part of the message, as ``file:line: what is wrong``.
    """

    def __init__(self, message: str, *, file: str, line: int | None) -> None:
        self.file = file
        self.line = line
        self.reason = message
        super().__init__(f"{file}:{line}: {message}" if line is not None else f"{file}: {message}")


class ModelError(InputError):
    """A model can't be found, opened or used for what was asked."""


class ContextFull(InputError):
    """A prompt needs more cells than the context holds (``n_ctx``)."""

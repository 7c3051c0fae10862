"""Answers of a benchmark, in a file with which an interrupted benchmark continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cpucache.errors import InputError

_BEGINNING = b'{"settings": "'
"""First bytes of every line."""


@dataclass(frozen=True)
class Answer:
    """Answer of one variant to the example on one line of the data."""

    example: int
    variant: str
    text: str
    scores: dict[str, float]
    ttft_ms: float
    prompt_tokens: int
    fresh_tokens: int
    encoded_tokens: int
    """Tokens evaluated before the first token to encode missing slices."""
    again_ms: float = 0.0
    """Time to first token of the same prompt, asked a second time."""
    floor_ms: float = 0.0
    """Time to first token when the same state is in the llama.cpp context already."""
    kl: float = 0.0
    """Kullback-Leibler divergence from full prefill in nats, mean over the tokens of full prefill's answer."""
    same: bool = True
    """Whether the answer equals that of full prefill."""
    exact: int = 0
    """Tokens from exact slices; likewise ``clean``, ``related``, ``foreign``. ``recomputed``: evaluated again."""
    clean: int = 0
    related: int = 0
    foreign: int = 0
    recomputed: int = 0
    schema_ms: float = 0.0
    """Time to encode the schema; for full prefill, time to evaluate all its text once."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the answer for publication: its numbers, and a hash instead of its text."""
        record = asdict(self)
        record["text"] = hashlib.sha256(record["text"].strip().encode()).hexdigest()[:12]
        rounded = {name: round(value, 4) for name, value in record.items() if isinstance(value, float)}
        return {**record, **rounded}


class Results:
    """Answers by example and variant. If ``path`` is given, each answer is at once written there as one line.

    ``settings``: settings that answers and times depend on. The first line holds them, and every line their hash.
    Raises ``InputError`` if the file has other settings, or is not a file of results.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object]) -> None:
        self._answers: dict[tuple[int, str], Answer] = {}
        self._hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self._file = None
        if path is None:
            return
        whole = self._read(path, settings) if path.exists() else 0
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise InputError(f"{path}: can't be written: {error.strerror}") from None
        # A process that was killed may have left part of a line.
        self._file.truncate(whole)
        if not whole:
            self._write({"settings": self._hash, "of": dict(settings)})

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._answers

    def __getitem__(self, key: tuple[int, str]) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answer: Answer) -> None:
        """Adds an answer, and passes its line to the operating system at once."""
        self._answers[answer.example, answer.variant] = answer
        self._write({"settings": self._hash, **asdict(answer)})

    def _write(self, record: Mapping[str, object]) -> None:
        if self._file:
            # One write, so that a reader at the same time, or after a crash, finds whole lines except for the last.
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def _read(self, path: Path, settings: Mapping[str, object]) -> int:
        """Reads the answers in a file, and returns the number of bytes of its whole lines."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror}") from None
        whole = data.rfind(b"\n") + 1
        if not data[whole:].startswith(_BEGINNING[: len(data) - whole]):
            raise InputError(f"{path}: not a file of results; name another file with --results")
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                known = record.pop("settings")
                if number == 1:
                    other = record["of"]
                answer = None if number == 1 else Answer(**record)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path}:{number}: not a line of results; name another file with --results") from None
            if known != self._hash:
                raise InputError(f"{path}: {_difference(other, settings)}; name another file with --results")
            if answer:
                self._answers[answer.example, answer.variant] = answer
        return whole


def _difference(other: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Text of an error about results with other settings, which names the differences."""
    names = [name for name in settings if other.get(name) != settings[name]]
    details = ", ".join(f"{name} {other.get(name)}, now {settings[name]}" for name in names)
    return (
        f"its answers were measured with other settings ({details})" if names else "its lines have different settings"
    )

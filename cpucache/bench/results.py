"""Answers that a benchmark has had, in a file that it goes on from when it is run again."""

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
"""What every line begins with."""


@dataclass(frozen=True)
class Answer:
    """What one variant answered to the example on one line of the data."""

    example: int
    variant: str
    text: str
    scores: dict[str, float]
    ttft_ms: float
    prompt_tokens: int
    fresh_tokens: int
    encoded_tokens: int
    """Tokens evaluated before the first token to make missing slices."""
    again_ms: float = 0.0
    """Time to first token of the same prompt asked a second time."""
    floor_ms: float = 0.0
    """Time to first token when the state lies in the llama.cpp context already."""
    kl: float = 0.0
    """Kullback-Leibler divergence from full prefill, nats, mean along the answer of that."""
    same: bool = True
    """Whether the answer is that of full prefill."""
    exact: int = 0
    """Tokens that came from exact slices; likewise ``clean``, ``related``, ``foreign`` and ``recomputed``."""
    clean: int = 0
    related: int = 0
    foreign: int = 0
    recomputed: int = 0
    schema_ms: float = 0.0
    """Time to encode the schema; of full prefill: to evaluate all its text once."""

    def as_dict(self) -> dict[str, Any]:
        """What may be passed on: a hash in the place of the text, and numbers."""
        record = asdict(self)
        record["text"] = hashlib.sha256(record["text"].strip().encode()).hexdigest()[:12]
        rounded = {name: round(value, 4) for name, value in record.items() if isinstance(value, float)}
        return {**record, **rounded}


class Results:
    """Answers by example and variant; in ``path``, if given, one line each, written as soon as it is there.

    ``settings`` are what answers and times depend on: the first line holds them, and every other their hash. Raises
    ``InputError`` when the file is of other settings, or of something else.
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
        # What was being written when the process was killed is not there.
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
        """Keep an answer, at once on disk as far as this process can see to it."""
        self._answers[answer.example, answer.variant] = answer
        self._write({"settings": self._hash, **asdict(answer)})

    def _write(self, record: Mapping[str, object]) -> None:
        if self._file:
            # One write: whoever reads it meanwhile, or after a crash, finds whole lines but for the last.
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def _read(self, path: Path, settings: Mapping[str, object]) -> int:
        """Take over what is there; gives how many bytes of whole lines there are."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror}") from None
        whole = data.rfind(b"\n") + 1
        if not data[whole:].startswith(_BEGINNING[: len(data) - whole]):
            raise InputError(f"{path}: not a file of results; give another one to --results")
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                known = record.pop("settings")
                if number == 1:
                    other = record["of"]
                answer = None if number == 1 else Answer(**record)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path}:{number}: not a line of results; give another file to --results") from None
            if known != self._hash:
                raise InputError(f"{path}: {_difference(other, settings)}; give another file to --results")
            if answer:
                self._answers[answer.example, answer.variant] = answer
        return whole


def _difference(other: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """In what results were had with other settings."""
    names = [name for name in settings if other.get(name) != settings[name]]
    details = ", ".join(f"{name} {other.get(name)}, now {settings[name]}" for name in names)
    return f"its answers are from other settings ({details})" if names else "its lines are from different settings"

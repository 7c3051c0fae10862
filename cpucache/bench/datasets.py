"""Examples from published files: questions with passages and right answers, as JSON Lines, gzipped or not."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpucache.errors import InputError

OTHERS = 5
"""Default number of passages of a question, for files that hold one passage per question."""

_PASSAGE = re.compile(r"^Passage \d+:[ \t]*\n?", re.MULTILINE)
_FIRST = ("Ann", "Ben", "Eva", "Ivo", "Kim", "Leo", "Mia", "Noa", "Pia", "Rob", "Tom", "Zoe")
_LAST = ("Berg", "Cole", "Diaz", "Fox", "Hale", "King", "Lind", "Moss", "Ross", "Shaw", "West")
# Multi-News writes this word for a newline.
_NEWLINES = re.compile(r"[ \t]*NEWLINE_CHAR[ \t]*")


@dataclass(frozen=True)
class Passage:
    """A text to answer from, and its title, which may be empty."""

    title: str
    text: str


@dataclass(frozen=True)
class Example:
    """One question. ``line``: its line in the file, from 1, by which results identify it.

    ``question`` is empty if the task itself says what to do. ``choices``: possible answers, for questions that have
    them. ``single``: the file holds one passage for the question, the one with the answer; others are drawn for it.
    """

    line: int
    question: str
    passages: tuple[Passage, ...]
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    single: bool = False
    gold: int = 0
    """Number of the passage with the answer, from 0, for a question that is ``single``."""
    chosen: tuple[int, ...] | None = None
    """Numbers, from 0, of the passages that the prompt names, in its order; ``None``: all, in the schema's order."""
    unions: int | None = None
    """Number of unions whose members the passages are; ``None``: the passages are modules outside unions."""
    asker: str = ""
    """Name of the person who asks, the argument of a parameter in the schema; empty: the schema has no parameter."""

    @property
    def slots(self) -> list[range]:
        """Numbers of the passages in each union; without unions, one range for each passage."""
        size = len(self.passages)
        count = self.unions or size
        return [range(size * each // count, size * (each + 1) // count) for each in range(count)]


def read_examples(path: Path, *, passages: int | None = None, seed: int = 0) -> list[Example]:
    """Returns every example of a file, in an order drawn with ``seed``.

    Three formats of lines are read:

    - LongBench: ``input``, ``context`` (split into passages at "Passage 1:", "Passage 2:" ...), ``answers``, and
      ``all_classes`` or ``choices`` for questions that have them.
    - MuSiQue: ``question``, ``ctxs`` (a list of ``title`` and ``text``), ``answers``.
    - One gold passage: ``question``, ``title``, ``text``, ``answers``. Passages of other questions, drawn with ``seed``
      too, are added up to ``passages`` (default 5); the gold one has a random number among them.

    Raises ``InputError`` if the file can't be read, or a line has none of these formats.
    """
    examples = [_example(line, number, path) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not examples:
        raise InputError(f"{path}: the file has no examples")
    if passages is not None and not any(example.single for example in examples):
        raise InputError(f"{path}: the file has several passages for each question; leave out --passages")
    gold = list(dict.fromkeys(example.passages[0] for example in examples if example.single))
    count = OTHERS if passages is None else passages
    examples = [_joined(example, gold, count, seed, path) if example.single else example for example in examples]
    random.Random(seed).shuffle(examples)
    return examples


def selected(
    examples: Sequence[Example],
    *,
    seed: int,
    pick: int | None = None,
    of: int | None = None,
    drop: float = 0.0,
    shuffle: bool = False,
    unions: int | None = None,
    argument: bool = False,
) -> list[Example]:
    """Returns the questions with a selection of passages each.

    Args:
        examples: Questions, in the order in which they are asked.
        seed: Seed of the selection.
        pick: Number of passages that a prompt names, in random order, including the one with the answer.
        of: Number of passages of a schema, with ``pick`` or ``unions``. As many questions share the schema; each
            passage answers one of them.
        drop: Without ``pick`` and ``unions``: probability of leaving out a passage that holds no answer.
        shuffle: Whether the prompt names the passages in random order, with ``drop`` or ``unions``.
        unions: Number of unions whose members the passages of a schema are, instead of ``pick``. A prompt names one
            member of each.
        argument: Whether each question has an argument of its own for a parameter in the schema's text.

    Returns:
        The questions. With ``pick`` or ``unions``, those that do not fill a last schema are left out.

    Raises:
        InputError: There are too few questions or passages, or the file has several passages for a question.
    """
    if argument:
        askers = random.Random(seed)
        examples = [replace(example, asker=f"{askers.choice(_FIRST)} {askers.choice(_LAST)}") for example in examples]
    if unions is not None:
        return _in_unions(examples, seed, of, unions, shuffle)
    if pick is None:
        return [_dropped(example, drop, random.Random(f"{seed}:{example.line}"), shuffle) for example in examples]
    if of is None or not 0 < pick <= of:
        raise InputError("--pick K needs --of M, where M is at least K")
    found = []
    for number, example in _shared(examples, of, "--pick"):
        draw = random.Random(f"{seed}:{example.line}")
        others = [index for index in range(of) if index != number]
        chosen = [*draw.sample(others, pick - 1), number]
        draw.shuffle(chosen)
        found.append(replace(example, chosen=tuple(chosen)))
    return found


def _in_unions(examples: Sequence[Example], seed: int, of: int | None, unions: int, shuffle: bool) -> list[Example]:
    if of is None or not 0 < unions <= of:
        raise InputError("--unions N needs --of M, where M is at least N")
    found = []
    for number, example in _shared([replace(example, unions=unions) for example in examples], of, "--unions"):
        draw = random.Random(f"{seed}:{example.line}")
        chosen = [number if number in slot else draw.choice(slot) for slot in example.slots]
        if shuffle:
            draw.shuffle(chosen)
        found.append(replace(example, chosen=tuple(chosen)))
    return found


def _shared(examples: Sequence[Example], of: int, option: str) -> Iterator[tuple[int, Example]]:
    """Yields questions with the passages of the schema that ``of`` of them share, and the number of the gold one."""
    if len(examples) < of:
        raise InputError(f"--of {of} needs at least {of} questions; the file has {len(examples)}")
    for begin in range(0, len(examples) - of + 1, of):
        group = examples[begin : begin + of]
        if not all(example.single for example in group):
            raise InputError(f"{option} needs a file that has one passage, the one with the answer, for each question")
        # The passage with the answer is the one in the file.
        passages = tuple(example.passages[example.gold] for example in group)
        for number, example in enumerate(group):
            yield number, replace(example, passages=passages, gold=number)


def _dropped(example: Example, drop: float, draw: random.Random, shuffle: bool) -> Example:
    if not (drop or shuffle):
        return example
    holds = [any(answer.casefold() in each.text.casefold() for answer in example.answers) for each in example.passages]
    if example.single:
        holds[example.gold] = True
    chosen = [index for index, right in enumerate(holds) if right or draw.random() >= drop] or [0]
    if shuffle:
        draw.shuffle(chosen)
    return replace(example, chosen=tuple(chosen))


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from None
    try:
        # splitlines() would also split at separators that JSON texts may hold unescaped.
        return data.decode().split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8; a JSON Lines file is expected") from None


def _example(line: str, number: int, path: Path) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not JSON ({error}); one object is expected on each line") from None
    where = f"{path}:{number}"
    if not isinstance(record, dict):
        raise InputError(f"{where}: an object is expected on each line, not {type(record).__name__}")
    answers = _texts(record, "answers", where)
    if not answers:
        raise InputError(f"{where}: 'answers' is empty; at least one is needed")
    if "context" in record:
        classes = "choices" if record.get("choices") else "all_classes"
        choices = _texts(record, classes, where) if record.get(classes) else ()
        return Example(number, _text(record, "input", where), _parts(record, where), answers, choices)
    question = _text(record, "question", where)
    if "ctxs" in record:
        ctxs = record["ctxs"]
        if not (isinstance(ctxs, list) and ctxs and all(isinstance(each, dict) for each in ctxs)):
            raise InputError(f"{where}: 'ctxs' must be a list of objects with 'title' and 'text'")
        return Example(number, question, tuple(_passage(each, where) for each in ctxs), answers)
    if "text" in record:
        return Example(number, question, (_passage(record, where),), answers, single=True)
    raise InputError(f"{where}: no passages: one of 'context', 'ctxs' and 'text' is expected")


def _parts(record: dict[str, Any], where: str) -> tuple[Passage, ...]:
    """Passages of a LongBench context; the whole context if it has no headings of passages."""
    context = _NEWLINES.sub("\n", _text(record, "context", where))
    texts = [text.strip() for text in _PASSAGE.split(context)]
    passages = tuple(Passage("", text) for text in texts if text)
    if not passages:
        raise InputError(f"{where}: 'context' is empty")
    return passages


def _passage(record: dict[str, Any], where: str) -> Passage:
    title = _text(record, "title", where) if record.get("title") else ""
    return Passage(title.strip(), _text(record, "text", where).strip())


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: " + (f"'{name}' is not text" if name in record else f"no '{name}'"))
    return value


def _texts(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = record.get(name)
    if not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        raise InputError(f"{where}: " + (f"'{name}' is not a list of texts" if name in record else f"no '{name}'"))
    return tuple(value)


def _joined(example: Example, gold: Sequence[Passage], count: int, seed: int, path: Path) -> Example:
    """The example with ``count`` passages, drawn by the seed and the line only."""
    (own,) = example.passages
    # Another passage of the same article may answer the question, too.
    others = [each for each in gold if each.text != own.text and not (own.title and each.title == own.title)]
    if len(others) < count - 1:
        raise InputError(
            f"{path}:{example.line}: the file has {len(others)} passages of other questions, too few for --passages "
            f"{count}"
        )
    draw = random.Random(f"{seed}:{example.line}")
    passages = draw.sample(others, count - 1)
    number = draw.randrange(count)
    passages.insert(number, own)
    return replace(example, passages=tuple(passages), gold=number)

"""Small files of questions with passages, of each kind that is read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

MULTI_NEWS = [
    {
        "input": "",
        "context": f"Passage 1:\nThe river rose on day {day}. NEWLINE_CHAR NEWLINE_CHAR Nobody was hurt.\n"
        "Passage 2:\nA bridge in Passage 3: of the town was closed.\n",
        "answers": [f"After {day} days of rain a bridge was closed."],
        "length": 20,
        "dataset": "multi_news",
        "all_classes": None,
    }
    for day in range(1, 5)
]
TREC = [
    {
        "input": "Who found it?",
        "context": "Examples of questions.",
        "answers": ["a person"],
        "all_classes": ["a person", "a place"],
    },
]
MUSIQUE = [
    {
        "question": f"Who wrote book {number}?",
        "ctxs": [
            {"title": "", "text": f"Book {number} is by Ann & Bob <ab@cd>."},
            {"title": "Paris", "text": "A town.\u2028\x00"},
        ],
        "answers": ["Ann & Bob", "Bob"],
    }
    for number in range(6)
]
ORACLE = [
    {
        "question": f"what is {number}",
        "answers": [f"it is {number}"],
        "title": f"T{number // 2}",
        "text": f"No. {number}.",
    }
    for number in range(20)
]


def write_data(folder: Path, lines: list[Any], *, name: str = "data.jsonl", zipped: bool = False) -> Path:
    """Write a file of examples, or of lines as they are."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path = folder / name
    path.write_bytes(gzip.compress(text) if zipped else text)
    return path

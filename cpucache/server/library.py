"""The library: schemas uploaded over HTTP, and how much of each is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from cpucache.engine import Engine
from cpucache.layout import SchemaLayout
from cpucache.layout.schema import Extent
from cpucache.pml import parse_schema
from cpucache.reuse import Slice
from cpucache.server.background import Background, Job
from cpucache.server.failures import Refusal


@dataclass(eq=False)
class Uploaded:
    """An uploaded schema."""

    text: str
    layout: SchemaLayout
    slices: list[Slice]
    """The slices that encoding the schema creates, whether the store has them yet or not."""
    job: Job | None = None
    """The latest job that encodes the schema."""

    @property
    def name(self) -> str:
        """Name by which prompts refer to the schema."""
        return self.layout.schema.name

    @property
    def size(self) -> int:
        """Length of the text in bytes, as UTF-8."""
        return len(self.text.encode())


class Library:
    """The schemas of one namespace. Schemas are lost when the server ends; their slices stay in the store.

    Args:
        engine: Lays out and encodes the schemas.
        background: Runs the encoding jobs.
        most: Number of schemas at most.
        most_bytes: Length of all their texts together at most, in bytes as UTF-8.
    """

    def __init__(self, engine: Engine, background: Background, most: int, most_bytes: int) -> None:
        self._engine = engine
        self._background = background
        self._most = most
        self._most_bytes = most_bytes
        self._schemas: dict[str, Uploaded] = {}

    def add(self, text: str) -> Uploaded:
        """Adds a schema from its PML text, and replaces one of the same name.

        Raises ``PMLError`` or ``InputError`` for an invalid schema, ``Refusal`` (400, 413) beyond a limit.
        """
        # No folder is given, so ``src`` can't name a file: the text comes from a client.
        schema = parse_schema(text, file="schema")
        others = [each for each in list(self._schemas.values()) if each.name != schema.name]
        if len(others) >= self._most:
            raise Refusal(400, f"there are {self._most} schemas already; delete one")
        if len(text.encode()) + sum(each.size for each in others) > self._most_bytes:
            raise Refusal(413, f"all schemas together may have at most {self._most_bytes >> 20} MiB; delete one")
        layout = self._engine.add_schema(schema)
        before = self._schemas.get(schema.name)
        if before is not None and before.job is not None:
            before.job.cancel()
        added = self._schemas[schema.name] = Uploaded(text, layout, self._engine.reading(schema.name))
        return added

    def all(self) -> list[Uploaded]:
        """All schemas, in the order in which their names were first added."""
        return list(self._schemas.values())

    def get(self, name: str) -> Uploaded:
        """Returns the schema with a name. Raises ``Refusal`` (404)."""
        found = self._schemas.get(name)
        if found is None:
            raise Refusal(404, f"no schema '{name}' has been uploaded; POST it to /v1/schemas", code="schema_not_found")
        return found

    def delete(self, name: str) -> None:
        """Deletes a schema and cancels its job. Its slices stay until evicted. Raises ``Refusal`` (404)."""
        found = self.get(name)
        if found.job is not None:
            found.job.cancel()
        del self._schemas[name]
        self._engine.planner.schemas.pop(name, None)

    def encode(self, name: str) -> Uploaded:
        """Queues a job that encodes a schema, unless one waits or runs. Raises ``Refusal`` (404, 429)."""
        found = self.get(name)
        if found.job is None or not found.job.active:
            found.job = self._background.add(Job(partial(self._engine.encode, name)))
        return found

    # -- as sent to clients ------------------------------------------------------------------------------------------
    def told(self, schema: Uploaded, *, whole: bool = False) -> dict[str, Any]:
        """JSON object of a schema; with ``whole``, also its text and its modules as a tree."""
        kept = [slice_ for slice_ in schema.slices if slice_.key in self._engine.store]
        tokens = sum(len(segment.tokens) for segment in schema.layout.segments)
        told: dict[str, Any] = {
            "object": "schema",
            "name": schema.name,
            "tokens": tokens,
            "positions": schema.layout.positions,
            "segments": {"encoded": len(kept), "total": len(schema.slices)},
            "encoding": self._encoding(schema, kept),
        }
        if whole:
            encoded: dict[str, int] = {}
            for slice_ in kept:
                encoded[slice_.module] = encoded.get(slice_.module, 0) + len(slice_.tokens)
            told |= {"text": schema.text, "tree": _tree(schema.layout.extent, "", encoded)}
        return told

    @staticmethod
    def _encoding(schema: Uploaded, kept: list[Slice]) -> dict[str, Any]:
        done, total = (sum(len(slice_.tokens) for slice_ in slices) for slices in (kept, schema.slices))
        state = "none" if schema.job is None else schema.job.state
        state = "done" if done == total else "none" if state == "done" else state
        error = None if schema.job is None or schema.job.error is None else str(schema.job.error)
        return {"state": state, "done": done, "total": total, "error": error}


def _tree(extent: Extent, path: str, encoded: dict[str, int]) -> dict[str, Any]:
    """JSON object of a node and its children: positions [start, end), own tokens, and how many of these are encoded."""
    here = f"{path}.{extent.name}".strip(".") if extent.kind == "module" else path
    own = extent.kind in ("schema", "module")
    return {
        "kind": extent.kind,
        "name": extent.name,
        "start": extent.start,
        "end": extent.end,
        "tokens": extent.own,
        "encoded": encoded.get(here, 0) if own else 0,
        "cache": extent.cache,
        "children": [_tree(child, here, encoded) for child in extent.children],
    }

"""The library: schemas that were uploaded over HTTP, and what of them is encoded."""

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
    """A schema."""

    text: str
    layout: SchemaLayout
    slices: list[Slice]
    """What encoding makes."""
    job: Job | None = None
    """Encodes it."""

    @property
    def name(self) -> str:
        """What prompts call it."""
        return self.layout.schema.name


class Library:
    """The schemas of one namespace. Schemas live as long as the server; their slices stay in the store.

    Args:
        engine: Lays schemas out, and encodes them.
        background: Where they are encoded.
        most: Schemas.
        most_bytes: Of all their texts.
    """

    def __init__(self, engine: Engine, background: Background, most: int, most_bytes: int) -> None:
        self._engine = engine
        self._background = background
        self._most = most
        self._most_bytes = most_bytes
        self._schemas: dict[str, Uploaded] = {}

    def add(self, text: str) -> Uploaded:
        """Take a schema in, in place of one of the same name. Raises ``PMLError``, ``InputError`` and ``Refusal``."""
        # No folder: a schema that came by a request names no files.
        schema = parse_schema(text, file="schema")
        others = [each for each in list(self._schemas.values()) if each.name != schema.name]
        if len(others) >= self._most:
            raise Refusal(400, f"there are {self._most} schemas already; delete one")
        if len(text) + sum(len(each.text) for each in others) > self._most_bytes:
            raise Refusal(413, f"all schemas have {self._most_bytes >> 20} MiB at most; delete one")
        layout = self._engine.add_schema(schema)
        before = self._schemas.get(schema.name)
        if before is not None and before.job is not None:
            before.job.cancel()
        added = self._schemas[schema.name] = Uploaded(text, layout, self._engine.reading(schema.name))
        return added

    def all(self) -> list[Uploaded]:
        """Every schema, in the order in which they came."""
        return list(self._schemas.values())

    def get(self, name: str) -> Uploaded:
        """A schema by its name. Raises ``Refusal`` (404)."""
        found = self._schemas.get(name)
        if found is None:
            raise Refusal(404, f"no schema '{name}' has been uploaded; POST it to /v1/schemas", code="schema_not_found")
        return found

    def delete(self, name: str) -> None:
        """Forget a schema. Its slices leave by eviction. Raises ``Refusal`` (404)."""
        found = self.get(name)
        if found.job is not None:
            found.job.cancel()
        del self._schemas[name]
        self._engine.planner.schemas.pop(name, None)

    def encode(self, name: str) -> Uploaded:
        """Have a schema encoded in the background, unless it is at the moment. Raises ``Refusal`` (404, 429)."""
        found = self.get(name)
        if found.job is None or not found.job.active:
            found.job = self._background.add(Job(partial(self._engine.encode, name)))
        return found

    # -- as clients are told -----------------------------------------------------------------------------------------
    def told(self, schema: Uploaded, *, whole: bool = False) -> dict[str, Any]:
        """A schema as JSON; ``whole``: with its text, and its modules as a tree."""
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
    """A node of a schema: positions ``start`` to ``end``, of whose own ``tokens`` so many are ``encoded``."""
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

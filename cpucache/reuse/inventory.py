"""Lists the stored slices of a schema, and compares the slices of two versions of a schema."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cpucache.layout import SchemaLayout, Segment
from cpucache.reuse.encoder import tokens_to_evaluate
from cpucache.reuse.plan import Slice
from cpucache.reuse.reading import reading, scaffolded
from cpucache.reuse.slices import Slices
from cpucache.store import Row, content_key

Verdict: TypeAlias = Literal["kept", "usable", "stale", "new"]
"""Effect of an edit on a slice of the new schema.

``kept``: the old schema has the same slice. ``usable``: the slice must be encoded again in its new context; until then
prompts use an old slice of the same text, whose context the new schema still allows. ``stale``: the slice must be
encoded again, and no old slice of its text can be used. ``new``: the old schema does not have its text.
"""

_OTHER = "(other text)"


@dataclass(frozen=True)
class CachedSlice:
    """A stored slice of a segment. ``attended`` lists the modules whose text it attended to, in order."""

    row: Row
    attended: tuple[str, ...]


def inventory(layout: SchemaLayout, rows: Iterable[Row]) -> dict[Segment, list[CachedSlice]]:
    """Returns the stored slices of each segment of a schema, whatever their contexts.

    Args:
        layout: The schema.
        rows: The stored slices to choose from, see ``Store``.
    """
    names = module_names(layout)
    by_content: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_content.setdefault((row.info.fingerprint, row.info.state_format, row.info.content), []).append(row)
    kinds = {(fingerprint, state_format) for fingerprint, state_format, _ in by_content}
    found: dict[Segment, list[CachedSlice]] = {}
    for segment in layout.segments:
        found[segment] = [
            CachedSlice(row, _attended(row, names))
            for fingerprint, state_format in sorted(kinds)
            for row in by_content.get(
                (fingerprint, state_format, content_key(fingerprint, state_format, segment.tokens)), []
            )
        ]
    return found


def module_names(layout: SchemaLayout) -> dict[bytes, str]:
    """Maps the ``text_id`` of each text of a schema to the name of its module."""
    names = dict.fromkeys(layout.texts, "(argument)")
    names.update((segment.id, segment.module or "(schema)") for segment in reversed(layout.segments))
    return names


def _attended(row: Row, names: dict[bytes, str]) -> tuple[str, ...]:
    """Names of the modules that a stored slice attended to, in order, each once."""
    return tuple(dict.fromkeys(names.get(text, _OTHER) for text in row.info.texts))


@dataclass(frozen=True)
class Change:
    """The effect of an edit on one slice, and the reason. ``tokens`` is the length of the slice."""

    module: str
    tokens: int
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class Edit:
    """The effect of an edit on all slices of a schema."""

    changes: tuple[Change, ...]
    """One change for each slice of the new schema, in the order of encoding."""
    evaluated: int
    """Number of tokens to evaluate to encode all slices that are not ``kept``."""
    dropped: int
    """Number of old slices that are not among the new schema's."""
    dropped_tokens: int
    """Number of tokens of the dropped slices."""

    def slices(self, *verdicts: Verdict) -> int:
        """Number of slices with one of these verdicts."""
        return sum(change.verdict in verdicts for change in self.changes)

    def tokens(self, *verdicts: Verdict) -> int:
        """Number of tokens of the slices with one of these verdicts."""
        return sum(change.tokens for change in self.changes if change.verdict in verdicts)


def compare(old: SchemaLayout, new: SchemaLayout, room: int) -> Edit:
    """Returns the effect of an edit on the slices that ``Engine.encode`` saved for a schema.

    Args:
        old: The schema before the edit.
        new: The schema after the edit, laid out for the same model.
        room: Maximum size of a slice with its context, in cells.
    """
    # Keys are only compared with each other, so the model and the state format may stay empty.
    slices = Slices("", "")
    before = {slice_.key: slice_ for slice_ in _encoded(old, slices, room)}
    after = _encoded(new, slices, room)
    by_content: dict[str, list[Slice]] = {}
    for slice_ in before.values():
        by_content.setdefault(slices.content(slice_.tokens), []).append(slice_)
    names = {**module_names(old), **module_names(new)}
    segments = {slices.content(segment.tokens): segment for segment in new.segments}
    changes: list[Change] = []
    missing: list[Slice] = []
    for slice_ in after:
        size = len(slice_.tokens)
        if slice_.key in before:
            changes.append(Change(slice_.module, size, "kept"))
            continue
        missing.append(slice_)
        content = slices.content(slice_.tokens)
        alike = by_content.get(content)
        if not alike:
            changes.append(Change(slice_.module, size, "new", "its text is new"))
            continue
        limit = new.may_attend_to(segments[content])
        allowed = new.texts if limit is None else limit
        usable = any(allowed.issuperset(other.attends_to) for other in alike)
        changes.append(Change(slice_.module, size, "usable" if usable else "stale", _why(alike[0], slice_, names)))
    kept = {slice_.key for slice_ in after}
    dropped = [slice_ for key, slice_ in before.items() if key not in kept]
    return Edit(
        tuple(changes), tokens_to_evaluate(missing), len(dropped), sum(len(slice_.tokens) for slice_ in dropped)
    )


def _encoded(layout: SchemaLayout, slices: Slices, room: int) -> list[Slice]:
    """Returns the slices that encoding a schema builds, each after the slices of its context."""
    built = dict.fromkeys(reading(layout, slices, room))
    for scaffold in layout.schema.scaffolds:
        built.update(dict.fromkeys(scaffolded(layout, slices, scaffold.modules, room)))
    return list(built)


def _why(old: Slice, new: Slice, names: dict[bytes, str]) -> str:
    """The reason for which a slice differs from an old one of the same text: its position, or its context."""
    if old.attends_to == new.attends_to:
        return "its position has changed" if old.context_key == new.context_key else "text before it has moved"
    for was, now in zip((*old.attends_to, None), (*new.attends_to, None), strict=False):
        if was != now:
            changed = now if now is not None and now not in old.attends_to else was if was is not None else now
            return f"{names.get(changed or b'', _OTHER)} before it has changed"
    return "text before it has changed"

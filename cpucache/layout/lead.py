"""Leads: modules evaluated behind the text that stands before them, instead of as if nothing did.

A module that is evaluated right behind its ancestors' text takes itself for the first of its kind, and all of its
tokens attend to a beginning that is none. Some of the text that does stand before it, evaluated with it and not kept,
brings it close to what full prefill gives (bench/RESULTS.md), and costs nothing when it is spliced. It must be the
right text: the end of another leads it astray. So modules have a lead where a schema foresees what stands before them,
and are otherwise as they are apart.

Modules that stand together are evaluated in one go, each led by those before it: a stretch of them is twice as long as
the lead of its first, so that encoding with leads takes half as long again as without, whatever their sizes. (Behind a
union there is one lead for each of its members.)

A lead is only taken where nothing of it is missing. Where something is, one of an eighth of the length takes its
place, and so on; at last, whatever is there of the nearest few tokens. So a module is encoded a few times at most,
however many combinations prompts make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from cpucache.layout.place import Contexts, Outline
from cpucache.layout.plan import Piece
from cpucache.layout.segment import Segment
from cpucache.layout.vocabulary import Tokens, empty, joined
from cpucache.pml.tree import Module, Schema, Scope, Union

LEAD = 2048
"""Tokens of a lead at least, where nothing else is said and the schema has as much there."""
SHORT = 32
"""Tokens of a lead where no longer one is complete. They bring half of the effect."""
_SHORTER = 8  # times, where a lead is not complete
_STRETCH = 2  # times the lead


class Leads:
    """The segments of a schema with leads: the same object for the same segment behind the same text.

    ``woven`` gives the segments of scaffold sets, each with what it is apart; they have seen what stands before them,
    and get no lead.
    """

    def __init__(self, schema: Schema, outline: Outline, woven: Mapping[Segment, Segment], contexts: Contexts) -> None:
        self._schema = schema
        self._outline = outline
        self._woven = woven
        self._contexts = contexts
        self._foreseen: set[tuple[Segment, Segment]] = set()
        self._first: set[Segment] = set()
        self._offset: dict[Segment, int] = {}
        self._chosen: dict[Segment, frozenset[Module]] = {}
        self._made: dict[tuple[object, ...], Segment] = {}
        if schema.anchor == "ancestors":
            self._foresee(schema, set(), 0, frozenset())

    def led(self, pieces: Sequence[Piece], count: int) -> list[Piece]:
        """What a prompt consists of, its segments with leads where the schema has just what stands before them there.

        A lead is what stands before it of the same stretch of the schema, ``_STRETCH * count`` tokens long, and
        ``count`` tokens before that. Where a prompt leaves out some of it, an eighth takes the place of ``count``, down
        to ``SHORT``.
        """
        instead: dict[Segment, Segment] = {}
        found: list[Piece] = []
        for index, piece in enumerate(pieces):
            if isinstance(piece, Segment) and piece.cache and piece not in self._woven and count:
                instead[piece] = self._segment(piece, self._lead(piece, pieces[:index], count), instead)
                found.append(instead[piece])
            else:
                found.append(piece)
        return found

    def segments(self, count: int) -> list[Segment]:
        """Those with leads that prompts need which leave nothing out: of each member of a union behind the member at
        the same place of the union before it, contexts before what needs them."""
        members = max((len(part.members) for part in self._parts() if isinstance(part, Union)), default=1)
        made: dict[Segment, None] = {}
        for choice in range(members):
            pieces = self.led(list(self._reading(self._schema, choice)), count)
            made.update((piece, None) for piece in pieces if isinstance(piece, Segment) and piece.led)
        return list(made)

    def _segment(
        self, segment: Segment, lead: Sequence[Segment | Tokens], instead: Mapping[Segment, Segment]
    ) -> Segment:
        sight = tuple(instead.get(seen, seen) for seen in segment.sees if not any(seen is piece for piece in lead))
        tokens = joined([piece.tokens if isinstance(piece, Segment) else piece for piece in lead])
        if not len(tokens) and sight == segment.sees:
            return segment
        key = (segment, tokens.tobytes(), *sight)
        if key not in self._made:
            self._made[key] = replace(segment, context=self._contexts.of(sight), lead=tokens)
        return self._made[key]

    def _lead(self, segment: Segment, pieces: Sequence[Piece], count: int) -> list[Segment | Tokens]:
        while True:
            lead, complete = self._before(segment, pieces, count)
            if complete or count <= SHORT:
                return lead
            count = max(SHORT, count // _SHORTER)

    def _before(self, segment: Segment, pieces: Sequence[Piece], count: int) -> tuple[list[Segment | Tokens], bool]:
        """What of the pieces before it leads it, as far back as the schema foresees them: segments, and the end of the
        first. And whether that is all that it would be in a prompt that leaves nothing out.

        What it sees is among them, as a whole, where something stands before that which it does not see. Of members of
        unions, only the nearest: there would be as many leads as combinations otherwise.
        """
        lead: list[Segment | Tokens] = []
        size = _STRETCH * count
        behind = segment
        chosen = self._chosen.get(segment, frozenset())
        nearest = True
        complete = False
        for piece in reversed(pieces):
            before = self._woven.get(piece, piece) if isinstance(piece, Segment) else None
            if before is None or (before, behind) not in self._foreseen:
                break
            seen = before in segment.sees
            if nearest and not seen:
                chosen |= self._chosen[before]
                nearest = False
            complete = not self._chosen[before] <= chosen
            if complete:
                break
            near = self._offset[before] // size == self._offset[segment] // size
            complete = not near and (count <= 0 or (seen and len(before.tokens) > count))
            if complete:
                break
            whole = near or len(before.tokens) <= count
            lead.insert(0, before if whole else before.tokens[-count:])
            count -= 0 if near else len(before.tokens)
            behind = before
        while lead and any(lead[0] is seen for seen in segment.sees):
            del lead[0]
        return lead, complete or behind in self._first

    # -- the schema --------------------------------------------------------------------------------------------------
    def _foresee(
        self, scope: Scope, before: set[Segment], offset: int, chosen: frozenset[Module]
    ) -> tuple[set[Segment], int]:
        """Note what may stand right before what in a prompt that leaves nothing out, and what behind nothing, or an
        argument; how many tokens stand before it then at most, and which members of unions it lies in. Gives what may
        stand last, and where it ends."""
        for part in self._outline[scope]:
            if isinstance(part, Segment):
                self._foreseen.update((each, part) for each in before)
                if all(each.placeholder for each in before):
                    self._first.add(part)
                self._offset[part], self._chosen[part] = offset, chosen
                before, offset = {part}, offset + len(part.tokens)
            elif isinstance(part, Module):
                before, offset = self._foresee(part, before, offset, chosen)
            else:
                ends = [self._foresee(member, before, offset, chosen | {member}) for member in part.members]
                before = set().union(*(last for last, _ in ends))
                offset = max(end for _, end in ends)
        return before, offset

    def _parts(self) -> Iterator[Segment | Module | Union]:
        for parts in self._outline.values():
            yield from parts

    def _reading(self, scope: Scope, choice: int) -> Iterator[Piece]:
        """The pieces of a prompt that leaves nothing out, with this member of unions that have as many."""
        for part in self._outline[scope]:
            if isinstance(part, Segment):
                yield empty() if part.placeholder else part
            elif isinstance(part, Module):
                yield from self._reading(part, choice)
            else:
                yield from self._reading(part.members[min(choice, len(part.members) - 1)], choice)

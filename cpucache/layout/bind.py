"""Binding: a prompt, resolved against its schema, on the schema's layout gives a plan."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator

from cpucache.errors import InputError, PMLError
from cpucache.layout.chain import Chains
from cpucache.layout.plan import Piece, Plan, schedule
from cpucache.layout.refresh import Refresh
from cpucache.layout.schema import SchemaLayout
from cpucache.layout.segment import Segment
from cpucache.layout.turns import Turns
from cpucache.layout.vocabulary import Tokens
from cpucache.pml.tree import Argument, Included, Module, NewText, Role, RoleEnd, RoleStart, Schema, Text, Turn


def bind(
    layout: SchemaLayout,
    included: Included,
    *,
    file: str = "<prompt>",
    packed: bool | None = None,
    scaffolds: bool = True,
    lead: int = 0,
    refresh: Refresh | None = None,
    exact: Chains | None = None,
) -> Plan:
    """The plan of a prompt.

    ``packed`` lets slices stand back to back even where the layout reserves positions. ``scaffolds=False`` takes every
    module as it is apart from the others, even where the prompt includes the whole of a scaffold set. ``lead`` takes
    modules as they are behind up to so many tokens of what stands before them, where the schema has that before them,
    too. ``refresh`` says which tokens of slices are evaluated afresh. ``exact`` makes slices of this combination of
    modules, arguments and text instead, each in the sight of all before it, back to back. ``file`` is what errors call
    the prompt. Raises ``PMLError`` when an argument is longer than its parameter.
    """
    binding = _Binding(layout, included, file, scaffolds=scaffolds)
    binding.scope(included)
    binding.answer()
    binding.check()
    if exact:
        return exact.exact(binding.pieces)
    pieces = layout.leads.led(binding.pieces, lead)
    return schedule(pieces, packed=layout.packed if packed is None else packed, refresh=refresh)


def bind_opening(
    layout: SchemaLayout, included: Included, *, file: str = "<prompt>", lead: int = 0, refresh: Refresh | None = None
) -> tuple[Plan, Turns, bool]:
    """The plan of a prompt that a conversation begins with, for more to follow.

    Besides the plan, gives the turns to go on with, and whether the prompt waits for an answer.
    """
    binding = _Binding(layout, included, file)
    binding.scope(included)
    binding.check()
    plan = schedule(layout.leads.led(binding.pieces, lead), packed=layout.packed, ends=False, refresh=refresh)
    return plan, binding.turns, binding.turns.role == "user"


class _Binding:
    def __init__(self, layout: SchemaLayout, included: Included, file: str, *, scaffolds: bool = True) -> None:
        self.layout = layout
        self.file = file
        self.pieces: list[Piece] = []
        order = {module: index for index, module in enumerate(_modules(included))}
        # Where sets overlap, the text of a module is that of the first of them.
        used = [each.segment_at for each in layout.scaffolds if each.fits(order)] if scaffolds else []
        self._segment_at = ChainMap(*used, layout.segment_at)
        self.turns = Turns(layout.template, layout.vocabulary)
        self._answered = True  # nothing asks for an answer: the text simply goes on

    def scope(self, included: Included) -> None:
        if isinstance(included.scope, Schema):
            self._segment(included.scope)
        for item in included.items:
            if isinstance(item, Included):
                self.scope(item)
            elif isinstance(item, Text):
                self._segment(item)
                self._answered = True
            elif isinstance(item, (RoleStart, RoleEnd)):
                self.turns.role = item.node.role
                self._answered = item.node.role == "assistant"
                self._segment(item.node, end=isinstance(item, RoleEnd))
            elif isinstance(item, Argument):
                self.pieces.append(self._argument(item))
            elif isinstance(item, NewText):
                self.pieces.append(self.layout.vocabulary.tokenize(item.text))
                self._answered = True
            elif isinstance(item, Turn):
                self._turn(item)

    def answer(self) -> None:
        """Open the model's answer, unless the prompt's last turn already did, or is plain text to go on with."""
        if not self._answered:
            self.pieces.append(self.turns.answer())

    def check(self) -> None:
        """Raise ``InputError`` when there is no text at all."""
        if not self.stands_before():
            raise InputError(f"{self.file}: the prompt is empty: it includes no text of its schema and brings none")

    def _segment(self, node: Text | Role | Schema, *, end: bool = False) -> None:
        segment = self._segment_at.get((node, "end" if end else ""))
        # Neighbouring pieces of text share a segment, and nothing can stand between them.
        if segment is not None and not (self.pieces and self.pieces[-1] is segment):
            self.pieces.append(segment)

    def _argument(self, item: Argument) -> Tokens:
        tokens = self.layout.vocabulary.tokenize(item.value)
        length = item.parameter.length
        if len(tokens) > length:
            raise PMLError(
                f"the argument for '{item.parameter.name}' is {len(tokens)} tokens long, {len(tokens) - length} more "
                f"than the {length} that the schema reserves (line {item.parameter.line})",
                file=self.file,
                line=item.line,
            )
        return tokens

    def _turn(self, turn: Turn) -> None:
        self.turns.begun = self.stands_before()
        self.pieces.append(self.turns.turn(turn.role, turn.text))
        # The last turn may be the beginning of an answer, for the model to go on with.
        self._answered = turn.role == "assistant"

    def stands_before(self) -> bool:
        """Whether there is any text so far."""
        tokens = sum(len(piece.tokens) if isinstance(piece, Segment) else len(piece) for piece in self.pieces)
        return tokens > (self.layout.vocabulary.bos is not None)


def _modules(included: Included) -> Iterator[Module]:
    """The modules of a prompt in reading order."""
    if isinstance(included.scope, Module):
        yield included.scope
    for item in included.items:
        if isinstance(item, Included):
            yield from _modules(item)

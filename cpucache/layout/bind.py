"""Binding: a prompt, resolved against its schema, on the schema's layout gives a plan."""

from __future__ import annotations

from cpucache.errors import InputError, PMLError
from cpucache.layout.plan import Piece, Plan, schedule
from cpucache.layout.schema import SchemaLayout
from cpucache.layout.segment import Segment
from cpucache.layout.vocabulary import Tokens
from cpucache.pml.tree import Argument, Included, Module, NewText, RoleEnd, RoleName, RoleStart, Schema, Text, Turn


def bind(layout: SchemaLayout, included: Included, *, file: str = "<prompt>", packed: bool | None = None) -> Plan:
    """The plan of a prompt.

    ``packed`` lets slices stand back to back even where the layout reserves positions. ``file`` is what errors call the
    prompt. Raises ``PMLError`` when an argument is longer than its parameter.
    """
    binding = _Binding(layout, file)
    binding.scope(included)
    binding.answer()
    if not binding.stands_before():
        raise InputError(f"{file}: the prompt is empty: it includes no text of its schema and brings none")
    return schedule(binding.pieces, packed=layout.packed if packed is None else packed)


class _Binding:
    def __init__(self, layout: SchemaLayout, file: str) -> None:
        self.layout = layout
        self.file = file
        self.pieces: list[Piece] = []
        self._role: RoleName | None = None  # the role before
        self._open = False  # an assistant's turn is waiting to be continued
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
                self._role = item.node.role
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
            self.pieces.append(self._template_text(self.layout.template.generation(self._role)))

    def _segment(self, node: Text | Schema | Module | object, *, end: bool = False) -> None:
        segment = self.layout.segment_at.get((node, "end" if end else ""))  # type: ignore[arg-type]
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
        template = self.layout.template
        if self._open:
            self.pieces.append(self._template_text(template.end("assistant")))
        start = template.start(turn.role, previous=self._role, first=not self.stands_before())
        if not self.stands_before() and self.layout.vocabulary.bos is not None:
            start = start.removeprefix(self.layout.vocabulary.special_text("bos"))
        self.pieces += [self._template_text(start), self.layout.vocabulary.tokenize(turn.text)]
        self._role = turn.role
        # The last turn may be the beginning of an answer, for the model to go on with.
        self._open = self._answered = turn.role == "assistant"
        if not self._open:
            self.pieces.append(self._template_text(template.end(turn.role)))

    def stands_before(self) -> bool:
        """Whether there is any text so far."""
        tokens = sum(len(piece.tokens) if isinstance(piece, Segment) else len(piece) for piece in self.pieces)
        return tokens > (self.layout.vocabulary.bos is not None)

    def _template_text(self, text: str) -> Tokens:
        return self.layout.vocabulary.tokenize(text, special=True)

"""Binding: turns a prompt that is resolved against its schema into a list of pieces on the schema's layout."""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.errors import InputError, PMLError
from cpucache.layout.schema import SchemaLayout
from cpucache.layout.segment import NewText, Piece
from cpucache.layout.turns import Turns
from cpucache.layout.vocabulary import Tokens, empty, joined
from cpucache.pml import tree
from cpucache.pml.tree import Argument, Included, Role, RoleEnd, RoleStart, Schema, Text, Turn


@dataclass(frozen=True)
class Bound:
    """A prompt bound to the layout of its schema."""

    layout: SchemaLayout
    pieces: list[Piece]
    """Pieces of the prompt, in reading order."""
    turns: Turns
    """State of the turns at the end of the prompt, for later turns of a conversation."""
    asks: bool
    """Whether the last turn is a user message."""

    @property
    def tokens(self) -> Tokens:
        """Tokens of all pieces, concatenated."""
        return joined([piece.tokens for piece in self.pieces])

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all pieces."""
        return sum(len(piece.tokens) for piece in self.pieces)


def bind(layout: SchemaLayout, included: Included, *, file: str = "<prompt>", opens: bool = False) -> Bound:
    """Binds a prompt to the layout of its schema.

    The tokens that open the model's answer end the prompt, except where the prompt ends with plain text or an assistant
    turn, which the model continues, and where ``opens`` is true.

    Args:
        layout: Layout of the prompt's schema.
        included: The prompt, resolved against the schema.
        file: Name of the prompt in error messages.
        opens: Whether the prompt begins a conversation, whose next message will ask for an answer.

    Raises:
        PMLError: An argument is longer than its parameter.
        InputError: The prompt holds no text.
    """
    binding = _Binding(layout, file)
    binding.scope(included)
    asks = binding.turns.role == "user"
    if not opens:
        binding.answer()
    if not binding.stands_before():
        raise InputError(f"{file}: the prompt is empty: it includes no text of its schema and has no text of its own")
    return Bound(layout, binding.pieces, binding.turns, asks)


class _Binding:
    def __init__(self, layout: SchemaLayout, file: str) -> None:
        self.layout = layout
        self.file = file
        self.pieces: list[Piece] = []
        self.turns = Turns(layout.template, layout.vocabulary)
        self._answered = True  # initially no turn asks for an answer: the model continues the text

    def scope(self, included: Included) -> None:
        if isinstance(included.scope, Schema):
            self._text(included.scope)
        for item in included.items:
            if isinstance(item, Included):
                self.scope(item)
            elif isinstance(item, Text):
                self._text(item)
                self._answered = True
            elif isinstance(item, RoleStart | RoleEnd):
                self.turns.role = item.node.role
                self._answered = item.node.role == "assistant"
                self._text(item.node, end=isinstance(item, RoleEnd))
            elif isinstance(item, Argument):
                self._argument(item)
            elif isinstance(item, tree.NewText):
                self._new(self.layout.vocabulary.tokenize(item.text))
                self._answered = True
            elif isinstance(item, Turn):
                self._turn(item)

    def answer(self) -> None:
        """Appends the tokens that open the model's answer, if the prompt asks for one."""
        if not self._answered:
            self._new(self.turns.answer())

    def stands_before(self) -> bool:
        """Whether the pieces so far hold any text besides ``bos``."""
        return sum(len(piece.tokens) for piece in self.pieces) > (self.layout.vocabulary.bos is not None)

    def _text(self, node: Text | Role | Schema, *, end: bool = False) -> None:
        segments = self.layout.segments_at.get((node, "end" if end else ""), [])
        # Adjacent texts share segments, and no other piece can stand between them: append the segments once.
        if segments and not (self.pieces and self.pieces[-1] is segments[-1]):
            self.pieces += segments

    def _new(self, tokens: Tokens, placeholder: Tokens | None = None) -> None:
        # Tokens may be empty: an empty argument has a placeholder, and some templates add no text.
        if len(tokens) or placeholder is not None:
            self.pieces.append(NewText(tokens, empty() if placeholder is None else placeholder))

    def _argument(self, item: Argument) -> None:
        tokens = self.layout.vocabulary.tokenize(item.value)
        length = item.parameter.length
        if len(tokens) > length:
            raise PMLError(
                f"the argument for '{item.parameter.name}' is {len(tokens)} tokens long, {len(tokens) - length} more "
                f"than the {length} that the schema reserves (line {item.parameter.line})",
                file=self.file,
                line=item.line,
            )
        self._new(tokens, self.layout.placeholder(item.parameter))

    def _turn(self, turn: Turn) -> None:
        self.turns.begun = self.stands_before()
        self._new(self.turns.turn(turn.role, turn.text))
        # If the last turn is the assistant's, the model continues it.
        self._answered = turn.role == "assistant"

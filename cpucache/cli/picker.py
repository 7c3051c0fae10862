"""The list of ``ask``, in which modules are picked with the keyboard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpucache.cli.console import safe
from cpucache.cli.selection import Row, Selection
from cpucache.engine import Engine
from cpucache.errors import InputError, PMLError
from cpucache.layout import SchemaLayout, Segment
from cpucache.pml.tree import Parameter
from cpucache.reuse import Plan

if TYPE_CHECKING:
    from prompt_toolkit import Application
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

KEYS = "↑↓ move · space picks · typing fills a field · Enter asks · Ctrl-C leaves"
_MARKS = {("module", True): "[x]", ("module", False): "[ ]", ("member", True): "(•)", ("member", False): "( )"}
_NAME = 44  # columns of names at most


@dataclass(frozen=True)
class Cost:
    """Number of tokens of a module's own text, and how many of them are cached."""

    tokens: int
    cached: int
    always: bool
    """Whether it is evaluated in every prompt (``cache="false"``)."""

    def __str__(self) -> str:
        if not self.tokens:
            return ""
        if self.always:
            state = "evaluated each time"
        elif self.cached == self.tokens:
            state = "cached"
        else:
            state = f"{self.cached:,} cached" if self.cached else "to be evaluated"
        return f"{self.tokens:>7,} tokens  {state}"


def costs(engine: Engine, layout: SchemaLayout) -> dict[str, Cost]:
    """The cost of each module of a schema, by its dotted path."""
    own: dict[str, list[Segment]] = {}
    for segment in layout.segments:
        own.setdefault(segment.module, []).append(segment)
    contents = {segment: engine.slices.content(segment.tokens) for segment in layout.segments}
    known = engine.store.variants(contents.values())
    return {
        path: Cost(
            sum(len(each.tokens) for each in segments),
            sum(len(each.tokens) for each in segments if known.get(contents[each])),
            not all(each.cache for each in segments),
        )
        for path, segments in own.items()
    }


def price(plan: Plan) -> str:
    """Returns the cost of a plan, in words."""
    evaluated = plan.n_tokens - plan.n_cached + sum(len(span.tokens) for span in plan.spans if span.missing)
    return f"{plan.n_tokens:,} tokens: {plan.n_tokens - evaluated:,} cached, {evaluated:,} to be evaluated"


class Picker:
    """Shows a selection as a list, and lets somebody change it.

    Args:
        selection: Is changed.
        costs: The cost of each module, by its dotted path.
        planned: Returns the plan of the current selection. Errors that it raises are shown.
    """

    def __init__(self, selection: Selection, costs: dict[str, Cost], planned: Callable[[], Plan]) -> None:
        self._selection = selection
        self._costs = costs
        self._planned = planned
        self._rows = selection.rows()
        self._at = 0
        self._total = ""
        self._wrong = ""
        self._weigh()

    def run(self) -> bool:
        """Whether somebody wants to ask now, instead of leaving."""
        return bool(self._application().run())

    # -- changes -----------------------------------------------------------------------------------------------------
    @property
    def _row(self) -> Row | None:
        return self._rows[self._at] if self._rows else None

    def _weigh(self) -> None:
        try:
            self._total, self._wrong = price(self._planned()), ""
        except (InputError, PMLError) as error:
            self._wrong = str(error)

    def _move(self, by: int) -> None:
        self._at = max(0, min(self._at + by, len(self._rows) - 1))

    def _toggle(self) -> None:
        if self._row is not None:
            self._selection.toggle(self._row)
            self._rows = self._selection.rows()
            self._weigh()

    # -- display -----------------------------------------------------------------------------------------------------
    def _drawn(self) -> StyleAndTextTuples:
        width = min(_NAME, max((2 * row.depth + 4 + len(row.node.name) for row in self._rows), default=0))
        lines: StyleAndTextTuples = []
        for index, row in enumerate(self._rows):
            style = "reverse" if index == self._at else ""
            indent = "  " * row.depth
            if row.kind == "parameter":
                text = f"{indent}    {row.node.name} = {row.value}"
            else:
                name = f"{indent}{_MARKS[row.kind, row.picked]} {row.node.name}"
                text = f"{name:<{width}}  {self._costs.get(row.path, Cost(0, 0, False))}"
            lines.append((style, f"{safe(text)}\n"))
        return lines or [("", "(the schema has no modules: a prompt includes all of its text)\n")]

    def _below(self) -> StyleAndTextTuples:
        return [("ansired" if self._wrong else "", safe(self._wrong or self._total)), ("", f"\n{KEYS}")]

    def _field(self) -> StyleAndTextTuples:
        row = self._row
        most = f", {row.node.length} tokens at most" if row and isinstance(row.node, Parameter) else ""
        return [("bold", f"{safe(row.node.name) if row else ''}{most}: ")]

    def _application(self) -> Application[bool]:
        from prompt_toolkit import Application
        from prompt_toolkit.buffer import Buffer
        from prompt_toolkit.data_structures import Point
        from prompt_toolkit.document import Document
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.layout import (
            BufferControl,
            ConditionalContainer,
            FormattedTextControl,
            HSplit,
            Layout,
            Window,
        )
        from prompt_toolkit.layout.dimension import Dimension
        from prompt_toolkit.layout.processors import BeforeInput
        from prompt_toolkit.output import create_output

        def changed(buffer: Buffer) -> None:
            if self._row is not None and self._row.kind == "parameter" and self._row.value != buffer.text:
                self._selection.give(self._row, buffer.text)
                self._weigh()

        value = Buffer(multiline=False, on_text_changed=changed)
        in_field = Condition(lambda: self._row is not None and self._row.kind == "parameter")
        listed = Window(
            FormattedTextControl(
                self._drawn, focusable=True, show_cursor=False, get_cursor_position=lambda: Point(0, self._at)
            ),
            height=lambda: Dimension(preferred=len(self._rows) or 1),
            dont_extend_height=True,
        )
        field = Window(BufferControl(value, input_processors=[BeforeInput(self._field)]), height=1)
        below = Window(
            FormattedTextControl(self._below), height=Dimension(min=2), wrap_lines=True, dont_extend_height=True
        )

        def turn(event: KeyPressEvent) -> None:
            """Give the keyboard to what the row at hand wants."""
            row = self._row
            if row is not None and row.kind == "parameter":
                value.document = Document(row.value)
            event.app.layout.focus(field if in_field() else listed)

        application: Application[bool] = Application(
            Layout(HSplit([listed, ConditionalContainer(field, in_field), below]), focused_element=listed),
            key_bindings=self._keys(turn, in_field),
            output=create_output(always_prefer_tty=True),
            erase_when_done=True,
        )
        if in_field() and self._row is not None:
            value.document = Document(self._row.value)
            application.layout.focus(field)
        return application

    def _keys(self, turn: Callable[[KeyPressEvent], None], in_field: Callable[[], bool]) -> KeyBindings:
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()
        listing = ~Condition(in_field)

        def moves(by: int, *names: str) -> None:
            for name in names:

                @keys.add(name)
                def _(event: KeyPressEvent) -> None:
                    self._move(by)
                    turn(event)

        moves(-1, "up", "s-tab")
        moves(1, "down", "tab")
        moves(-10, "pageup")
        moves(10, "pagedown")

        @keys.add(" ", filter=listing)
        def _(event: KeyPressEvent) -> None:
            self._toggle()
            turn(event)

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            if not self._wrong:
                event.app.exit(result=True)

        @keys.add("c-c")
        @keys.add("c-d")
        @keys.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result=False)

        return keys

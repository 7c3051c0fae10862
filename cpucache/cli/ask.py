"""``cpucache ask``: questions about modules that are picked from a list."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from cpucache.authoring.writing import write_prompt
from cpucache.cli.answering import answered, begun, note
from cpucache.cli.chat_input import Command, Terminal, parse, unfinished
from cpucache.cli.chat_screen import Answer, figures, markdown_answer, plain_answer
from cpucache.cli.console import check_prompt, err, out
from cpucache.cli.options import engine_options, fidelity_options, sampling_options, split_fidelity
from cpucache.cli.picker import Picker, costs, price
from cpucache.cli.pml_files import write_file
from cpucache.cli.run import split_sampling
from cpucache.cli.selection import Selection
from cpucache.engine import Engine, Preparation, TypingAhead
from cpucache.errors import InputError
from cpucache.layout import SchemaLayout
from cpucache.pml import is_prompt, load_prompt, load_schema
from cpucache.reuse import Plan
from cpucache.sessions import default_sessions

COMMANDS = {
    "help": ("", "show this"),
    "modules": ("", "pick modules again"),
    "save": ("FILE", "write the modules and the last question to a prompt file, for `cpucache run`"),
    "quit": ("", "quit (as does Ctrl-D)"),
}


@click.command(short_help="Pick modules of a schema from a list, and ask questions about them.")
@click.argument("prompt", metavar="[PROMPT]", required=False)
@click.option("-s", "--schema", metavar="FILE", required=True, help="The schema of the modules.")
@engine_options
@sampling_options
@fidelity_options
@click.option(
    "--plain", is_flag=True, help="Show answers as plain text, not as Markdown.  [default: unless a terminal]"
)
def ask(prompt: str | None, schema: str, model: str, max_tokens: int, plain: bool, **options: Any) -> None:
    """Pick modules of a schema from a list, and ask questions about them, at a terminal.

    The list has the modules of the schema (-s): the arrow keys move, the space bar picks. Of a union, one member at
    most can be picked; the parameters of picked modules are fields to type into. Beside each module are its tokens, and
    whether its state is cached or has to be evaluated. Enter opens the questions.

    Each question is asked about the same modules, without the questions before it (for a conversation, see `cpucache
    chat --prompt`). A question is evaluated while it is typed, word by word: on Enter only the last word remains, and
    the answer begins at once. /modules returns to the list, /help lists the commands.

    /save FILE writes the picked modules and the last question as a PML prompt: `cpucache run FILE -s SCHEMA` gives the
    same answer, and `cpucache ask FILE -s SCHEMA` begins with them.

    With PROMPT, a PML file, the list begins with the modules and arguments of that prompt, and its message is the first
    question. Without a terminal use `cpucache run PROMPT -s SCHEMA`.

    \b
    cpucache ask -s schemas/trip/schema.xml
    cpucache ask schemas/trip/kyoto-first-visit.xml -s schemas/trip/schema.xml
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError("ask needs a terminal; without one, use `cpucache run PROMPT -s SCHEMA` with a PML file")
    settings = {"sampling": split_sampling(options), "max_tokens": max_tokens}
    exactness = split_fidelity(options)
    tree = load_schema(Path(schema))
    given = None if prompt is None else load_prompt(Path(prompt))
    if given is not None:
        check_prompt(given, [tree])
    plain = plain or not out.is_terminal or out.is_dumb_terminal
    with Engine(model, **options) as engine:
        layout = engine.add_schema(tree)
        show = plain_answer if plain else markdown_answer(out)
        _Ask(engine, layout, Selection(tree, given), show, settings, exactness).run()


class _Ask:
    """The dialogue: picking modules, then asking questions."""

    def __init__(
        self,
        engine: Engine,
        layout: SchemaLayout,
        selection: Selection,
        show: Answer,
        settings: dict[str, Any],
        exactness: dict[str, Any],
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._selection = selection
        self._show = show
        self._settings = settings
        self._exactness = exactness
        self._ahead = TypingAhead(self._prepare)
        self._asked = selection.draft or None
        """The last question."""

    def run(self) -> None:
        """Runs the dialogue until the user leaves."""
        draft = self._selection.draft
        while self._pick() and self._questions(draft):
            draft = ""

    def _pick(self) -> bool:
        return Picker(self._selection, costs(self._engine, self._layout), self._planned).run()

    def _planned(self) -> Plan:
        return self._engine.plan(self._selection.prompt(""), **self._exactness)

    def _questions(self, draft: str) -> bool:
        """Answers questions about the picked modules. Returns whether the user wants to pick others."""
        names = ", ".join(self._selection.names) or "no module"
        note(f"{names}; {price(self._planned())}; /help lists the commands")
        reader = Terminal(default_sessions())
        number = 1
        while True:
            # Before the first word: loads the slices of the modules, and encodes missing ones.
            self._ahead.typed("")
            typed = reader.read(f"{number}> ", draft, self._typed)
            self._ahead.stop()
            draft = ""
            if typed is None:
                return False
            try:
                said = parse(typed, COMMANDS)
                if isinstance(said, Command):
                    if said.name in ("modules", "quit"):
                        return said.name == "modules"
                    if said.name == "save":
                        self._save(said.argument)
                    else:
                        self._help()
                elif said.strip():
                    self._answer(said)
                    number += 1
            except InputError as error:
                err.print(f"cpucache: {error}", markup=False, soft_wrap=True)

    def _typed(self, typed: str) -> None:
        text = unfinished(typed, COMMANDS)
        if text is not None:
            self._ahead.typed(text)

    def _prepare(self, text: str) -> Preparation:
        return self._engine.prepare(self._selection.prompt(text), unfinished=True, **self._exactness)

    def _help(self) -> None:
        for name, (argument, about) in COMMANDS.items():
            note(f"{f'/{name} {argument}':<11} {about}")

    def _save(self, name: str) -> None:
        """Writes the picked modules and the last question to a file, which must be new or a prompt."""
        if not name:
            raise InputError("/save FILE: name the file to write the prompt to")
        # Unlike that of ``Path``, this leaves the name of a user who does not exist as it is.
        path = Path(os.path.expanduser(name))  # noqa: PTH111
        written = write_prompt(self._selection.prompt(self._asked))
        try:
            if path.exists() and not is_prompt(path.read_text(encoding="utf-8", errors="replace")):
                raise InputError(f"{path}: this file exists and is not a PML prompt; name another file")
            write_file(path, written)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        files = f"{shlex.quote(str(path))} -s {shlex.quote(self._selection.schema.file)}"
        note(f"written: `cpucache run {files}` asks the same")

    def _answer(self, question: str) -> None:
        self._asked = question
        prompt = self._selection.prompt(question)
        stream = answered(
            lambda **settings: self._engine.stream(prompt, **settings),
            self._show,
            **self._settings,
            **self._exactness,
        )
        if stream is not None and begun(stream):
            note(figures(stream.metrics))
        else:
            note("interrupted before the answer began")

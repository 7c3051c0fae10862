"""``cpucache chat``: conversations that can be resumed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.markup import escape
from rich.table import Table

from cpucache.cli.answering import answered, begun, note
from cpucache.cli.chat_input import (
    COMMANDS,
    KEYS,
    Command,
    Lines,
    Reader,
    Terminal,
    parse,
    unfinished,
    unquoted,
)
from cpucache.cli.chat_screen import Answer, figures, markdown_answer, overflow, plain_answer
from cpucache.cli.console import check_prompt, err, out, seconds
from cpucache.cli.options import check_text_fidelity, engine_options, fidelity_options, sampling_options, split_fidelity
from cpucache.cli.run import split_sampling
from cpucache.engine import Engine, Sampling, TypingAhead
from cpucache.engine.leaving import WHEN_FULL
from cpucache.engine.session import Session
from cpucache.engine.stream import Stream
from cpucache.errors import InputError
from cpucache.models import known_models
from cpucache.models.weights import weights_file
from cpucache.pml import load_prompt, load_schema
from cpucache.sessions import Transcripts, default_sessions
from cpucache.sessions.records import check_name

_RECAP = 400  # characters of a message that are shown when a conversation is opened


@click.command(context_settings={"default_map": {"max_tokens": 1024, "temperature": 0.7}})
@click.argument("name", metavar="[SESSION]", default="default")
@engine_options
@sampling_options
@fidelity_options
@click.option("--system", metavar="TEXT", help="System text of a new conversation.")
@click.option("--prompt", metavar="FILE", help="PML prompt that a new conversation begins with; needs -s.")
@click.option("-s", "--schema", metavar="FILE", help="Schema of that prompt.")
@click.option(
    "--when-full",
    type=click.Choice(WHEN_FULL),
    default="oldest",
    show_default=True,
    help="When the context is full: drop the oldest turns, drop half of the turns at once, or refuse further messages.",
)
@click.option(
    "--plain", is_flag=True, help="Show answers as plain text, not as Markdown.  [default: unless a terminal]"
)
def chat(
    name: str,
    model: str,
    max_tokens: int,
    system: str | None,
    prompt: str | None,
    schema: str | None,
    when_full: Any,
    plain: bool,
    **options: Any,
) -> None:
    """Talk with a model. SESSION names the conversation, new or existing ("default" unless given).

    Every turn is saved with its KV state. A conversation can be resumed days later, or in another window, without
    evaluating its turns again. /help lists the commands. An existing conversation uses the model that it was started
    with, unless -m names another.

    With --reuse anywhere, a document pasted into a message is not evaluated again if another prompt or conversation
    holds it, whatever precedes it there.

    Messages may be piped in, one per line. Answers go to standard output, everything else to standard error.

    \b
    cpucache chat
    cpucache chat recipes --system "You answer in one sentence."
    """
    if (prompt is None) != (schema is None):
        raise click.UsageError("--prompt and --schema go together")
    if system is not None and prompt is not None:
        raise click.UsageError("--system and --prompt exclude each other")
    check_name(name)
    if click.get_current_context().get_parameter_source("model") is ParameterSource.DEFAULT:
        model = _model_of(name) or model
    exactness = split_fidelity(options)
    if prompt is None:
        check_text_fidelity(exactness)
    settings = {"sampling": split_sampling(options), "max_tokens": max_tokens}
    first_prompt = None if prompt is None else load_prompt(Path(prompt))
    schema_tree = None if schema is None else load_schema(Path(schema))
    if first_prompt is not None and schema_tree is not None:
        check_prompt(first_prompt, [schema_tree])
    plain = plain or not out.is_terminal or out.is_dumb_terminal
    with Engine(model, refine="idle", **options) as engine:
        if schema_tree is not None:
            engine.add_schema(schema_tree)
        with engine.session(name, system=system, prompt=first_prompt, when_full=when_full, **exactness) as session:
            reader = Terminal(default_sessions()) if sys.stdin.isatty() else Lines()
            _Chat(engine, session, reader, plain_answer if plain else markdown_answer(out), settings).run()


def _model_of(name: str) -> str | None:
    """Name of the model of a saved conversation: from the catalogue, or a GGUF file in the same folder."""
    transcripts = Transcripts()
    try:
        if name not in transcripts:
            return None
        stem = transcripts.summary(name).model
    finally:
        transcripts.close()
    known = next((model.name for model in known_models().values() if Path(model.filename).stem == stem), None)
    return known or (f"{stem}.gguf" if weights_file(f"{stem}.gguf") else None)


class _Chat:
    """Runs a conversation with messages from a terminal or a pipe."""

    def __init__(
        self, engine: Engine, session: Session, reader: Reader, answer: Answer, settings: dict[str, Any]
    ) -> None:
        self._engine = engine
        self._session = session
        self._reader = reader
        self._show = answer
        self._settings = settings
        self._draft = ""
        self._ahead = TypingAhead(partial(session.prepare, max_tokens=settings["max_tokens"]))
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "save": self._save,
            "fork": self._fork,
            "edit": self._edit,
            "regen": self._regenerate,
            "stats": self._stats,
        }

    def run(self) -> None:
        """Answers messages until the input ends or the user leaves."""
        session = self._session
        if any(entry.role in ("user", "assistant") for entry in session.entries):
            self._recap()
        elif self._reader.interactive:
            note(f"conversation '{session.name}' with {self._engine.model.path.stem}; /help lists the commands")
        if session.unanswered:
            if session.entries[-1].role == "user":
                note("the last message has no answer yet; answering it now")
            self._answer(session.stream)
        while True:
            draft, self._draft = self._draft, ""
            typed = self._reader.read(f"{len(self._said()) + 1}> ", draft, self._typed)
            self._ahead.stop()
            if typed is None:
                return
            try:
                said = parse(typed)
                if isinstance(said, Command):
                    if said.name == "quit":
                        return
                    self._commands[said.name](said.argument)
                elif said.strip():
                    self._answer(lambda said=said, **settings: session.stream(said, **settings))
            except InputError as error:
                if not self._reader.interactive:
                    raise
                err.print(f"cpucache: {error}", markup=False, soft_wrap=True)

    # -- turns -------------------------------------------------------------------------------------------------------
    def _answer(self, ask: Callable[..., Stream], **changed: Any) -> None:
        stream = answered(ask, self._show, **self._settings | changed)
        if stream is None or not begun(stream):
            kept = "the message is kept, /regen answers it" if self._session.unanswered else "nothing has changed"
            note(f"interrupted before the answer began: {kept}")
        else:
            note(figures(stream.metrics))
            if stream.metrics.left_out_tokens:
                note(overflow(stream.metrics, moved=self._engine.context.memory.moves))
        if not self._reader.interactive and (stream is None or stream.metrics.finish == "interrupted"):
            # Ctrl-C ends a run with piped messages; at a terminal it ends only the answer.
            raise KeyboardInterrupt

    def _typed(self, typed: str) -> None:
        """Evaluates ahead the text that the user has typed so far."""
        text = unfinished(typed)
        if text and not text.isspace():
            self._ahead.typed(text)

    def _said(self) -> list[str]:
        return [entry.text for entry in self._session.entries if entry.role == "user"]

    def _recap(self) -> None:
        session = self._session
        said = [entry for entry in session.entries if entry.role in ("user", "assistant")]
        gone = f", {session.left_out:,} messages have left the context" if session.left_out else ""
        note(
            f"conversation '{session.name}' with {self._engine.model.path.stem}: "
            f"{len(said):,} messages, the next turn attends to {session.n_tokens:,} tokens{gone}"
        )
        for entry in said[-2:]:
            text = entry.text.strip()
            short = text if len(text) <= _RECAP else f"{text[:_RECAP].rstrip()} …"
            note(f"{'>' if entry.role == 'user' else '<'} {short}")

    # -- commands ----------------------------------------------------------------------------------------------------
    def _help(self, _argument: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (argument, about) in COMMANDS.items():
            table.add_row(escape(f"/{name} {argument}"), about)
        err.print(table)
        err.print(KEYS, markup=False)

    def _save(self, argument: str) -> None:
        if argument:
            self._fork(argument)
        else:
            note(f"the conversation is saved already: `cpucache chat {self._session.name}` resumes it")

    def _fork(self, argument: str) -> None:
        if not argument:
            raise InputError("/fork NAME: give a name for the copy")
        self._session.fork(argument)
        note(f"copied to conversation '{argument}': `cpucache chat {argument}` resumes it")

    def _edit(self, argument: str) -> None:
        said = self._said()
        number, text = re.fullmatch(r"(?:(\d+)(?:\s+|$))?(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        index = len(said) if number is None else int(number)
        if text:
            self._answer(lambda **settings: self._session.edit(index, unquoted(text), **settings))
        elif self._reader.interactive and 1 <= index <= len(said):
            self._draft = f"/edit {index} {said[index - 1]}"
        else:
            raise InputError("/edit [N] TEXT: give the number of your message and its new text")

    def _regenerate(self, _argument: str) -> None:
        sampling: Sampling = self._settings["sampling"]
        if sampling.temperature == 0:
            note("at temperature 0 the answer is the same again; use --temp above 0 for other answers")
        # With its seed, the answer would be the same again.
        self._answer(self._session.regenerate, sampling=replace(sampling, seed=None))

    def _stats(self, _argument: str) -> None:
        session, engine = self._session, self._engine
        turns = [entry.metrics for entry in session.entries if entry.role == "assistant"]
        cached, fresh, answered = (
            sum(turn.get(name, 0) for turn in turns) for name in ("cached_tokens", "fresh_tokens", "completion_tokens")
        )
        rows = [
            ("conversation", f"{session.name}, with {engine.model.path.stem}"),
            ("messages", f"{len([entry for entry in session.entries if entry.role in ('user', 'assistant')]):,}"),
            ("context", f"{session.n_tokens:,} of {engine.context.n_ctx:,} tokens"),
            ("left the context", f"{session.left_out:,} messages"),
            ("tokens of prompts", f"{cached:,} from cache, {fresh:,} evaluated"),
            ("tokens of answers", f"{answered:,}"),
        ]
        if turns:
            first = sum(turn.get("ttft_ms", 0) for turn in turns) / len(turns)
            rows.append(("first token after", f"{seconds(first)} on average"))
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(f"[dim]{name}[/dim]", escape(value))
        err.print(table)

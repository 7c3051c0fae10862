"""``cpucache schema from-jinja``, ``from-files`` and ``from-messages``: schemas from what there is already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from rich.progress import Progress
from rich.table import Column

from cpucache.cli.console import err, listing
from cpucache.cli.pml_files import write_file
from cpucache.errors import InputError
from cpucache.pml.names import flaw, quote

if TYPE_CHECKING:
    from cpucache.pml.tree import SchemaNode

_Command = TypeVar("_Command", bound=Callable[..., object])
_PER_TOKEN = 4
"""Bytes of a token, where no model counts them."""
_LISTED = 20
"""Rows of a report."""


def _output_options(command: _Command) -> _Command:
    output = click.option(
        "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the schema into this file."
    )
    name = click.option("--name", metavar="NAME", help="Name of the schema.")
    return output(name(command))


_model_option = click.option(
    "-m", "--model", metavar="MODEL", help="Count tokens of this model: a name of the catalogue, or a GGUF."
)


@click.command("from-jinja")
@click.argument("template", metavar="TEMPLATE")
@_output_options
@click.option(
    "--length", type=click.IntRange(1, 999_999_999), default=32, show_default=True, help="Tokens of each parameter."
)
@click.option(
    "--trim", is_flag=True, help="Drop the line break after a tag and the blanks before it, as chat templates do."
)
def from_jinja(template: str, output: Path | None, name: str | None, length: int, trim: bool) -> None:
    """Turn a Jinja TEMPLATE (- for standard input) into a schema, on standard output.

    Text stays text. {% if %} becomes a module, and a union with {% else %}. {{ name }} becomes a parameter, and
    |default("...") its scaffold. A loop over constants becomes a module for each item, {% block %} a module, and
    {% include %} a module with src; the schema must be in the folder of the file, or in a folder around it.

    Parts that can't be converted are listed on standard error, with their lines: loops over arguments become
    parameters, filters of arguments are not applied, and macros are left out.

    \b
    cpucache schema from-jinja support.jinja -o support.xml
    """
    from cpucache.authoring import jinja

    path = Path(template)
    try:
        source = (sys.stdin.buffer.read() if template == "-" else path.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{template}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise InputError(f"{template}: {error.strerror}") from error
    shown, folder = ("<stdin>", Path.cwd()) if template == "-" else (template, path.parent)
    base = Path.cwd() if output is None else output.parent
    if output is None and not folder.resolve().is_relative_to(base.resolve()):
        base = folder
    turned = jinja.from_jinja(source, file=shown, folder=folder, base=base, length=length, trim=trim)
    usual = "template" if template == "-" else path.name.partition(".")[0]
    _write(turned.nodes, _named(name, usual), output, base)
    for left in turned.left:
        _tell(str(left))


@click.command("from-files")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--glob", "patterns", multiple=True, default=("**/*",), show_default=True, help="Which files. Repeatable."
)
@_output_options
@click.option(
    "--budget", type=click.IntRange(1), metavar="TOKENS", help="Leave out files that would exceed this. Needs -m."
)
@_model_option
def from_files(
    folder: Path,
    patterns: tuple[str, ...],
    output: Path | None,
    name: str | None,
    budget: int | None,
    model: str | None,
) -> None:
    """Make a schema of the files in DIR: each becomes a module with src, in the order of their paths.

    Files that git ignores are skipped; empty files and files that are not text are left out. With --budget, files that
    do not fit are left out; smaller files after them may fit. Standard error lists the files that were left out.

    A schema can only read files in its own folder: save it in DIR, or in a folder around DIR.

    \b
    cpucache schema from-files docs --glob '**/*.md' -o docs/schema.xml
    cpucache schema from-files . --glob '**/*.py' --budget 6000 -m smollm2-135m-instruct -o schema.xml
    """
    from cpucache.authoring import files

    if budget is not None and model is None:
        raise click.UsageError("--budget needs -m / --model, which counts the tokens")
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    inside = folder.resolve()
    base = Path.cwd() if output is None else output.parent
    if not inside.is_relative_to(base.resolve()):
        if output is not None:
            raise InputError(
                f"{output}: a schema reads files in its own folder only: write it to {folder / output.name}"
            )
        base = folder
    count = None if model is None else _counter(model)[0]
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("files", total=None)
        gathered = files.from_files(
            folder,
            patterns,
            base=base,
            exclude=output,
            budget=budget,
            count=count,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    for file, why in gathered.left.items():
        _tell(f"left out: {file}: {why}")
    if not gathered.nodes:
        raise InputError(f"{folder}: no file can be used in a schema")
    _write(gathered.nodes, _named(name, inside.name), output, base)
    tokens = f", {sum(gathered.tokens.values()):,} tokens" if model is not None else ""
    of = f" of {budget:,}" if budget is not None else ""
    left = f"; {len(gathered.left):,} left out" if gathered.left else ""
    _tell(f"{len(gathered.nodes):,} files{tokens}{of}{left}")
    if output is None and base.resolve() != Path.cwd():
        _tell(f"the schema names files relative to {base}: save it in that folder")


@click.command("from-messages")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@_output_options
@click.option(
    "--least",
    type=click.IntRange(2),
    default=2,
    show_default=True,
    help="Number of requests in which a text must occur.",
)
@_model_option
def from_messages(
    files: tuple[Path, ...], output: Path | None, name: str | None, least: int, model: str | None
) -> None:
    """Make a schema of text that repeats in recorded requests to OpenAI's or Anthropic's API.

    Each FILE is JSON: a request, a list of requests or of messages, or a log of them (one on a line, .jsonl). A folder
    stands for all .json and .jsonl files in it.

    Definitions of tools, and paragraphs of messages, that occur in several requests become modules; those that always
    occur together become one module. Turns that each request of a conversation repeats are left out: they are reused
    without a schema. Standard error shows how many tokens each module would have saved, estimated unless -m names a
    model.

    \b
    cpucache schema from-messages requests.jsonl -o schema.xml -m smollm2-135m-instruct
    """
    from cpucache.authoring import messages, requests

    paths = _json_files(files)
    found = []
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
        for path in bars.track(paths, description="requests"):
            found += requests.recorded(path)
    count, about = _counter(model)
    repetition = messages.from_messages(found, count, least=least)
    _write(repetition.nodes, _named(name, "messages"), output, Path.cwd())
    talks = f"{repetition.conversations:,} conversation{'s' if repetition.conversations > 1 else ''}"
    together = "" if repetition.conversations == repetition.requests else f" in {talks}"
    share = repetition.saved / repetition.tokens if repetition.tokens else 0
    rows = sorted(repetition.modules, key=lambda module: -module.saved)
    columns = (
        Column("module", overflow="fold"),
        Column("role", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in ("requests", "tokens", "saved")),
    )
    cells = [(row.name, row.role, f"{row.times:,}", f"{row.tokens:,}", f"{row.saved:,}") for row in rows[:_LISTED]]
    err.print(listing(columns, cells, expendable=("role", "requests"), close=True), markup=False)
    if len(rows) > _LISTED:
        _tell(f"and {len(rows) - _LISTED:,} more modules")
    _tell(
        f"{repetition.requests:,} requests{together}: {about}{repetition.saved:,} of {repetition.tokens:,} tokens "
        f"({share:.0%}) would not have been evaluated again"
    )


def _json_files(given: tuple[Path, ...]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in given:
        inside = sorted(each for each in path.rglob("*") if each.suffix in (".json", ".jsonl")) if path.is_dir() else []
        if path.is_dir() and not inside:
            raise InputError(f"{path}: no .json or .jsonl file in this folder")
        found.update(dict.fromkeys(inside if path.is_dir() else [path]))
    return list(found)


def _counter(model: str | None) -> tuple[Callable[[str], int], str]:
    """Returns a function that counts the tokens of a text, and the words to print before the number."""
    if model is None:
        return (lambda text: -(-len(text.encode(errors="replace")) // _PER_TOKEN)), "about "
    from cpucache.cli.schema_layout import Looked

    vocabulary = Looked(model, "auto").model
    return (lambda text: len(vocabulary.tokenize(text))), ""


def _named(name: str | None, usual: str) -> str:
    from cpucache.authoring.writing import slug

    if name is None:
        return slug(usual, otherwise="schema", tag=False)
    if wrong := flaw(name):
        raise InputError(f"--name {quote(name)}: {wrong}")
    return name


def _write(nodes: list[SchemaNode], name: str, output: Path | None, base: Path) -> None:
    from cpucache.authoring.writing import write_schema

    written = write_schema(name, nodes, folder=base)
    if output is None:
        click.echo(written, nl=False)
    else:
        write_file(output, written)


def _tell(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)

"""Any function of the supported subset: its prompts read as what running it would put together."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cpucache.pml import canonical, parse_schema
from cpucache.pml.canonical import meaning
from tests.support.compiling import HEAD, cell, text_of
from tests.support.tries import tries

GLOBALS = "TOPICS = ('red', 'blue sky', '9')\nPAIRS = [('a', 1), ('b', 2)]\nK = 'constant'\nON = True\n"
TEXTS = (
    "One.",
    "a < b & c",
    "ends here ",
    "two\nlines\n",
    "'quoted' \"twice\"",
    "]]>",
    " white",
    "日本",
    "\t",
    "tail\r",
)
CONDITIONS = ("a", "not a", "n > 1", "s == 'x'", "a and n", "s in ('x', 'y')", "len(s) != n", "ON", "s == K", "v")
FIELDS = ("s", "n", "n + 1", "s!r", "s.upper()", "n:>4", "K", "v", "s + K", "'%s' % n", "[c for c in s]")
LOOPS = (
    "t in TOPICS",
    "t in ('x', 'y')",
    "t in range(2)",
    "i, t in enumerate(TOPICS)",
    "t, i in PAIRS",
    "t in sorted(TOPICS)",
)
PATTERNS = {
    "n": ("0", "1 | 2", "-1", "int() if a"),
    "s": ("'x'", "'y' | ''", "str(w) if w > 'x'"),
    "(n, s)": ("(0, w)", "(_, 'x')"),
}
ENDS = ("return", "return K", "return f'end {n}'")
VALUES = {"a": (False, True), "n": (0, 1, 3), "s": ("", "x", "yé\n<")}


class _Source:
    """Draws a function line by line."""

    def __init__(self, draw: st.DrawFn, calls: tuple[str, ...]) -> None:
        self._draw = draw
        self._calls = calls

    def one(self, options: tuple[str, ...]) -> str:
        return self._draw(st.sampled_from(options))

    def block(self, depth: int, indent: str, *, role: bool, loop: str = "") -> list[str]:
        kinds = ["text", "text", "field", "field", "set", "call", "pass", "return", "triple"]
        if depth < 3:
            kinds += ["if", "if", "for", "match", *([] if role else ["with"])]
        lines: list[str] = []
        for kind in self._draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)):
            lines += [indent + each for each in self.statement(kind, depth, role=role, loop=loop)]
        return lines

    def inner(self, depth: int, **how: Any) -> list[str]:
        return self.block(depth + 1, "    ", **how)

    def text(self, loop: str) -> str:
        fields = "".join(
            f"{self.one(('', 'and ', ' '))}{{{self.field(loop)}}}" for _ in range(self._draw(st.integers(1, 2)))
        )
        tail = self.one(("", ".", " ", "\\n", " é"))
        return f'f"{fields}{tail}"'

    def field(self, loop: str) -> str:
        return self.one((*FIELDS, *([loop, f"{loop} * 2", f"{loop}, n"] if loop else [])))

    def statement(self, kind: str, depth: int, *, role: bool, loop: str) -> list[str]:
        how: dict[str, Any] = {"role": role, "loop": loop}
        if kind == "text":
            return [repr(self.one(TEXTS))]
        if kind == "field":
            return [self.text(loop)]
        if kind == "triple":
            return (
                ['f"""', "  First {s}", "    deeper", "", '  last"""']
                if self._draw(st.booleans())
                else ['"""one', '   two"""']
            )
        if kind == "set":
            return [
                self.one(("v = s * 2", "v = f'{n}'", "v += ''", "u = K", "v: Annotated[str, MaxTokens(9)] = f'<{s}>'"))
            ]
        if kind == "call":
            return [self.one(self._calls)] if self._calls else ["pass"]
        if kind == "return":
            return [f"if {self.one(CONDITIONS)}: {self.one(ENDS)}"]
        if kind == "if":
            lines = [f"if {self.one(CONDITIONS)}:", *self.inner(depth, **how)]
            for _ in range(self._draw(st.integers(0, 2))):
                lines += [f"elif {self.one(CONDITIONS)}:", *self.inner(depth, **how)]
            return lines + (["else:", *self.inner(depth, **how)] if self._draw(st.booleans()) else [])
        if kind == "for":
            loop = self.one(LOOPS)
            return [f"for {loop}:", *self.inner(depth, role=role, loop="t")]
        if kind == "match":
            subject = self.one(tuple(PATTERNS))
            lines = [f"match {subject}:"]
            for pattern in self._draw(st.lists(st.sampled_from(PATTERNS[subject]), min_size=1, max_size=3)):
                lines += [f"    case {pattern}:", *("    " + each for each in self.inner(depth, **how))]
            if self._draw(st.booleans()):
                lines += ["    case _:", *("    " + each for each in self.inner(depth, **how))]
            return lines
        if kind == "with":
            return [f"with {self.one(('system', 'user', 'assistant'))}():", *self.inner(depth, role=True, loop=loop)]
        return ["pass"]


@st.composite
def sources(draw: st.DrawFn) -> str:
    """Two functions, the second of which may call the first."""
    lines = ["@prompt", "def g(a, n=2, s: Annotated[str, MaxTokens(5)] = 'x'):", "    v = ''"]
    lines += _Source(draw, ()).block(2, "    ", role=True)
    lines += ["@prompt", "def f(a, n, s):", "    v = ''", '    "Begin."']
    lines += _Source(draw, ("g(a, n, s)", "g(True)", "g(not a, s=s)", "g(a, s=K, n=n)")).block(0, "    ", role=False)
    return HEAD + GLOBALS + "\n".join(lines) + "\n"


class _Collecting(ast.NodeTransformer):
    """Turns the strings of a function into calls that collect them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = []
        self.generic_visit(node)
        return node

    def visit_Return(self, node: ast.Return) -> list[ast.stmt]:
        text = [] if node.value is None else [self.visit_Expr(ast.Expr(node.value))]
        return [*text, ast.Return()]

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        if isinstance(node.value, ast.Call):
            return node
        values: list[Any] = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
        if node.value.end_lineno != node.value.lineno:
            # The lines of the triple-quoted strings above lie as far to the right in each constant.
            constants: list[Any] = [each for each in values if isinstance(each, ast.Constant)]
            for each in constants:
                head, line_end, rest = each.value.partition("\n")
                each.value = head + textwrap.dedent(line_end + rest)
            values[0].value = values[0].value.removeprefix("\n")
        last: Any = values[-1]
        written: Any = (
            last.value if isinstance(last, ast.Constant) else "x" if not isinstance(last, ast.Name) else "constant"
        )
        end = "" if written[-1:] in (" ", "\t", "\r", "\n", "") else "\n"
        return ast.Expr(
            ast.Call(ast.Name("collect", ast.Load()), [ast.BinOp(node.value, ast.Add(), ast.Constant(end))], [])
        )


def run(source: str, arguments: dict[str, Any]) -> str:
    """The text that a function puts together when it is run."""
    out: list[str] = []

    def role(name: str) -> Any:
        @contextmanager
        def around() -> Iterator[None]:
            out.append(f"⟨{name}⟩")
            try:
                yield
            finally:
                out.append("⟨/⟩")

        return around

    tree = ast.fix_missing_locations(_Collecting().visit(ast.parse(source)))
    names: dict[str, Any] = {"collect": out.append}
    exec(compile(tree, "<plain>", "exec"), names)
    names.update({name: role(name) for name in ("system", "user", "assistant")})
    names["f"](**arguments)
    return "".join(out)


def plain(text: str) -> str:
    """A text without the line break that the last line of a role tag may lack, nor roles without text."""
    return re.sub("⟨[a-z]+⟩⟨/⟩", "", re.sub("\n*⟨/⟩", "⟨/⟩", text))


@tries(150)
@given(sources())
def test_a_prompt_reads_as_what_the_function_would_put_together(source: str) -> None:
    function = cell(source)["f"]
    schema = function.schema()
    assert meaning(parse_schema(schema)) == meaning(function.tree())
    assert canonical(schema, file="s.xml") == schema
    assert cell(source)["f"].schema() == schema
    for values in itertools.product(*VALUES.values()):
        arguments = dict(zip(VALUES, values, strict=True))
        called = function(**arguments)
        assert called.get_schema() == schema
        assert plain(text_of(called, schema)) == plain(run(source, arguments)), (source, arguments)


def test_two_processes_print_the_same(tmp_path: Path) -> None:
    source = (
        HEAD
        + GLOBALS
        + (
            "@prompt\ndef f(a, s='x'):\n"
            "    for t in TOPICS:\n        f'{t} {s}'\n    if {'p', 'q'} & {s}:\n        'seen'\n"
            "print(f.schema(), f(True, s='p'))\n"
        )
    )
    (tmp_path / "f.py").write_text(source)
    outputs = {
        subprocess.run(
            [sys.executable, tmp_path / "f.py"],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert "<seen" not in outputs.pop()

"""Prompt functions: the schemas that they are compiled into, the prompts of calls, and what is refused where."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: B021, RET503 - strings that are statements are text here
from __future__ import annotations

import functools
import inspect
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest

import cpucache
from cpucache import InputError, MaxTokens, PMLError, assistant, prompt, system, user
from cpucache.layout import ChatTemplate, SchemaLayout
from cpucache.pml import parse_schema
from cpucache.pml.canonical import meaning
from cpucache.reuse import Slices, reading
from tests.support.compiling import HEAD, cell, text_of
from tests.support.drawn import letters
from tests.support.tiny import CHATML

TOPICS = ["the sea", "mountains"]
TONE = "polite"
PATIENCE = 60
"""Seconds until Python's prompt counts as hanging."""


def line_of(text: str) -> int:
    """The line of this file that ends in a mark."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (found,) = [at for at, line in enumerate(lines, 1) if line.endswith(f"# {text}")]
    return found


def keys(schema: Any) -> list[str]:
    """The names of all slices of a schema, which stand for their tokens, contexts and positions."""
    layout = SchemaLayout(schema, letters(), ChatTemplate(CHATML, bos="<s>", eos="</s>"))
    return [slice_.key for slice_ in reading(layout, Slices("model", "format"), 1 << 20)]


# ---- schemas and prompts ---------------------------------------------------------------------------------------------
@prompt
def trip(place, days: Annotated[int, MaxTokens(2)], first: bool, name: Annotated[str, MaxTokens(4)] = "you"):
    with system():
        "You plan trips."
        f"Always be {TONE}."
    if first:
        "They have never been there."
    elif days > 3:
        f"They stay for {days} days."
    else:
        """
        They know it:
          keep it short.
        """
    match place:
        case "kyoto" | "nara":
            "Temples."
        case "rome":
            "Ruins."
    for topic in TOPICS:
        f"Something about {topic}."
    with user():
        f"Where should {name} go?"


TRIP = """
<schema name="trip">
  <system>You plan trips.
Always be polite.</system>
  <union>
    <module name="first">They have never been there.
    </module>
    <module name="days-gt-3">They stay for <parameter name="days" length="2"/> days.
    </module>
    <module name="first-else">They know it:
  keep it short.
    </module>
  </union>
  <union>
    <module name="place-kyoto-nara">Temples.
    </module>
    <module name="place-rome">Ruins.
    </module>
  </union>
  <module name="the-sea">Something about the sea.
  </module>
  <module name="mountains">Something about mountains.
  </module>
  <user>Where should <parameter name="name" length="4" scaffold="you"/> go?</user>
</schema>
"""


def test_a_function_is_the_schema_that_one_would_write() -> None:
    assert trip.schema().strip() == TRIP.strip()
    assert meaning(trip.tree()) == meaning(parse_schema(TRIP))
    assert keys(trip.tree()) == keys(parse_schema(trip.schema())) == keys(parse_schema(TRIP))


def test_a_call_is_a_prompt() -> None:
    called = trip("rome", 5, first=False)
    assert called == (
        '<prompt schema="trip" name="you">\n'
        '  <days-gt-3 days="5"/>\n  <place-rome/>\n  <the-sea/>\n  <mountains/>\n'
        "</prompt>"
    )
    assert called.get_prompt() == called
    assert called.get_schema() == trip.schema()
    assert "They know it" in text_of(trip("oslo", 2, False, name="Ann & Bo"), trip.schema())


def test_the_example_of_the_reference() -> None:
    names = cell(
        HEAD
        + """@prompt
def test_prompt(flag, item):
    ""
    "some system message"
    if flag:
        "only if flag is true"
    match item:
        case 1:
            "item is 1"
        case 2:
            "item is 2"
    "some user message"

r = test_prompt(True, 1)
"""
    )
    called = names["r"]
    assert text_of(called.get_prompt(), called.get_schema()) == (
        "some system message\nonly if flag is true\nitem is 1\nsome user message\n"
    )


def test_conditions_are_evaluated_in_calls_only() -> None:
    asked: list[str] = []

    def ask(what: str) -> bool:
        asked.append(what)
        return what == "b"

    @prompt
    def f(v):
        if ask("a"):
            f"{ask('text')}"
        elif ask("b"):
            "yes"
        elif ask("c"):
            "no"

    schema = f.schema()
    assert not asked
    assert text_of(f("x"), schema) == "yes\n"
    assert asked == ["a", "b"]


def test_the_text_after_a_return_is_left_out() -> None:
    @prompt
    def f(a, b):
        "one"
        with system():
            "two"
            if a:
                if b:
                    return
                "three"
            "four"
        "five"

    reads = {(a, b): text_of(f(a, b), f.schema()) for a in (0, 1) for b in (0, 1)}
    assert reads[0, 0] == reads[0, 1] == "one\n⟨system⟩two\nfour\n⟨/⟩five\n"
    assert reads[1, 0] == "one\n⟨system⟩two\nthree\nfour\n⟨/⟩five\n"
    assert reads[1, 1] == "one\n⟨system⟩two\n⟨/⟩"


def test_an_early_return_gives_a_union() -> None:
    @prompt
    def f(short):
        if short:
            return "Be short."
        "Be long."

    assert meaning(f.tree()) == meaning(
        parse_schema(
            '<schema name="f"><union><module name="short">Be short.\n</module>'
            '<module name="short-else">Be long.\n</module></union></schema>'
        )
    )


def test_calls_nest() -> None:
    @prompt
    def greeting(name: Annotated[str, MaxTokens(3)], loud=False):
        f"Hello {name}"
        if loud:
            "HELLO"

    @prompt
    def f(who, loud):
        greeting("Ann")
        greeting(who + "!", loud=loud)

    assert f.schema() == (
        '<schema name="f">\n  <module name="greeting">Hello Ann\n  </module>\n'
        '  <module name="greeting-2" xml:space="preserve">Hello <parameter name="name" length="3"/>\n'
        '<module name="loud">HELLO\n</module></module>\n</schema>\n'
    )
    assert text_of(f("Bo", True), f.schema()) == "Hello Ann\nHello Bo!\nHELLO\n"


def test_what_is_constant_is_text() -> None:
    limit = 3

    @prompt
    def f(n):
        unit = "km"
        wanted: Annotated[str, MaxTokens(7)] = f"{n} {unit}"
        f"{limit} {unit} {TONE.upper()} {wanted} {n}"
        if limit > 2:
            "far"

    assert f.schema() == (
        '<schema name="f" xml:space="preserve">3 km POLITE <parameter name="wanted" length="7"/> '
        '<parameter name="n" length="32"/>\nfar\n</schema>\n'
    )
    assert text_of(f(5), f.schema()) == "3 km POLITE 5 km 5\nfar\n"


def test_a_constant_that_changes_is_seen() -> None:
    names = cell(HEAD + "WHO = 'Ann'\n@prompt\ndef f(): f'Hello {WHO}'\n")
    function = names["f"]
    first = function.schema()
    assert function.schema() is first
    names["WHO"] = "Bo"
    assert "Hello Bo" in function.schema()
    assert "Hello Bo" in function().get_schema()


@pytest.mark.parametrize("name", ["user", "schema", "module", "xml", "Ünit", "x" * 120, "_"])
def test_any_name_of_an_argument_will_do(name: str) -> None:
    function = cell(
        HEAD + f"@prompt\ndef f({name}):\n    f'{{{name}}} {{{name}}}'\n    if {name}:\n        f'{{{name}}}'\n"
    )["f"]
    assert text_of(function("v"), function.schema()) == "v v\nv\n"


def test_an_argument_that_no_prompt_can_hold_is_named() -> None:
    with pytest.raises(InputError, match=r"'name'.*U\+0007"):
        trip("rome", 1, True, "a\a")
    with pytest.raises(TypeError, match=r"trip\(\): missing a required argument: 'days'"):
        trip("rome")  # type: ignore[call-arg]


# ---- wherever functions are ------------------------------------------------------------------------------------------
class Base:
    """Prompts that are methods."""

    shop = "the shop"

    @prompt
    def greet(self, name):
        self.who()
        self.rule(2)
        f"{self.shop}: {name}"

    @prompt
    def who(self):
        "I am the base."

    @prompt
    @staticmethod
    def rule(number):
        f"Rule {number}."

    @classmethod
    @prompt
    def kind(cls, name):
        f"{cls.__name__} {name}"


class Other(Base):
    """A class with another ``who``."""

    @prompt
    def who(self):
        f"I am {self.shop}."


def test_methods() -> None:
    base, other = Base(), Other()
    other.shop = "the other"
    assert text_of(base.greet("Ann"), base.greet.schema()) == "I am the base.\nRule 2.\nthe shop: Ann\n"
    assert text_of(other.greet("Ann"), other.greet.schema()) == "I am the other.\nRule 2.\nthe other: Ann\n"
    assert Base.greet(base, "Ann") == base.greet("Ann")
    assert base.greet.schema() != other.greet.schema()
    assert text_of(Base.rule(3), Base.rule.schema()) == "Rule 3.\n"
    assert text_of(Other.kind("x"), Other.kind.schema()) == "Other x\n"


def test_a_method_of_another_object() -> None:
    helper = Other()

    @prompt
    def f(x):
        helper.greet(x)

    assert text_of(f("Bo"), f.schema()) == "I am the shop.\nRule 2.\nthe shop: Bo\n"


def test_a_static_method_has_no_object() -> None:
    class Holder:
        """A class whose static method is called through an object."""

        @prompt
        def inner(self):
            "inside"

        @staticmethod
        @prompt
        def take(thing):
            thing.inner()

        @prompt
        @staticmethod
        def take_too(thing):
            thing.inner()

        @prompt
        def outer(self):
            self.take("a thing")

        @prompt
        def outer_too(self):
            self.take_too("a thing")

    for function in (Holder.take, Holder.take_too, Holder().outer, Holder().outer_too):
        with pytest.raises(PMLError, match=r"`thing\.inner\(\)`"):
            function.schema()


def test_sets_that_are_counted_sorted_or_searched_are_constant() -> None:
    @prompt
    def f():
        for name in sorted({"q", "p"}):
            f"{name} of {len({'q', 'p'})}"
        if "p" in {"p", "q"}:
            "There."

    assert text_of(f(), f.schema()) == "p of 2\nq of 2\nThere.\n"


def test_closures() -> None:
    def decorated(kind: str, check: Callable[[int], bool]) -> Any:
        @prompt
        def f(n):
            f"{kind} {n}"
            if check(n):
                "checked"

        return f

    one, two = decorated("one", lambda n: n > 1), decorated("two", bool)
    assert text_of(one(1), one.schema()) == "one 1\n"
    assert text_of(two(1), two.schema()) == "two 1\nchecked\n"


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as people write them."""

    @functools.wraps(function)
    def around(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return around


def test_stacked_decorators() -> None:
    @logged
    @cpucache.prompt(name="outer-one")
    @logged
    def f(n):
        f"{n}"

    @prompt
    def g(n):
        f(n + 1)

    assert f.schema().startswith('<schema name="outer-one"')  # type: ignore[attr-defined]
    assert text_of(f(1), f.schema()) == "1\n"  # type: ignore[attr-defined]
    assert text_of(g(1), g.schema()) == "2\n"
    assert inspect.signature(g).parameters.keys() == {"n"}
    assert g.name == "g"


def test_strings_of_an_inner_function_are_not_moved() -> None:
    @prompt
    def f():
        """One,
        two at the margin,
          three."""

    assert text_of(f(), f.schema()) == "One,\ntwo at the margin,\n  three.\n"


def test_a_prompt_without_source_says_so() -> None:
    names: dict[str, Any] = {}
    exec(compile(HEAD + "@prompt\ndef f(): 'x'", "<nowhere>", "exec"), names)
    with pytest.raises(PMLError, match=r"<nowhere>:3: the source of 'f' can't be read here: define it in a file"):
        names["f"].schema()
    with pytest.raises(TypeError, match="written with def"):
        prompt(len)


def test_at_pythons_own_prompt() -> None:
    lines = [
        "import readline, cpucache",
        "from cpucache import prompt",
        "@prompt",
        "def f(a):",
        "    'first'",
        "    if a:",
        "        'second'",
        "",
        "@prompt",
        "def g(a): f(a)",
        "",
        "print('called', len(g(1).get_schema()), g(1))",
        "exit()",
    ]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHON_BASIC_REPL": "1", "TERM": "dumb", "PYTHONSTARTUP": ""}
    with subprocess.Popen(
        [sys.executable, "-q"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown, sent, until = "", 0, time.monotonic() + PATIENCE
        while time.monotonic() < until:
            # A line at each prompt.
            if select.select([ours], [], [], 1)[0]:
                try:
                    data = os.read(ours, 4096).decode(errors="replace")
                except OSError:
                    break
                if not data:
                    break
                shown += data
            if sent < len(lines) and re.search(r"(>>>|\.\.\.) $", shown) and shown.count("\n") >= sent:
                os.write(ours, f"{lines[sent]}\n".encode())
                sent += 1
        process.kill()
        os.close(ours)
    assert re.search(r"called \d+ <prompt schema=\"g\">\s+<f><a/></f>", shown), shown


# ---- what is refused -------------------------------------------------------------------------------------------------
REFUSED = {
    "while a: 'x'": "the text of a `while` loop is not known before a call: loop over a constant",
    "for x in a: 'x'": r"the items of `a`, or their order, .*: loop over a list or tuple of constants, or.*join",
    "for x in {'p', 'q'}: 'x'": "the items of `.*`, or their order, are not known",
    "for x in list({'p', 'q'}): 'x'": "the items of `.*`, or their order, are not known",
    "for x in [y for y in {'p', 'q'}]: 'x'": "the items of `.*`, or their order, are not known",
    "for x in tuple({'p': 1}.keys() | {'q': 1}.keys()): 'x'": "the items of `.*`, or their order, are not known",
    "for x in range('p'.__hash__() % 3): 'x'": "the items of `.*`, or their order, are not known",
    "for x in TOPICS: break": "`break`.*put an `if`",
    "try: 'x'\n    except: 'y'": "`try`.*pass it as an argument",
    "def g(): 'x'": "a function inside a prompt: define it outside",
    "print(a)": r"`print\(a\)` does not call a prompt function: decorate",
    "a": r'`a` is not a text: write f"\{...\}"',
    "f'{(b := a)}'": r"`\(b := a\)`: a field can't contain an assignment",
    "with open(a): 'x'": "`with open",
    "with system():\n        with user(): 'x'": "`with user.*` is inside `system`: roles can't be nested",
    "x = y = a": "assign a value to one name",
    "f'{1 / 0}'": "can't be evaluated: division by zero",
    "'\\a'": r"contain U\+0007",
    "f(a)": "`f` calls itself",
    "other(a, 2)": "`other.*`: too many positional arguments",
    "other(*a)": "write each argument out",
    "x = other(a)": "calls a prompt function: write the call as a statement",
    "return a": "`a` is not a text",
    "raise ValueError": "`raise` can't be compiled",
    "import os": "import outside",
}


@pytest.mark.parametrize("statement", REFUSED)
def test_what_can_not_be_expressed_is_refused(statement: str) -> None:
    source = HEAD + (
        "TOPICS = ('p', 'q')\n@prompt\ndef other(z): f'{z}'\n\n@prompt\ndef f(a):\n    'text'\n"
        f"    {statement}\n    'more'\n"
    )
    function = cell(source)["f"]
    with pytest.raises(PMLError, match=REFUSED[statement]) as refused:
        function.schema()
    wrong = refused.value.line
    assert wrong is not None
    assert 10 <= wrong <= 10 + statement.count("\n")
    with pytest.raises(PMLError):
        function("x")


def test_every_mistake_is_told_with_its_line() -> None:
    @prompt
    def f(a):
        "fine"
        while a:  # first
            "x"
        if a:
            print(a)  # second
        a.b = 1  # third

    with pytest.raises(PMLError) as refused:
        f.schema()
    found = [refused.value, *refused.value.others]
    assert [each.line for each in found] == [line_of("first"), line_of("second"), line_of("third")]
    assert {each.file for each in found} == {__file__}


def test_a_mistake_in_a_call_has_its_own_line() -> None:
    @prompt
    def inner(a):
        del a  # inner

    @prompt
    def f(a):
        inner(a)

    with pytest.raises(PMLError, match=rf"test_prompt\.py:{line_of('inner')}: `del`"):
        f.schema()


def test_what_an_expression_raises_has_its_line() -> None:
    @prompt
    def f(a):
        "text"
        if a.b:  # raises
            "x"

    with pytest.raises(AttributeError) as raised:
        f(5)
    (*_, last) = raised.traceback
    assert (Path(last.path), last.lineno + 1) == (Path(__file__), line_of("raises"))


def test_a_function_without_text_is_none() -> None:
    @prompt
    def f(a):
        b = a
        if b:
            pass

    with pytest.raises(PMLError, match="there is no text in 'f'"):
        f.schema()


def test_generators_coroutines_and_stars_are_refused() -> None:
    names = cell(HEAD + "@prompt\nasync def f(): 'x'\n@prompt\ndef g(*a, **b): 'x'\n@prompt\ndef h(): yield 'x'\n")
    for name, reason in (("f", "coroutine"), ("g", "a name of its own"), ("h", "not a text")):
        with pytest.raises(PMLError, match=reason):
            names[name].schema()


def test_an_annotation_is_looked_up_where_the_function_is() -> None:
    names = cell(
        "from __future__ import annotations\nfrom typing import Annotated, TYPE_CHECKING\nimport cpucache as c\n"
        "@c.prompt\ndef f(a: Annotated[str | None, c.MaxTokens(5)], b: Missing, "
        "d: 'list[Annotated[int, c.MaxTokens(6)]]'):\n    f'{a} {b} {d}'\n"
        "@c.prompt\ndef g(a: Annotated[str, MaxTokens(5)]):\n    f'{a}'\n"
    )
    assert re.findall(r'length="(\d+)"', names["f"].schema()) == ["5", "32", "6"]
    with pytest.raises(PMLError, match=r":7: the annotation .*MaxTokens.* can't be evaluated"):
        names["g"].schema()
    with pytest.raises(ValueError, match="from 1"):
        MaxTokens(0)


def test_role_tags_do_nothing_when_they_are_run() -> None:
    said = []
    with system() as first, user() as second, assistant() as third:
        said.append("text")
    assert (first, second, third, said) == (None, None, None, ["text"])
    with pytest.raises(ZeroDivisionError), user():
        said.append(str(1 / 0))

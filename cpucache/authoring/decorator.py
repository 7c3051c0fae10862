"""``@cpucache.prompt``: a Python function as a schema, and its calls as prompts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeAlias, overload

from cpucache.authoring.calling import chosen
from cpucache.authoring.calls import Callee, Definition, Method
from cpucache.authoring.compiler import Compiled, compiled
from cpucache.authoring.constants import changed
from cpucache.authoring.function import Function
from cpucache.authoring.parts import has_text, nodes
from cpucache.authoring.writing import write_prompt, write_schema
from cpucache.errors import PMLError
from cpucache.pml.names import flaw, quote
from cpucache.pml.tree import Schema

P = ParamSpec("P")


class PromptText(str):
    """PML of a prompt: a string that also holds the PML of its schema."""

    __slots__ = ("_schema",)
    _schema: str

    @classmethod
    def of(cls, prompt: str, schema: str) -> PromptText:
        """Returns a prompt with the PML of its schema."""
        created = cls(prompt)
        created._schema = schema
        return created

    def get_schema(self) -> str:
        """Returns the PML of the schema."""
        return self._schema

    def get_prompt(self) -> str:
        """Returns the PML of the prompt as a plain string."""
        return str(self)


class _Ready:
    """A function compiled for one class, with its schema as a tree (with the function's line numbers) and as PML."""

    def __init__(self, name: str, function: Function, code: Compiled) -> None:
        self.code = code
        self.tree = Schema(name, tuple(nodes(code.parts)), function.file, function.line)
        self.schema = write_schema(name, self.tree.children)


class PromptFunction(Definition, Generic[P]):
    """A function whose schema is compiled from its syntax tree when the schema is first needed.

    The function is compiled again only after an outside constant on which its schema depends has changed.
    """

    def __init__(self, function: Callable[P, Any], name: str | None = None) -> None:
        inner = function.__func__ if isinstance(function, staticmethod | classmethod) else function
        python = inspect.unwrap(inner)
        if not isinstance(python, FunctionType):
            raise TypeError(f"@prompt takes a function written with def, not {function!r}")
        name = python.__name__ if name is None else name
        if wrong := flaw(name):
            raise ValueError(f"a schema can't be called {quote(name)}: {wrong}")
        super().__init__(Function(python), name, is_static=isinstance(function, staticmethod))
        self._ready: dict[type | None, _Ready] = {}
        functools.update_wrapper(self, python)
        # An attribute of the instance, so that functools.wraps in further decorators copies it.
        self.schema = self._schema_pml

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> PromptText:
        return self.call(None, *args, **kwargs)

    @overload
    def __get__(self, instance: None, owner: type) -> PromptMethod: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> PromptMethod: ...
    def __get__(self, instance: object | None, owner: type | None = None) -> PromptMethod | PromptFunction[P]:
        if self.is_static:
            return self
        return PromptMethod(self, instance, type(instance) if owner is None else owner)

    def __repr__(self) -> str:
        return f"<prompt {self.name} ({self.function.file}:{self.function.line})>"

    def _schema_pml(self) -> str:
        """Returns the schema as PML. Raises ``PMLError`` with the line of a statement that PML can't express."""
        return self.ready(None).schema

    def tree(self) -> Schema:
        """Returns the schema as the tree that its PML is parsed into, with the line numbers of the function."""
        return self.ready(None).tree

    def call(self, owner: type | None, /, *args: Any, **kwargs: Any) -> PromptText:
        """Returns the prompt of a call; ``owner``: the class that the function is a method of, or ``None``."""
        try:
            bound = self.function.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.function.name}(): {error}") from None
        bound.apply_defaults()
        ready = self.ready(owner)
        names = self.function.names() | bound.arguments
        written = write_prompt(chosen(self.name, ready.code.parts, names)).rstrip("\n")
        return PromptText.of(written, ready.schema)

    def ready(self, owner: type | None) -> _Ready:
        """Returns the function compiled as a method of ``owner`` (``None``: as a plain function)."""
        ready = self._ready.get(owner)
        if ready is None or changed(ready.code.used):
            code = compiled(Callee(self.function, self.name, owner))
            if not has_text(code.parts):
                reason = f"there is no text in '{self.name}': write strings as statements"
                raise PMLError(reason, file=self.function.file, line=self.function.line)
            ready = self._ready[owner] = _Ready(self.name, self.function, code)
        return ready


class PromptMethod(Method):
    """A prompt function as an attribute of an object or a class."""

    def __init__(self, function: PromptFunction[Any], receiver: object | None, owner: type) -> None:
        super().__init__(function, receiver, owner)
        self._definition = function
        functools.update_wrapper(self, function.function.python)

    def __call__(self, *args: Any, **kwargs: Any) -> PromptText:
        receiver = () if self.receiver is None else (self.receiver,)
        return self._definition.call(self.owner, *receiver, *args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._definition)

    def schema(self) -> str:
        """Returns the schema as PML. Raises ``PMLError`` with the line of a statement that PML can't express."""
        return self._definition.ready(self.owner).schema

    def tree(self) -> Schema:
        """Returns the schema as the tree that its PML is parsed into, with the line numbers of the function."""
        return self._definition.ready(self.owner).tree


AnyPromptFunction: TypeAlias = PromptFunction[Any] | PromptMethod
"""A prompt function, by itself or as an attribute."""


@overload
def prompt(function: Callable[P, Any], /) -> PromptFunction[P]: ...
@overload
def prompt(*, name: str) -> Callable[[Callable[P, Any]], PromptFunction[P]]: ...
def prompt(
    function: Callable[P, Any] | None = None, /, *, name: str | None = None
) -> PromptFunction[P] | Callable[[Callable[P, Any]], PromptFunction[P]]:
    """Turns a Python function into a schema, and its calls into prompts.

    The function is never run: its syntax tree is compiled. In the function,

    - a string that is a statement by itself is a line of text, and so is the docstring;
    - ``if`` is a module; ``if`` with ``elif`` or ``else`` is a union, and so is ``match``. A call includes the branch
      that Python would take;
    - an argument in an f-string is a parameter. ``Annotated[str, MaxTokens(8)]`` sets its length in tokens (default:
      32), and a default value is its scaffold text while the schema is encoded;
    - any other expression in an f-string is a parameter too, or text if it is constant;
    - ``for`` over constants is a module for each item, and a call of another prompt function is a module;
    - ``with system():``, ``with user():`` and ``with assistant():`` are role tags, and ``return`` ends the prompt.

    ``function.schema()`` returns the schema as PML, and ``function(...)`` the prompt of a call.

    Args:
        function: The function; omitted in ``@prompt(name="...")``.
        name: Name of the schema; the function's own name by default.

    Returns:
        The prompt function, or a decorator if ``function`` is omitted.

    Raises:
        TypeError: ``function`` is not a function written with ``def``.
        ValueError: PML does not allow the name.
    """
    if function is None:
        return functools.partial(PromptFunction, name=name)
    return PromptFunction(function, name)

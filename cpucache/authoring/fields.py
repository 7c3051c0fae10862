"""Fields of f-strings as parameters of a schema."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from cpucache.authoring.constants import Constants
from cpucache.authoring.function import DEFAULT_LENGTH, UNKNOWN, Function
from cpucache.authoring.parts import Expression, Field
from cpucache.authoring.writing import Names, impossible, slug
from cpucache.errors import PMLError
from cpucache.pml.names import flaw
from cpucache.pml.problems import Problems
from cpucache.pml.tree import Parameter, Text

_REFUSED = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)


class Fields:
    """Converts fields into parameters.

    A parameter is named after the field's expression. Its length is that of the one annotated name in the expression,
    otherwise ``DEFAULT_LENGTH``. A field of constants only is text.
    """

    def __init__(self, function: Function, constants: Constants, problems: Problems) -> None:
        self._function = function
        self._constants = constants
        self._problems = problems
        self._lengths: dict[str, int] = {}
        for name, parameter in function.signature.parameters.items():
            if parameter.annotation is not inspect.Parameter.empty:
                self.annotate(name, parameter.annotation, function.line)

    def annotate(self, name: str, annotation: Any, line: int) -> None:
        """Records the length of a name, in tokens, from its annotation. Reports an annotation that is not valid."""
        try:
            length = self._function.length(annotation, line)
        except PMLError as error:
            self._problems.report(error.reason, line)
            return
        if length:
            self._lengths[name] = length

    def check(self, node: ast.AST | None, line: int) -> None:
        """Reports every assignment, ``await`` and ``yield`` in an expression."""
        for each in ast.walk(node) if node is not None else ():
            if isinstance(each, _REFUSED):
                wrong = "a field can't contain an assignment, await or yield: move it out of the prompt"
                self._problems.report(f"`{ast.unparse(each)}`: {wrong}", line)

    def part(self, field: ast.FormattedValue, names: Names, line: int) -> Field | Text | None:
        """Returns the parameter of a field, or its text if constant; ``None``, with a report, if it is refused."""
        self.check(field, line)
        node = ast.copy_location(ast.JoinedStr([field]), field.value)
        try:
            value = self._constants.value(node)
        except Exception as error:
            self._problems.report(f"`{ast.unparse(field.value)}` can't be evaluated: {error}", line)
            return None
        if value is not UNKNOWN:
            if char := impossible(value):
                self._problems.report(f"PML can't contain {char}: remove it", line)
                return None
            return Text(value, line)
        shown = ast.unparse(field.value)
        plain = isinstance(field.value, ast.Name) and flaw(shown, as_attribute=True) is None
        name = names.parameter(shown if plain else slug(shown, otherwise="argument", tag=False))
        arguments = [each.id for each in ast.walk(field) if isinstance(each, ast.Name)]
        lengths = [self._lengths[each] for each in dict.fromkeys(arguments) if each in self._lengths]
        length = lengths[0] if len(lengths) == 1 else DEFAULT_LENGTH
        expression = Expression(node, self._function.file)
        return Field(Parameter(name, length, self._scaffold(arguments, expression), line), expression)

    def _scaffold(self, arguments: list[str], expression: Expression) -> str | None:
        """Text of a field with the default of its only argument, if the default is a text or a number."""
        parameter = self._function.signature.parameters.get(arguments[0]) if len(arguments) == 1 else None
        if parameter is None or type(parameter.default) not in (str, int, float):
            return None
        try:
            text = str(expression.value({"__builtins__": {}, parameter.name: parameter.default}))
        except Exception:  # the expression does not accept the default
            return None
        return None if not text or impossible(text) else text

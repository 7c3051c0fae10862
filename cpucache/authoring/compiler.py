"""Compiler of prompt functions: from the syntax tree to parts.

The function is never run. Expressions are evaluated here only if they are constant.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cpucache.authoring.calls import Callee, callee_of
from cpucache.authoring.constants import Constants
from cpucache.authoring.fields import Fields
from cpucache.authoring.function import UNKNOWN, Function
from cpucache.authoring.parts import (
    Always,
    Arm,
    Branches,
    Call,
    End,
    Expression,
    Match,
    Part,
    Set,
    Tagged,
    has_text,
)
from cpucache.authoring.roles import RoleTag
from cpucache.authoring.statements import (
    Ends,
    chain,
    ended_by,
    ends_without_else,
    instead,
    is_nothing,
    is_plain,
    item_name,
    names_of,
    stored,
    takes_all,
)
from cpucache.authoring.strings import has_nul, line, pieces_of
from cpucache.authoring.writing import Names, impossible, slug
from cpucache.pml.problems import Problems
from cpucache.pml.tree import Text


@dataclass
class Compiled:
    """The parts of a function. ``used``: the names outside it that they depend on: function, name and value."""

    parts: tuple[Part, ...]
    used: list[tuple[Function, str, Any]] = field(default_factory=list)


def compiled(callee: Callee, stack: tuple[Function, ...] = (), role: str = "") -> Compiled:
    """Compiles a prompt function.

    Args:
        callee: The function, with the class that it is a method of and the values of its constant arguments.
        stack: Prompt functions that are being compiled around this one, outermost first.
        role: Role tag around the call; empty: none.

    Returns:
        The parts, with the outside names that they depend on.

    Raises:
        PMLError: The function holds statements that PML can't express. The error names the first line of these;
            ``others`` holds the further errors.
    """
    return _Compiler(callee, stack, role).run()


class _Compiler:
    def __init__(self, callee: Callee, stack: tuple[Function, ...], role: str) -> None:
        function = self._function = callee.function
        self._callee = callee
        self._stack = (*stack, function)
        self._problems = Problems(function.file)
        self._source = function.written
        self._role = role
        self._branches = 0
        """Number of branches and loops around the current statement."""
        self._stored = stored(self._source.tree)
        parameters = set(function.signature.parameters)
        constants = {name: value for name, value in callee.constants.items() if name not in self._stored}
        self._constants = Constants(function, parameters | self._stored.keys(), constants)
        self._fields = Fields(function, self._constants, self._problems)
        self._used: list[tuple[Function, str, Any]] = []

    def run(self) -> Compiled:
        """Compiles the whole function."""
        tree = self._source.tree
        if isinstance(tree, ast.AsyncFunctionDef):
            self._refuse("a prompt function can't be a coroutine: write it with def", tree.lineno)
        for argument in (tree.args.vararg, tree.args.kwarg):
            if argument is not None:
                self._refuse(f"`*{argument.arg}`: give each argument a name of its own", argument.lineno)
        parts, _ = self._block(tree.body, Names("schema"))
        self._problems.check()
        return Compiled(tuple(parts), [*self._constants.used, *self._used])

    def _refuse(self, message: str, at: int) -> None:
        self._problems.report(message, at)

    # ---- statements --------------------------------------------------------------------------------------------------
    def _block(self, statements: Sequence[ast.stmt], names: Names) -> tuple[list[Part], Ends]:
        parts: list[Part] = []
        for at, statement in enumerate(statements):
            rest = statements[at + 1 :]
            if isinstance(statement, ast.If) and rest and ends_without_else(statement):
                # Every arm returns, so the statements after the `if` are its `else`.
                more, ends = self._if(statement, names, otherwise=rest)
                return [*parts, *more], ends
            more, ends = self._statement(statement, names)
            parts += more
            if ends == "always":
                return parts, ends
            if ends == "maybe" and rest:
                self._branches += 1
                inner, inner_ends = self._block(rest, Names())
                self._branches -= 1
                parts.append(Always(names.module("rest") if has_text(inner) else "", tuple(inner), {}, rest[0].lineno))
                return parts, "always" if inner_ends == "always" else "maybe"
            if ends == "maybe":
                return parts, ends
        return parts, "never"

    def _statement(self, statement: ast.stmt, names: Names) -> tuple[list[Part], Ends]:
        if isinstance(statement, ast.Expr):
            return self._text(statement.value, names), "never"
        if isinstance(statement, ast.If):
            return self._if(statement, names)
        if isinstance(statement, ast.Match):
            return self._match(statement, names)
        if isinstance(statement, ast.For):
            return self._for(statement, names)
        if isinstance(statement, ast.With):
            return self._with(statement, names)
        if isinstance(statement, ast.Return):
            text = [] if is_nothing(statement.value) or statement.value is None else self._text(statement.value, names)
            return [*text, End()], "always"
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            return self._assign(statement), "never"
        if not isinstance(statement, ast.Pass):
            self._refuse(instead(statement), statement.lineno)
        return [], "never"

    def _text(self, node: ast.expr, names: Names) -> list[Part]:
        """Parts of an expression statement: a string, or a call of another prompt function."""
        if (isinstance(node, ast.Constant) and isinstance(node.value, str)) or isinstance(node, ast.JoinedStr):
            if has_nul(node):
                self._refuse("PML can't contain U+0000: remove it", node.lineno)
                return []
            pieces = pieces_of(node, triple_quoted=self._source.is_triple_quoted(node))
            parts = (
                self._literal(piece, node.lineno)
                if isinstance(piece, str)
                else self._fields.part(piece, names, node.lineno)
                for piece in pieces
            )
            return [part for part in parts if part is not None]
        if isinstance(node, ast.Call) and (callee := self._callee_of(node)):
            return self._call(node, callee, names)
        if isinstance(node, ast.Constant) and node.value is ...:
            return []
        value = self._constant(node)
        if isinstance(value, str):
            text = self._literal(line(value), node.lineno)
            return [text] if text is not None and text.text else []
        shown = ast.unparse(node)
        if isinstance(node, ast.Call):
            what = f"`{shown}` does not call a prompt function: decorate the function with @cpucache.prompt, or write"
        else:
            what = f"`{shown}` is not a text: write"
        self._refuse(f'{what} f"{{...}}" to insert its value into the text', node.lineno)
        return []

    def _literal(self, text: str, at: int) -> Text | None:
        if char := impossible(text):
            self._refuse(f"PML can't contain {char}: remove it", at)
            return None
        return Text(text, at)

    def _constant(self, node: ast.expr) -> Any:
        try:
            return self._constants.value(node)
        except Exception as error:
            self._refuse(f"`{ast.unparse(node)}` can't be evaluated: {error}", node.lineno)
            return UNKNOWN

    # ---- branches ----------------------------------------------------------------------------------------------------
    def _if(self, statement: ast.If, names: Names, otherwise: Sequence[ast.stmt] = ()) -> tuple[list[Part], Ends]:
        arms: list[Arm] = []
        ends: list[Ends] = []
        first = ""
        for condition, body, at in chain(statement, otherwise):
            test = condition
            value = None if test is None else self._constant(test)
            if test is not None and value is not UNKNOWN and not value:
                continue
            if test is None or value is not UNKNOWN:
                if not arms:
                    more, end = self._block(body, names)
                    return more, end
                test = None
            self._fields.check(test, at)
            name = slug(ast.unparse(test), otherwise="if") if test is not None else f"{first}-else"
            first = first or name
            arm, end = self._arm(name, body, test, at, names)
            arms.append(arm)
            ends.append(end)
            if test is None:
                break
        if not arms:
            return [], "never"
        return [Branches(tuple(arms), statement.lineno)], ended_by(ends, arms[-1].when is None)

    def _arm(
        self, name: str, body: Sequence[ast.stmt], test: ast.expr | None, at: int, names: Names
    ) -> tuple[Arm, Ends]:
        self._branches += 1
        parts, ends = self._block(body, Names())
        self._branches -= 1
        when = None if test is None else Expression(test, self._function.file)
        return Arm(names.module(name) if has_text(parts) else "", tuple(parts), when, at), ends

    def _match(self, statement: ast.Match, names: Names) -> tuple[list[Part], Ends]:
        self._fields.check(statement.subject, statement.lineno)
        value = self._constant(statement.subject)
        if value is not UNKNOWN and all(map(is_plain, statement.cases)):
            constant = ast.Match(ast.Constant(value), statement.cases)
            arms = tuple(Arm("", (), None, 0) for _ in statement.cases)
            taken = Match(arms, ast.copy_location(constant, statement), self._function.file).taken({})
            body = statement.cases[arms.index(taken)].body if taken is not None else []
            return self._block(body, names)
        subject = ast.unparse(statement.subject)
        found: list[Arm] = []
        ends: list[Ends] = []
        for case in statement.cases:
            pattern = "else" if takes_all(case) else ast.unparse(case.pattern)
            guard = f" {ast.unparse(case.guard)}" if case.guard else ""
            self._fields.check(case.guard, case.pattern.lineno)
            name = slug(f"{subject} {pattern}{guard}", otherwise="case")
            arm, end = self._arm(name, case.body, None, case.pattern.lineno, names)
            found.append(arm)
            ends.append(end)
        part = Match(tuple(found), statement, self._function.file)
        return [part], ended_by(ends, takes_all(statement.cases[-1]))

    def _for(self, loop: ast.For, names: Names) -> tuple[list[Part], Ends]:
        if loop.orelse:
            self._refuse(
                "`else` of a loop can't be compiled: write its statements after the loop", loop.orelse[0].lineno
            )
        try:
            items = self._constants.items(loop.iter)
        except Exception as error:
            self._refuse(f"`{ast.unparse(loop.iter)}` can't be evaluated: {error}", loop.lineno)
            return [], "never"
        if items is None:
            self._refuse(
                f"the items of `{ast.unparse(loop.iter)}`, or their order, are not known before a call: loop over a "
                "list or tuple of constants, or put the lines into one argument, as in f\"{'; '.join(items)}\"",
                loop.lineno,
            )
            return [], "never"
        parts: list[Part] = []
        ended: list[Ends] = []
        outer = dict(self._constants.values)
        for item in items:
            bound = self._bound(loop.target, item)
            if bound is None:
                return [], "never"
            self._constants.values.update(bound)
            self._branches += 1
            inner, ends = self._block(loop.body, Names())
            self._branches -= 1
            name = item_name(bound)
            parts.append(Always(names.module(name) if has_text(inner) else "", tuple(inner), bound, loop.lineno))
            ended.append(ends)
            if ends == "always":
                break
        # After the loop its names count as unknown, so that a call fills them with the last item.
        for name in names_of(loop.target):
            outer.pop(name, None)
        self._constants.values = outer
        return parts, "always" if "always" in ended else "maybe" if "maybe" in ended else "never"

    def _bound(self, target: ast.expr, item: Any) -> dict[str, Any] | None:
        """Values of a loop's names for one item; ``None``, with a report, if the names do not fit the item."""
        if isinstance(target, ast.Name):
            return {target.id: item}
        is_many = isinstance(target, ast.Tuple | ast.List) and isinstance(item, list | tuple | str)
        if isinstance(target, ast.Tuple | ast.List) and is_many and len(target.elts) == len(item):
            inner = [self._bound(each, part) for each, part in zip(target.elts, item, strict=True)]
            return {name: value for each in inner if each for name, value in each.items()}
        self._refuse(
            f"`{ast.unparse(target)}` does not fit the item {item!r}: write one name for each part", target.lineno
        )
        return None

    # ---- roles, calls and values -------------------------------------------------------------------------------------
    def _with(self, statement: ast.With, names: Names) -> tuple[list[Part], Ends]:
        roles = []
        for item in statement.items:
            node = item.context_expr
            call = node.func if isinstance(node, ast.Call) and not (node.args or node.keywords) else node
            found = self._constants.object(call)
            if not isinstance(found, RoleTag) or item.optional_vars is not None:
                shown = ast.unparse(item)
                self._refuse(
                    f"`with {shown}` can't be compiled: use with system():, with user(): or with assistant():",
                    node.lineno,
                )
                return [], "never"
            roles.append(found.role)
        if self._role or len(roles) > 1:
            around = self._role or roles[0]
            self._refuse(f"`with {roles[-1]}()` is inside `{around}`: roles can't be nested", statement.lineno)
            return [], "never"
        self._role = roles[0]
        parts, ends = self._block(statement.body, names)
        self._role = ""
        if parts and isinstance(last := parts[-1], Text):
            # The chat template ends a turn directly after its text, so the last line needs no newline.
            parts[-1] = Text(last.text.removesuffix("\n"), last.line)
        return [Tagged(roles[0], tuple(parts), statement.lineno)], ends

    def _callee_of(self, node: ast.Call) -> Callee | None:
        return callee_of(node.func, self._callee, self._constants)

    def _call(self, node: ast.Call, callee: Callee, names: Names) -> list[Part]:
        function = callee.function
        if any(function.python is each.python for each in self._stack):
            self._refuse(f"`{function.name}` calls itself: its prompt would never end", node.lineno)
            return []
        given = self._arguments(node, callee)
        if given is None:
            return []
        constants = {name: value for name, each in given.items() if (value := self._constant(each)) is not UNKNOWN}
        expressions = {name: self._expression(each) for name, each in given.items()}
        defaults = {
            name: each.default
            for name, each in function.signature.parameters.items()
            if name not in given and each.default is not inspect.Parameter.empty
        }
        inner = compiled(callee.called(constants, defaults), self._stack, self._role)
        self._used += inner.used
        if not has_text(inner.parts):
            return []
        name = names.module(slug(callee.name, otherwise="call"))
        return [Call(name, inner.parts, lambda: {**function.names(), **defaults}, expressions, node.lineno)]

    def _arguments(self, node: ast.Call, callee: Callee) -> dict[str, ast.expr] | None:
        """Expression of each argument of a call; ``None``, with a report, if the call is refused."""
        keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        if len(keywords) < len(node.keywords) or any(isinstance(each, ast.Starred) for each in node.args):
            self._refuse(f"`{ast.unparse(node)}`: write each argument out, without * and **", node.lineno)
            return None
        for each in (*node.args, *keywords.values()):
            self._fields.check(each, node.lineno)
        receiver = [] if callee.receiver is None else [callee.receiver]
        try:
            given = callee.function.signature.bind(*receiver, *node.args, **keywords).arguments
        except TypeError as error:
            self._refuse(f"`{ast.unparse(node)}`: {error}", node.lineno)
            return None
        return {name: each for name, each in given.items() if isinstance(each, ast.expr)}

    def _assign(self, statement: ast.Assign | ast.AnnAssign | ast.AugAssign) -> list[Part]:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        target, value = targets[0], statement.value
        if len(targets) > 1 or not isinstance(target, ast.Name):
            self._refuse("assign a value to one name, as in `names = ', '.join(people)`", statement.lineno)
            return []
        if isinstance(statement, ast.AnnAssign):
            self._fields.annotate(target.id, ast.unparse(statement.annotation), statement.lineno)
        if value is None:
            return []
        if isinstance(value, ast.Call) and self._callee_of(value):
            shown = ast.unparse(value)
            self._refuse(
                f"`{shown}` calls a prompt function: write the call as a statement, where its text belongs",
                value.lineno,
            )
            return []
        self._fields.check(value, statement.lineno)
        if isinstance(statement, ast.AugAssign):
            value = ast.copy_location(ast.BinOp(ast.Name(target.id, ast.Load()), statement.op, value), value)
        elif (
            self._stored[target.id] == 1 and not self._branches and target.id not in self._function.signature.parameters
        ):
            known = self._constant(value)
            if known is not UNKNOWN:
                self._constants.values[target.id] = known
        return [Set(target.id, self._expression(value))]

    def _expression(self, node: ast.expr) -> Expression:
        return Expression(node, self._function.file)

"""The possible changes to a file's code, one place at a time."""

from __future__ import annotations

import ast
import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# Adding 1 to a factor like 1e9 makes no difference that a test could see.
LARGE = 1e6
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Change:
    """One change: `new` replaces the bytes from `start` to `end` of a file, on these lines. what: for people."""

    file: str
    start: int
    end: int
    new: str
    line: int
    last_line: int
    what: str

    def applied_to(self, source: bytes) -> bytes:
        """Return the changed file."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    def diff(self) -> str:
        """Return the change as a diff of the file."""
        before = (ROOT / self.file).read_bytes()
        after = self.applied_to(before).decode().splitlines()
        return "\n".join(difflib.unified_diff(before.decode().splitlines(), after, self.file, self.file, "", "", 2, ""))


class Changes:
    """All changes to a file's code, but not to its docstrings, types, messages or log lines."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._source = (ROOT / file).read_bytes()
        self._line_starts = [0]
        for line in self._source.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def all(self) -> list[Change]:
        """Return the changes in the order of their positions."""
        found = list(self._in(ast.parse(self._source)))
        return sorted(found, key=lambda change: (change.start, change.end, change.new))

    def _in(self, node: ast.AST) -> Iterator[Change]:
        yield from self._of(node)
        for child in _code_in(node):
            yield from self._in(child)

    def _of(self, node: ast.AST) -> Iterator[Change]:
        """Yield the changes of a node itself."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            changed = copy.copy(node)
            changed.ops = [COMPARISONS[type(node.ops[0])]()]
            yield self._expression(node, changed, "another comparison")
        elif isinstance(node, ast.BoolOp):
            changed_bool = copy.copy(node)
            changed_bool.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield self._expression(node, changed_bool, "and for or")
            for left_out in range(len(node.values)):
                rest = [value for place, value in enumerate(node.values) if place != left_out]
                fewer = rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
                yield self._expression(node, fewer, "a condition left out")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield self._expression(node, node.operand, "no longer negated")
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_first_word(node):
            changed_sum = copy.copy(node)
            changed_sum.op = ARITHMETIC[type(node.op)]()
            yield self._expression(node, changed_sum, "another operator")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield self._expression(node, ast.Constant(not node.value), "the opposite")
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            more = node.value + 1 if abs(node.value) < LARGE else node.value * 2
            yield self._expression(node, ast.Constant(more), "another number")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            yield self._expression(node.func, ast.Name(FUNCTIONS[node.func.id]), "another function")
        elif isinstance(node, ast.IfExp):
            yield self._expression(node, node.body, "always the first")
            yield self._expression(node, node.orelse, "always the second")
        elif isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
            yield self._expression(node.test, ast.UnaryOp(ast.Not(), node.test), "the opposite condition")
        elif isinstance(node, ast.Expr | ast.AugAssign | ast.Break | ast.Continue | ast.Delete):
            yield self._statement(node, "a statement left out")
        elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            yield self._expression(node.value, ast.Constant(None), "nothing returned")

    def _expression(self, node: ast.expr, new: ast.expr, what: str) -> Change:
        text = ast.unparse(ast.fix_missing_locations(new))
        return self._change(node, text if isinstance(new, ast.Name | ast.Constant) else f"({text})", what)

    def _statement(self, node: ast.stmt, what: str) -> Change:
        return self._change(node, "pass", what)

    def _change(self, node: ast.expr | ast.stmt, new: str, what: str) -> Change:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._line_starts[node.lineno - 1] + node.col_offset
        end = self._line_starts[node.end_lineno - 1] + node.end_col_offset
        return Change(self._file, start, end, new, node.lineno, node.end_lineno, what)


def _code_in(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the children of a node whose changes would change what the code does."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_words(child):
                yield child


def _is_words(node: ast.AST) -> bool:
    """Tell whether a node is for people or type checkers, or asserts what must be true anyway."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.keyword):
        # The keyword of `zip`.
        return node.arg == "strict"
    if isinstance(node, ast.Expr):
        call = node.value
        if isinstance(call, ast.Constant):
            return True
        return isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("_LOG.", "logger.", "self.logging"))
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__slots__")


def _is_first_word(node: ast.BinOp) -> bool:
    """Tell whether a sum is the position of a row's first word, which has offset 0: minus 0 is the same."""
    return isinstance(node.op, ast.Add) and isinstance(node.right, ast.Attribute) and node.right.attr == "STATE"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None

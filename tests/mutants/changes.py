"""Small faults that a test should notice: each place in a source at which one can be put, and the source with it."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED: dict[type, type] = {
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
COUNTED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Pow: ast.Mult,
}
NAMES = {
    "min": "max",
    "max": "min",
    "all": "any",
    "any": "all",
    "amax": "amin",
    "amin": "amax",
    "argmax": "argmin",
    "sum": "mean",
    "mean": "sum",
    "sorted": "list",
    "maximum": "minimum",
    "minimum": "maximum",
}


@dataclass(frozen=True)
class Change:
    """The `number`-th change of a file."""

    file: str
    number: int
    line: int
    told: str


def _variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in the place of a node, with what it is in words."""
    made = copy.deepcopy(node)
    if isinstance(made, ast.Compare) and type(made.ops[0]) in COMPARED:
        made.ops[0] = COMPARED[type(made.ops[0])]()
        yield "another comparison", made
    elif isinstance(made, ast.BinOp | ast.AugAssign) and type(made.op) in COUNTED:
        if isinstance(made, ast.BinOp) and isinstance(made.left, ast.Constant) and isinstance(made.left.value, str):
            return
        made.op = COUNTED[type(made.op)]()
        yield "another operator", made
    elif isinstance(made, ast.BoolOp):
        made.op = ast.Or() if isinstance(made.op, ast.And) else ast.And()
        yield "and for or", made
    elif isinstance(made, ast.UnaryOp) and isinstance(made.op, ast.Not | ast.USub):
        yield "without not or minus", made.operand
    elif isinstance(made, ast.If | ast.While | ast.IfExp):
        made.test = ast.UnaryOp(ast.Not(), made.test)
        yield "the other branch", made
    elif isinstance(made, ast.Constant) and isinstance(made.value, bool):
        made.value = not made.value
        yield "True for False", made
    elif isinstance(made, ast.Constant) and isinstance(made.value, int | float):
        made.value = made.value + 1
        yield "another number", made
    elif isinstance(made, ast.Name) and made.id in NAMES and isinstance(made.ctx, ast.Load):
        made.id = NAMES[made.id]
        yield "another function", made
    elif isinstance(made, ast.Attribute) and made.attr in NAMES:
        made.attr = NAMES[made.attr]
        yield "another function", made
    elif isinstance(made, ast.Return) and made.value is not None:
        made.value = ast.Constant(None)
        yield "returns nothing", made
    elif isinstance(made, ast.Continue | ast.Break):
        yield "goes on", ast.Pass()


def _for_types(node: ast.AST) -> bool:
    """True for `if TYPE_CHECKING:`, which holds imports alone."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


class _Walk(ast.NodeTransformer):
    """Visits every place; at the chosen one it puts the change. Annotations, imports and sentences of errors are no places."""

    def __init__(self, chosen: int = -1) -> None:
        self.chosen, self.found = chosen, list[tuple[int, str]]()

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom) or _for_types(node):
            return node
        for told, other in _variants(node):
            self.found.append((node.lineno, f"{told}: {ast.unparse(node).splitlines()[0][:70]}"))  # type: ignore[attr-defined]
            if len(self.found) - 1 == self.chosen:
                return ast.copy_location(other, node)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.defaults = [self.visit(d) for d in node.args.defaults]
        node.body = [self.visit(part) for part in node.body]
        return node


def changes(file: str, text: str) -> list[Change]:
    """All changes of a source."""
    walk = _Walk()
    walk.visit(ast.parse(text))
    return [Change(file, number, *found) for number, found in enumerate(walk.found)]


def changed(text: str, number: int) -> ast.AST:
    """The source as a tree, with one change."""
    tree = _Walk(number).visit(ast.parse(text))
    return ast.fix_missing_locations(tree)

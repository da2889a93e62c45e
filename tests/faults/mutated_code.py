"""Which code the drawn mutations may change."""

import ast
from collections.abc import Iterator

CODE_LEFT_OUT = {
    "methods pin_memory": "they run where there is a GPU",
    "assert": "it states what cannot happen, and changes no result",
    "the value of a raise": "words for a person; that it is raised is mutated",
    "log.info, print_rank0, set_phase": "words for a person who watches the run",
    "annotations, decorators, f-strings": "types, caches and words",
    "strict= of zip": "it states that lengths are equal, and changes no result",
    "num_warps and num_stages": "how a GPU divides a kernel's work, which changes no result",
    "the - of dim=-1 and shape[-1]": "of a matrix, 1 is the same; other numbers are tried",
}
NO_RESULT = ("strict", "num_warps", "num_stages")
WORDS_FOR_PEOPLE = ("info", "fields", "print", "print_rank0", "set_phase")


def code_of(node: ast.AST, span: tuple[int, int]) -> Iterator[tuple[ast.AST, tuple[int, int]]]:
    """The nodes that are mutated, each with its statement's lines; (0, 0) outside functions."""
    if isinstance(node, ast.FunctionDef):
        if node.name == "pin_memory":
            return
        body = (node.body[0].lineno, node.end_lineno or 0)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                yield from code_of(default, body)
        for statement in node.body:
            yield from code_of(statement, body)
        return
    if isinstance(node, ast.stmt) and span != (0, 0):
        inner = getattr(node, "body", None)
        last = inner[0].lineno - 1 if inner else node.end_lineno or 0
        span = (node.lineno, max(node.lineno, last))
    if not _is_left_out(node):
        yield node, span
        for name, child in _children(node):
            if name not in ("annotation", "decorator_list", "returns", "exc", "cause"):
                yield from code_of(child, span)


def _children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_option(node, child):
                yield name, _without_sign(child) if _is_dimension(node, name) else child


def _is_option(node: ast.AST, child: ast.AST) -> bool:
    """Whether a value of a dict has a name of NO_RESULT."""
    if not isinstance(node, ast.Dict) or child not in node.values:
        return False
    return getattr(node.keys[node.values.index(child)], "value", None) in NO_RESULT


def _is_dimension(node: ast.AST, field: str) -> bool:
    """Whether the child in this field is the number of a dimension."""
    if isinstance(node, ast.keyword):
        return node.arg == "dim"
    if isinstance(node, ast.Subscript) and field == "slice":
        return getattr(node.value, "attr", "") == "shape"
    return False


def _without_sign(node: ast.AST) -> ast.AST:
    return node.operand if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-1" else node


def _is_left_out(node: ast.AST) -> bool:
    """What CODE_LEFT_OUT describes."""
    if isinstance(node, ast.Expr):
        call = node.value
        return isinstance(call, ast.Call) and _called(call) in WORDS_FOR_PEOPLE
    if isinstance(node, ast.keyword):
        return node.arg in NO_RESULT
    return isinstance(node, ast.Assert | ast.JoinedStr | ast.AnnAssign) and not (
        isinstance(node, ast.AnnAssign) and node.value is not None
    )


def _called(call: ast.Call) -> str:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return str(name)

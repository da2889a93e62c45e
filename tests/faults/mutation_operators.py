"""Small mistakes, made by rule in the source of the package: what `mutations` draws from.

An operator is given a node of the syntax tree and returns nodes to put in its place.
"""

import ast
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.mutated_code import NO_RESULT, code_of

# How often a folder of vico/ is drawn from, beside the others: the first five keep what the
# product promises (losses, updates, checkpoints, files).
WEIGHTS = {"model": 3.0, "data": 3.0, "train": 3.0, "checkpoint": 3.0, "io": 3.0}
# What is not mutated, and why.
FILES_LEFT_OUT = {
    "vico/model/cuda_graphs.py": "captures and their memory are of a GPU; tests/gpu tries them",
    "vico/cli/demo_llama.py": "makes the demo's LLaMA, which slow tests try out",
    "vico/cli/demo_dataset.py": "makes the demo's files, which slow tests try out",
    "vico/cli/demo_domain.py": "makes the demo's questions, which slow tests try out",
    "vico/planner/gpu_specs.py": "a table of what GPUs are sold with, measured nowhere",
}


@dataclass(frozen=True)
class Equivalent:
    file: str
    old: str
    new: str
    why: str


# Looked at one by one: no test can tell these from the code.
_OFTEN = "how often the progress bar is drawn"
_AT_A_TIME = "by how many columns a cache grows at a time"
EQUIVALENT = (
    Equivalent("vico/train/progress_bar.py", "10", "9", _OFTEN),  # of EARLY
    Equivalent("vico/train/progress_bar.py", "10", "11", _OFTEN),
    Equivalent("vico/train/progress_bar.py", "20.0", "20.4", _OFTEN),  # PLAIN_SECONDS
    Equivalent(
        "vico/data/bin_packing.py",
        "sizes[largest] > budget",
        "(sizes[largest] >= budget)",
        "the fewest items of a total that one item has are this item",
    ),
    Equivalent("vico/model/attention/cache.py", "64", "63", _AT_A_TIME),
    Equivalent("vico/model/attention/cache.py", "64", "65", _AT_A_TIME),
    Equivalent(
        "vico/model/ops/fp8_kernels.py",
        "magnitude > 0x7F800000",
        "(magnitude >= 2139095040)",
        "an infinite number's factor is 0, which makes it NaN before",
    ),
    Equivalent(
        "vico/model/weights/hf_config.py",
        "0.5",
        "0.51",
        "any part of one keeps the product from falling below the width",
    ),
    Equivalent(
        "vico/train/heat_map.py",
        "shares[..., None] > 0",
        "(shares[..., None] >= 0)",
        "the colour of 0 is multiplied by 0",
    ),
    Equivalent(
        "vico/model/ops/autograd.py",
        "_exact_logits(h_CD, targets_CD)",
        "_exact_logits(targets_CD, h_CD)",
        "it multiplies elements and sums the products",
    ),
    Equivalent(
        "vico/train/step.py",
        "torch.tensor([signals.stop_requested()], dtype=torch.float64)",
        "torch.tensor([signals.stop_requested()])",
        "concatenated with float64, it becomes float64",
    ),
    Equivalent(
        "vico/train/optim.py",
        "0.0",
        "0.02",
        "the learning rate before the first step, which sets it",
    ),
)
SWAPPED_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
OPPOSITE_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
}
SWAPPED_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
SWAPPED_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
SWAPPED_NAMES |= {"argmin": "argmax", "argmax": "argmin", "amax": "amin", "amin": "amax"}
SWAPPED_NAMES |= {"sorted": "list", "reversed": "list", "sum": "max", "ceil": "floor"}
RELATIVE_ERROR = 1.02
SHOWN = 60  # letters of the code that changes


def _boundary(node: ast.AST) -> Iterator[ast.AST]:
    """`<=` for `<`."""
    yield from _compare(node, SWAPPED_COMPARISONS)


def _comparison(node: ast.AST) -> Iterator[ast.AST]:
    """`!=` for `==`."""
    yield from _compare(node, OPPOSITE_COMPARISONS)


def _compare(node: ast.AST, others: dict[type[ast.cmpop], type[ast.cmpop]]) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            if type(operator) in others:
                changed = copy.copy(node)
                changed.ops = [*node.ops]
                changed.ops[index] = others[type(operator)]()
                yield changed


def _arithmetic(node: ast.AST) -> Iterator[ast.AST]:
    """`-` for `+`. Strings and paths have operators too, which are left alone."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SWAPPED_ARITHMETIC:
        operands = [
            getattr(node, name) for name in ("left", "right", "value") if name in vars(node)
        ]
        if not any(_is_text(operand) for operand in operands):
            changed = copy.copy(node)
            changed.op = SWAPPED_ARITHMETIC[type(node.op)]()
            yield changed


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str | bytes)
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr)


def _and_or(node: ast.AST) -> Iterator[ast.AST]:
    """`or` for `and`."""
    if isinstance(node, ast.BoolOp):
        changed = copy.copy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed


def _sign(node: ast.AST) -> Iterator[ast.AST]:
    """A dropped `not`, `-` or `~`."""
    if isinstance(node, ast.UnaryOp):
        yield node.operand


def _condition(node: ast.AST) -> Iterator[ast.AST]:
    """A condition that always holds, or never."""
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        for value in (True, False):
            if value and isinstance(node, ast.While):
                continue
            changed = copy.copy(node)
            changed.test = ast.Constant(value)
            yield changed


def _constant(node: ast.AST) -> Iterator[ast.AST]:
    """An integer off by one, a number off by 2 %, False for True."""
    if not isinstance(node, ast.Constant):
        return
    value: Any = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        if value > 0:
            yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(value * RELATIVE_ERROR if value else 0.02)


def _arguments(node: ast.AST) -> Iterator[ast.AST]:
    """The first two arguments of a call, swapped."""
    if isinstance(node, ast.Call) and len(node.args) >= 2:
        names = [ast.unparse(argument) for argument in node.args[:2]]
        plain = all(isinstance(a, ast.Name | ast.Attribute | ast.Subscript) for a in node.args[:2])
        if plain and names[0] != names[1]:
            changed = copy.copy(node)
            changed.args = [node.args[1], node.args[0], *node.args[2:]]
            yield changed


def _keyword(node: ast.AST) -> Iterator[ast.AST]:
    """A keyword argument that is forgotten."""
    if isinstance(node, ast.Call):
        for index, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, *NO_RESULT):
                changed = copy.copy(node)
                changed.keywords = node.keywords[:index] + node.keywords[index + 1 :]
                yield changed


def _function(node: ast.AST) -> Iterator[ast.AST]:
    """`max` for `min`."""
    if isinstance(node, ast.Call):
        for name in ("id", "attr"):
            other = SWAPPED_NAMES.get(getattr(node.func, name, ""))
            if other is not None and not (name == "attr" and other == "list"):
                changed = copy.copy(node)
                changed.func = copy.copy(node.func)
                setattr(changed.func, name, other)
                if other == "list":
                    changed.keywords = []
                yield changed


def _slice(node: ast.AST) -> Iterator[ast.AST]:
    """A bound of a slice, off by one."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        for name, operator in (("lower", ast.Add()), ("upper", ast.Sub())):
            bound = getattr(node.slice, name)
            if bound is not None:
                changed = copy.copy(node)
                changed.slice = copy.copy(node.slice)
                setattr(changed.slice, name, ast.BinOp(bound, operator, ast.Constant(1)))
                yield changed


def _return(node: ast.AST) -> Iterator[ast.AST]:
    """A function that returns nothing."""
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))


def _statement(node: ast.AST) -> Iterator[ast.AST]:
    """A statement that is forgotten: a call, a refusal, an update, a jump."""
    forgotten = ast.Raise | ast.AugAssign | ast.Continue | ast.Break | ast.Delete
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if isinstance(node, forgotten) or is_call:
        yield ast.Pass()


OPERATORS: tuple[Callable[[ast.AST], Iterator[ast.AST]], ...] = (
    _boundary,
    _comparison,
    _arithmetic,
    _and_or,
    _sign,
    _condition,
    _constant,
    _arguments,
    _keyword,
    _function,
    _slice,
    _return,
    _statement,
)


@dataclass(frozen=True)
class Mutation:
    operator: str
    file: str  # in the checkout
    line: int
    lines: tuple[int, int]  # those whose tests are asked: (0, 0) is the whole file
    start: int  # what is replaced, in bytes
    end: int
    old: str
    new: str

    @property
    def name(self) -> str:
        """One line; of long code, the part that changes."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        pairs = enumerate(zip(old, new, strict=False))
        begin = max(0, next((i for i, (a, b) in pairs if a != b), 0) - SHOWN // 2)
        old, new = (text[begin : begin + SHOWN] for text in (old, new))
        return f"{self.file}:{self.line}: {self.operator}: {old} -> {new}"

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]


def draw(root: Path, seed: int, number: int, files: tuple[str, ...] = ()) -> list[Mutation]:
    """Distinct mutations of vico/, or of `files` only; few where one operator has many places."""
    paths = [root / file for file in files] or sorted((root / "vico").rglob("*.py"))
    places: list[Mutation] = []
    for path in paths:
        file = path.relative_to(root).as_posix()
        if file not in FILES_LEFT_OUT:
            places += mutations(file, path.read_bytes())
    counts = Counter(place.operator for place in places)
    random_numbers = random.Random(seed)

    def key(place: Mutation) -> float:
        """Sorting by it draws without replacement: Efraimidis and Spirakis, 2006."""
        weight = WEIGHTS.get(place.file.split("/")[1], 1.0) / counts[place.operator] ** 0.5
        exponent: float = 1 / weight
        return random_numbers.random() ** exponent

    return sorted(places, key=key, reverse=True)[:number]


def mutations(file: str, source: bytes) -> list[Mutation]:
    """All of a file, in its order."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    for node, span in code_of(ast.parse(source), (0, 0)):
        for operator in OPERATORS:
            for changed in operator(node):
                old, new = _changed_part(node, changed)
                start = starts[old.lineno - 1] + old.col_offset
                end = starts[(old.end_lineno or 0) - 1] + (old.end_col_offset or 0)
                text = ast.unparse(new)
                if isinstance(new, ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp | ast.UnaryOp):
                    text = f"({text})"
                name = operator.__name__.strip("_")
                old_text = source[start:end].decode()
                found.append(Mutation(name, file, old.lineno, span, start, end, old_text, text))
    equivalent = [(place.file, place.old, place.new) for place in EQUIVALENT]
    return [m for m in found if m.old != m.new and (m.file, m.old, m.new) not in equivalent]


def _changed_part(node: Any, changed: Any) -> tuple[Any, Any]:
    """Of a compound statement only its condition is replaced."""
    if isinstance(node, ast.If | ast.While):
        return node.test, changed.test
    return node, changed

"""Mistakes in a function, made on purpose, so that a wrong answer can be compared with them.

A mistake is one small change of the function's own source: a summand or a factor left out, a matrix not transposed, a
sum over another axis, a step back left out, one array in the place of another. The bugs of `bugs.txt` that are in the
function have better names, and come first. Functions that it calls have mistakes too.

A meaning speaks of the letters that the learner has: arguments, and what the cache holds.
"""

import ast
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

from foundation.challenges.planting import BUGS, define, tree_of

type Change = tuple[str, ast.expr]
"""What a change means, and the expression that stands in the place of another."""

SUMMAND = "a summand is left out: "
"""How a meaning begins from which `diagnosis` learns what an answer is the sum of."""
_MODULES = {"jnp", "jax", "math", "lax"}
_REDUCTIONS = {"sum": ("mean", "max"), "mean": ("sum",), "max": ("sum",), "min": ("max",)}
_ELEMENTWISE = {"exp", "log", "sqrt", "tanh", "sign", "abs", "round", "log2", "floor", "cumsum"}
_SHORT, _DIVISOR = 14, 28
"""Characters of source that are shown as they are, and of a divisor: more would be the answer."""


def made_on_purpose(function: Callable[..., Any], arguments: tuple) -> Iterator[tuple[str, Any]]:
    """(meaning, result) of each mistake in a function that runs for these arguments."""
    function = inspect.unwrap(function)
    sites = _calls(tree_of(function), function)
    for make in (_named, changed):
        for meaning, tree in make(function):
            yield from _result(meaning, tree, dict(function.__globals__), arguments)
        for callee in dict.fromkeys(callee for _, callee in sites):
            where = "" if make is _named or ".lessons." in callee.__module__ else f"in {callee.__name__.strip('_')}: "
            for meaning, tree in make(callee):
                own = dict(callee.__globals__)
                define(tree, own)
                scope = {**function.__globals__, _CHANGED: own[callee.__name__]}
                for caller in _callers(function, [node for node, called in sites if called is callee]):
                    yield from _result(where + meaning, caller, scope, arguments)


_CHANGED = "_changed"
"""What a function calls in the place of another one."""


def _result(meaning: str, tree: ast.FunctionDef, scope: dict[str, Any], arguments: tuple) -> Iterator[tuple[str, Any]]:
    try:
        with warnings.catch_warnings(action="ignore"):
            define(tree, scope)
            result = scope[tree.name](*arguments)
    except Exception:  # the shapes do not fit, so nobody's answer is this one
        return
    yield meaning, result


def _callers(function: FunctionType, calls: list[int]) -> Iterator[ast.FunctionDef]:
    """The function with a changed function in all of these calls, and in each of them."""
    for chosen in [calls, *([call] for call in calls if len(calls) > 1)]:
        tree = tree_of(function)
        for place, node in enumerate(ast.walk(tree)):
            if place in chosen and isinstance(node, ast.Call):
                node.func = ast.Name(_CHANGED, ast.Load())
        yield tree


def _is_ours(value: object, caller: FunctionType) -> bool:
    """Whether a called function's mistakes are looked for too: a backward pass, or a helper from the same file."""
    if not callable(value) or not str(getattr(value, "__module__", "")).startswith("foundation."):
        return False
    return value.__module__ == caller.__module__ or getattr(value, "__name__", "").endswith("_backward")


def _calls(tree: ast.AST, caller: FunctionType) -> list[tuple[int, FunctionType]]:
    """Each call of a function whose mistakes are looked for too: its place in the tree, and the function."""
    found = []
    for place, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            value = caller.__globals__.get(node.func.id)
            if value is not None and _is_ours(value, caller):
                found.append((place, inspect.unwrap(value)))
    return found


def _named(function: FunctionType) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The planted bugs of a function."""
    for bug in BUGS:
        if bug.place == f"{function.__module__.removeprefix('foundation.')}.{function.__name__}":
            yield bug.name.partition(": ")[2], tree_of(function, bug.old, bug.new)


def changed(function: FunctionType) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The function's tree with one change after the other. It is one tree: use it before the next."""
    tree = tree_of(function)
    letters = _Letters(tree, function.__globals__)
    places = list(_places(tree))
    alike: dict[str, list[tuple[Any, ast.expr]]] = {}
    for changes_of in (partial(_changes, letters), letters.others, letters.scaled):
        found = [(place, *change) for place in places for change in changes_of(place[-1])]
        for place, meaning, other in sorted(found, key=lambda change: not change[1].startswith(SUMMAND)):
            if any(often in meaning for often in _OFTEN):
                alike.setdefault(meaning.partition(":")[0], []).append((place, other))
            yield from _with([(place, other)], meaning, tree)
    for meaning, changes in alike.items():
        if len(changes) > 1:
            yield from _with(changes, f"{meaning}, more than once", tree)


_OFTEN = ("the order is not", "a mean stands", "a sum stands where a mean", "a matrix is not", "is left out, as if")
"""Parts of what is forgotten everywhere, if at all."""


def _with(
    changes: list[tuple[Any, ast.expr]], meaning: str, tree: ast.FunctionDef
) -> Iterator[tuple[str, ast.FunctionDef]]:
    for (holder, field, index, _), other in changes:
        _put(holder, field, index, other)
    try:
        yield meaning, tree
    finally:
        for (holder, field, index, node), _ in reversed(changes):
            _put(holder, field, index, node)


def _places(tree: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, int | None, ast.expr]]:
    """Each expression of the body, and where it hangs."""
    for statement in tree.body:
        for holder in ast.walk(statement):
            for field, value in ast.iter_fields(holder):
                if isinstance(value, ast.expr) and field not in ("slice", "func", "annotation"):
                    yield holder, field, None, value
                elif isinstance(value, list):
                    yield from ((holder, field, i, v) for i, v in enumerate(value) if isinstance(v, ast.expr))


def _put(holder: Any, field: str, index: int | None, node: ast.expr) -> None:
    if index is None:
        setattr(holder, field, node)
    else:
        getattr(holder, field)[index] = node


class _Letters:
    """What the learner calls the arrays of a function."""

    def __init__(self, tree: ast.FunctionDef, scope: dict[str, Any]) -> None:
        self.scope = scope
        self.given = [argument.arg for argument in tree.args.args]
        self.defined: dict[str, ast.expr] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in ast.walk(node.targets[0]):
                    if isinstance(target, ast.Name) and isinstance(node.value, ast.Name) and node.value.id == "cache":
                        self.given.append(target.id)
                    elif isinstance(target, ast.Name):
                        self.defined.setdefault(target.id, node.value)

    def of(self, node: ast.AST, seen: tuple[str, ...] = ()) -> list[str]:
        """The given letters that an expression depends on, in order."""
        if isinstance(node, ast.Name):
            if node.id in self.defined and node.id not in seen:
                return self.of(self.defined[node.id], (*seen, node.id))
            return [node.id] if node.id in self.given and node.id != "cache" else []
        found = [letter for child in ast.iter_child_nodes(node) for letter in self.of(child, seen)]
        return list(dict.fromkeys(found))

    def text(self, node: ast.expr, longest: int = _SHORT) -> str:
        """An expression, or what is in it where it is long or made of the solution's own letters."""
        if isinstance(node, ast.Name):
            node = self.defined.get(node.id, node)
        if isinstance(node, ast.Attribute) and node.attr == "shape":
            return f"a size of {ast.unparse(node.value)}"
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        source = ast.unparse(node)
        for noise in ("jnp.", "math.", "lax."):
            source = source.replace(noise, "")
        if len(source) <= longest and not names & self.defined.keys():
            return source.removesuffix(".0").replace(".0 ", " ")
        return _the_part_with(self.of(node))

    def but(self, node: ast.expr, other: ast.expr) -> str:
        """A summand, by what the other one does not have."""
        own = [letter for letter in self.of(node) if letter not in self.of(other)]
        text = self.text(node)
        return _the_part_with(own) if own and text == _the_part_with(self.of(node)) else text

    def scaled(self, node: ast.expr) -> Iterator[Change]:
        """A sum with one factor more."""
        if _reduction(node):
            assert isinstance(node, ast.Call)
            for letter in self.given:
                for operator, said in ((ast.Mult(), "multiplied"), (ast.Div(), "divided")):
                    scaled = ast.BinOp(node.args[0], operator, ast.Name(letter, ast.Load()))
                    yield f"what is summed up is {said} by {letter}", ast.Call(node.func, [scaled], node.keywords)

    def others(self, node: ast.expr) -> Iterator[Change]:
        """Another array in the place of this one."""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in _MODULES | {"cache"}:
            if callable(self.scope.get(node.id)):
                return
            yield f"{self.text(node)} is squared, and should not be", ast.BinOp(node, ast.Pow(), ast.Constant(2))
            yield f"{self.text(node)} is left out, as if it were 1", _call("ones_like", node)
            for other in (*self.given, *self.defined):
                if other not in (node.id, "cache"):
                    ours, theirs = (self.text(ast.Name(name, ast.Load())) for name in (other, node.id))
                    yield f"{ours} stands where {theirs} belongs", ast.Name(other, ast.Load())


def _the_part_with(letters: list[str]) -> str:
    if not letters:
        return "a number"
    return "the part with " + " and ".join(filter(None, [", ".join(letters[:-1]), letters[-1]]))


def _reduction(node: ast.expr) -> str:
    """The name of a sum, a mean or the like; empty for anything else."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="jnp"), attr=name), args=[_, *_]) if name in _REDUCTIONS:
            return name
    return ""


def _changes(letters: _Letters, node: ast.expr) -> Iterator[Change]:
    """What may be forgotten or confused at one expression."""
    text = letters.text
    match node:
        case ast.BinOp():
            yield from _of_arithmetic(node, letters)
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield f"the minus sign of {text(operand)} is left out", operand
        case ast.Attribute(attr="T", value=matrix):
            yield f"a matrix is not transposed: {text(matrix)}", matrix
            yield f"the inverse of {text(matrix)} stands where its transpose belongs", _call("linalg.pinv", matrix)
        case ast.Subscript(value=ast.Attribute(attr="shape") as sizes, slice=ast.Constant() | ast.UnaryOp()):
            wrong = ast.Subscript(sizes, ast.Constant(-2), ast.Load())
            yield f"the size of a wrong axis: {text(wrong)}, where {text(node)} belongs", wrong
        case ast.Subscript(value=array, slice=ast.Slice(step=ast.UnaryOp())):
            yield f"the order is not reversed: of {text(array)}", array
        case ast.List(elts=[_, _, *_] as parts):
            yield "the parts are put together in the other order", ast.List(parts[::-1], ast.Load())
        case ast.Call(func=ast.Name(id=name), args=[first, *_]):
            step = name.removesuffix("_backward")
            left_out = f"the step back through {step} is left out" if step != name else f"{name.strip('_')} is left out"
            yield left_out, first
        case ast.Call(func=ast.Attribute(attr="add", value=ast.Subscript() as at), args=[value]):
            over = ast.Call(ast.Attribute(at, "set", ast.Load()), [value], [])
            yield "what comes later overwrites what came before, and should be added to it", over
        case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name)) if module in _MODULES:
            yield from _of_library(node, name, letters)


def _of_arithmetic(node: ast.BinOp, letters: _Letters) -> Iterator[Change]:
    text, left, right = letters.text, node.left, node.right
    if isinstance(node.op, ast.Add | ast.Sub) and isinstance(right, ast.BinOp) and not isinstance(right.op, ast.Pow):
        grouped = ast.BinOp(ast.BinOp(left, node.op, right.left), right.op, right.right)
        yield f"a parenthesis too many: {text(right.right)} acts on {text(left)} too", grouped
    match node.op:
        case ast.Add():
            yield SUMMAND + letters.but(right, left), left
            yield SUMMAND + letters.but(left, right), right
            yield f"a sign is wrong: {letters.but(right, left)} should be added", ast.BinOp(left, ast.Sub(), right)
        case ast.Sub():
            yield SUMMAND + letters.but(right, left), left
            yield SUMMAND + letters.but(left, right), ast.UnaryOp(ast.USub(), right)
            yield f"a sign is wrong: {letters.but(right, left)} should be subtracted", ast.BinOp(left, ast.Add(), right)
            yield f"{text(right)} stands alone, and should be subtracted from {text(left)}", right
        case ast.Mult():
            yield f"a factor is left out: {text(right)}, which multiplies {text(left)}", left
            yield f"a factor is left out: {text(left)}, which multiplies {text(right)}", right
            if isinstance(left, ast.UnaryOp):
                said = f"a factor is left out: {text(left.operand)}, which multiplies {text(right)}"
                yield said, ast.UnaryOp(left.op, right)
            if isinstance(left, ast.Constant):
                yield f"divided by {text(left)}, and not multiplied", ast.BinOp(right, ast.Div(), left)
            yield (
                f"a sum stands where a product belongs, of {text(left)} and {text(right)}",
                ast.BinOp(left, ast.Add(), right),
            )
        case ast.Div():
            divisor = text(right, _DIVISOR)
            yield f"a division is left out: by {divisor}", left
            yield f"a product stands where a division belongs: by {divisor}", ast.BinOp(left, ast.Mult(), right)
            yield f"divided twice: by {divisor}", ast.BinOp(node, ast.Div(), right)
            yield f"a quotient is turned over: {text(left)} by {divisor}", ast.BinOp(right, ast.Div(), left)
        case ast.Pow():
            yield f"the power of {text(left)} is left out", left
            if isinstance(right, ast.Constant) and isinstance(right.value, int) and right.value > 2:
                yield f"a power is too low: of {text(left)}", ast.BinOp(left, ast.Pow(), ast.Constant(right.value - 1))
        case ast.MatMult():
            if not _is_transposed(left):
                product = ast.BinOp(_transposed(left), ast.MatMult(), right)
                yield f"a matrix is transposed, and should not be: {text(left)}", product
            if not _is_transposed(right):
                product = ast.BinOp(left, ast.MatMult(), _transposed(right))
                yield f"a matrix is transposed, and should not be: {text(right)}", product
            yield f"a sum is left out: of {text(left)} times {text(right)}", ast.BinOp(left, ast.Mult(), right)
            yield f"a product is left out: with {text(right)}", left
            yield f"a product is left out: with {text(left)}", right
            for gone, kept, product in (
                (left, right, ast.BinOp(_call("ones_like", left), ast.MatMult(), right)),
                (right, left, ast.BinOp(left, ast.MatMult(), _call("ones_like", right))),
            ):
                yield f"a factor is left out: {text(gone)}, which multiplies {text(kept)}", product


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    """A call of jax.numpy."""
    function: ast.expr = ast.Name("jnp", ast.Load())
    for part in name.split("."):
        function = ast.Attribute(function, part, ast.Load())
    return ast.Call(function, list(arguments), [])


def _is_transposed(matrix: ast.expr) -> bool:
    match matrix:
        case ast.Attribute(attr="T") | ast.Call(func=ast.Attribute(attr="swapaxes" | "transpose")):
            return True
    return False


def _transposed(matrix: ast.expr) -> ast.expr:
    return _call("swapaxes", matrix, ast.Constant(-1), ast.Constant(-2))


def _of_library(node: ast.Call, name: str, letters: _Letters) -> Iterator[Change]:
    """Changes of a call of jax.numpy."""
    text = letters.text
    first = node.args[0] if node.args else ast.Constant(0)
    if name in _REDUCTIONS:
        yield f"the {name} of {text(first)} is left out", first
        for other in _REDUCTIONS[name]:
            other_call = ast.Call(_call(other).func, node.args, node.keywords)
            yield f"a {other} stands where a {name} belongs", other_call
        rest = [keyword for keyword in node.keywords if keyword.arg != "axis"]
        for axis in (None, 0, 1, 2, -1, -2):
            over = f"over axis {axis}" if axis is not None else "over everything"
            moved = ast.keyword("axis", ast.Constant(axis))
            yield f"the {name} is taken over a wrong axis: {over}", ast.Call(node.func, node.args[:1], [moved, *rest])
        along = next((k.value for k in node.keywords if k.arg == "axis"), ast.Constant(0))
        yield f"only the first is taken of what the {name} is over", _call("take", first, ast.Constant(0), along)
    elif name in ("swapaxes", "transpose"):
        yield f"a matrix is not transposed: {text(first)}", first
    elif name == "where" and len(node.args) == 3:
        mask, yes, no = node.args
        yield f"the mask is left out: {text(mask)}", yes
        yield f"the mask is left out: {text(mask)}", no
        yield "the two cases of a mask are exchanged", ast.Call(node.func, [mask, no, yes], [])
    elif name in ("maximum", "minimum"):
        for argument in node.args:
            yield f"the {name} is left out", argument
    elif name in _ELEMENTWISE:
        yield f"the {name} of {text(first)} is left out", first
        yield f"a sign is wrong under {name}", ast.Call(node.func, [ast.UnaryOp(ast.USub(), first)], node.keywords)
        if node.keywords:
            yield f"the {name} goes along a wrong axis", _call(name, first, ast.Constant(-1))
        if name == "log2":
            yield "these are nats: take log2 for bits", _call("log", first)
    elif name == "einsum" and len(node.args) == 2:
        yield f"a product is left out: of {text(node.args[1])}", node.args[1]

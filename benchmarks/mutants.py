"""Mutants of moe_jax: one small change of the code each, made by an operator of cosmic-ray.

`draw` takes places of the code at random and applies one operator at each, also drawn at random. Left out are
annotations, error messages, and operators that nearly always raise a TypeError (a shift instead of a sum).
"""

import ast
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BITS = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}


@dataclass
class Mutant:
    package: str
    module: str
    line: int
    column: int
    operator: str
    occurrence: int
    old: str = ""
    new: str = ""
    outcome: str = ""
    seconds: float = 0.0
    by: str = ""  # what pytest said of the test that failed


def sensible(operator: str) -> bool:
    """Whether an operator gives mutants that can run at all."""
    replaced = re.fullmatch(r"core/Replace(Binary|Comparison)Operator_(\w+)_(\w+)", operator)
    if replaced is None:
        return "Variable" not in operator
    kind, old, new = replaced.groups()
    if kind == "Binary":
        return (old in BITS) == (new in BITS)
    return old.startswith("Is") == new.startswith("Is")


def untouched(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans that get no mutant: annotations, raised errors, type aliases, and what only a type checker reads."""
    nodes: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        nodes += [getattr(node, name, None) for name in ("annotation", "returns")]
        checked_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        nodes += [node] if isinstance(node, ast.Raise | ast.TypeAlias) or checked_only else []
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes if n is not None]


def places(path: Path) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Place in a file -> the operators that can change it, each with its number of occurrence in the file."""
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text(encoding="utf-8")
    spans = untouched(source)
    tree = get_ast(source)
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in sorted(filter(sensible, operator_names())):
        operator = get_operator(name)()
        count = 0

        class Walk(Visitor):
            def visit(self, node):
                nonlocal count
                for start, _ in operator.mutation_positions(node):  # noqa: B023, it is used within this iteration
                    if not any(first <= tuple(start) < last for first, last in spans):
                        found.setdefault(tuple(start), []).append((name, count))  # noqa: B023
                    count += 1
                return node

        Walk().walk(tree)
    return found


def draw(package: str, number: int, seed: int) -> tuple[list[Mutant], int]:
    """A sample of the mutants of a package or a module, and the number of places that it was drawn from."""
    drawn_from = ROOT / "moe_jax" / package
    everywhere = [
        (path.relative_to(ROOT).as_posix(), place, operators)
        for path in ([drawn_from] if drawn_from.is_file() else sorted(drawn_from.rglob("*.py")))
        for place, operators in sorted(places(path).items())
    ]
    rng = random.Random(f"{seed} {package}")
    rng.shuffle(everywhere)
    chosen: list[Mutant] = []
    for module, place, operators in everywhere:
        mutant = Mutant(package, module, *place, *rng.choice(operators))
        if len(chosen) < number and mutate(mutant) is not None:
            chosen.append(mutant)
    return chosen, len(everywhere)


def mutate(mutant: Mutant) -> str | None:
    """The source of the module with the mutant. Notes the changed line in the mutant. None if nothing but the spelling
    changes, as when cosmic-ray takes the `*` before keyword arguments for a product, or if it is not Python."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / mutant.module).read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None, f"{mutant} does not apply"
    try:
        trees = ast.parse(source), ast.parse(changed)
    except SyntaxError:
        return None
    operations = [Counter(type(n.op) for n in ast.walk(t) if isinstance(n, ast.BinOp)) for t in trees]
    if "BinaryOperator" in mutant.operator and operations[0] == operations[1]:
        return None
    pairs = [(a, b) for a, b in zip(source.splitlines(), changed.splitlines(), strict=False) if a != b]
    mutant.old, mutant.new = (text.strip() for text in pairs[0]) if pairs else ("", "")
    return changed

"""The collectives of a compiled program, read from its optimised HLO: what devices send each other, and how often.

A program for several devices is one program that each of them runs. So every size here is that of one device. On a GPU
a collective is two instructions, and the result of its `-start` repeats the operands.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from moe_jax.system.hlo import Computation, Instruction, calls, parse

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]

type Arrays = tuple[tuple[str, tuple[int, ...]], ...]


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array. Numbers of 4 bits share a byte; "" (no array) takes none."""
    if not dtype:
        return 0
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
    return -(-bits * math.prod(shape) // 8)


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: Kind
    op_name: str
    """The traced operation that it came from."""
    operands: Arrays
    """Dtype and shape of each array that a device gives."""
    bytes: int
    """Bytes of the whole array on a device, in one execution: the operands, or what an all-gather makes of them."""
    loops: tuple[int, ...]
    """How often each enclosing loop runs, from the outermost on. Empty outside of loops."""
    text: str = ""
    """Its line of the program."""

    @property
    def total(self) -> int:
        """Bytes in one call of the program."""
        return self.bytes * math.prod(self.loops)


def read_collectives(text: str | None) -> list[Collective]:
    """The collectives of optimised HLO, as `compiled.as_text()` prints it, in the order of the text.

    Raises ValueError if there is no text, or if a collective is inside a loop whose number of passes the compiler does
    not know.
    """
    computations, entry = parse(text)
    collectives: list[Collective] = []

    def visit(name: str, loops: tuple[int | None, ...]) -> None:
        for instruction in computations[name].instructions.values():
            if instruction.opcode.removesuffix("-start") in get_args(Kind):
                collectives.append(_collective(instruction, computations[name], loops))
            inner = (*loops, instruction.trip_count) if instruction.opcode == "while" else loops
            for _, target in calls(instruction):
                if target in computations:
                    visit(target, inner)

    visit(entry, ())
    return collectives


def _collective(instruction: Instruction, computation: Computation, loops: tuple[int | None, ...]) -> Collective:
    known = tuple(n for n in loops if n is not None)
    if len(known) != len(loops):
        raise ValueError(f"a collective is inside a loop of unknown length: {instruction.text[:200]}")
    kind = instruction.opcode.removesuffix("-start")
    operands = tuple(a for name in instruction.operands for a in computation.instructions[name].arrays)
    size = sum(array_bytes(*array) for array in operands)
    if kind == "all-gather":
        given = size if instruction.opcode.endswith("-start") else 0
        size = sum(array_bytes(*array) for array in instruction.arrays) - given
    return Collective(kind, instruction.op_name, operands, size, known, instruction.text)  # pyright: ignore


def bytes_by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes on a device in one call of the program, by kind."""
    sizes: Counter[str] = Counter()
    for collective in collectives:
        sizes[collective.kind] += collective.total
    return dict(sizes)

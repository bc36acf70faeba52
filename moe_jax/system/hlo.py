"""The matrix products and buffers of a compiled program, read from its optimised HLO.

A formula gives the expected cost of a layer. The optimised HLO gives the real cost, after the compiler's changes.
`read_program` follows the calls from the entry computation. It counts a fusion, a call and each branch of a conditional
once, and the body of a loop as often as the loop runs. So a product in a loop of 12 passes counts 12 times, and a
product that the compiler removed does not count.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
_OPCODE = re.compile(r"^(?:\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(([^)]*)\)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:?\s*\{"?n"?:\s*"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SMALL_CALLS = {"to_apply", "called_computations"}  # scalar functions of reduce, sort, scatter: no products


@dataclass(frozen=True)
class Dot:
    """A matrix product of the compiled program."""

    op_name: str
    """The traced operation that it came from: "jit(step)/.../experts/dot_general"."""
    left: tuple[int, ...]
    right: tuple[int, ...]
    out: tuple[int, ...]
    dtype: str
    flops: int
    """Floating-point operations of one execution: 2 x elements of the result x contracted elements."""
    runs: int
    """Executions in one call of the program."""

    @property
    def total(self) -> int:
        return self.flops * self.runs


@dataclass(frozen=True)
class Buffer:
    """The result of an instruction outside of fusions: an array that may take memory."""

    op_name: str
    opcode: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Program:
    """The products and buffers of one compiled program."""

    dots: list[Dot]
    buffers: list[Buffer]

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products in one call of the program."""
        return sum(dot.total for dot in self.dots)

    def flops_of(self, *parts: str) -> int:
        """Operations of the products whose traced name contains one of the `parts`, such as "experts"."""
        wanted = set(parts)
        return sum(dot.total for dot in self.dots if wanted & scopes(dot.op_name))

    def largest(self, count: int) -> list[Buffer]:
        """The results of instructions that compute something, the largest first."""
        passive = {"parameter", "get-tuple-element", "bitcast", "tuple"}
        active = [b for b in self.buffers if b.opcode not in passive]
        return sorted(active, key=lambda b: b.elements, reverse=True)[:count]


def scopes(op_name: str) -> set[str]:
    """The components of a traced name: "jit(step)/transpose(jvp(experts))/dot" has step, experts, dot and others."""
    return set(re.split(r"[/()]+", op_name))


@dataclass
class _Instruction:
    opcode: str
    arrays: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    text: str


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.instructions[name].arrays[0][1]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], _Computation())
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.match(found[2])
            if opcode is None:
                continue
            head = found[2][: opcode.start(1)]
            arrays = [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(head)]
            operands = re.findall(r"%([\w.\-]+)", opcode[2])
            current.instructions[found[1]] = _Instruction(opcode[1], arrays or [("", ())], operands, found[2])
    return computations, entry


def _calls(instruction: _Instruction) -> Iterator[tuple[str, int]]:
    """The computations that an instruction calls, each with the number of its executions."""
    trips = 1
    if instruction.opcode == "while":
        known = _TRIPS.search(instruction.text)
        if known is None:
            raise ValueError(f"the number of passes of a loop is unknown: {instruction.text[:200]}")
        trips = int(known[1])
    found = _CALLED.findall(instruction.text)
    for kind, names in _CALLED_MANY.findall(instruction.text):
        found += [(kind, name.strip().lstrip("%")) for name in names.split(",")]
    for kind, name in found:
        if kind in _SMALL_CALLS and instruction.opcode not in ("call", "async-start", "custom-call"):
            continue
        yield name, trips


def _dimensions(text: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _dot(instruction: _Instruction, computation: _Computation, runs: int) -> Dot:
    left, right = (computation.shape(name) for name in instruction.operands[:2])
    dtype, out = instruction.arrays[0]
    contracted = math.prod(left[i] for i in _dimensions(instruction.text, "lhs_contracting_dims"))
    name = _OP_NAME.search(instruction.text)
    return Dot(name[1] if name else "", left, right, out, dtype, 2 * math.prod(out) * contracted, runs)


def read_program(text: str | None) -> Program:
    """The products and buffers of optimised HLO, as `compiled.as_text()` prints it.

    Raises ValueError if there is no text, or if the program has a loop whose number of passes the compiler does not
    know.
    """
    if text is None:
        raise ValueError("this backend does not show its optimised program")
    computations, entry = _parse(text)
    runs: Counter[str] = Counter()
    fused: set[str] = set()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name].instructions.values():
            for called, trips in _calls(instruction):
                if called in computations:
                    if instruction.opcode == "fusion":
                        fused.add(called)
                    visit(called, times * trips)

    visit(entry, 1)
    dots, buffers = [], []
    for name, times in runs.items():
        for instruction in computations[name].instructions.values():
            if instruction.opcode == "dot":
                dots.append(_dot(instruction, computations[name], times))
            if name not in fused:
                source = _OP_NAME.search(instruction.text)
                buffers += [
                    Buffer(source[1] if source else "", instruction.opcode, shape, dtype)
                    for dtype, shape in instruction.arrays
                ]
    return Program(dots, buffers)

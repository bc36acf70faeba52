"""The matrix products and buffers of a compiled program, read from its optimised HLO.

A formula gives the expected cost of a layer. The optimised HLO gives the real cost, after the compiler's changes.
`read_program` follows the calls from the entry computation. It counts a fusion, a call and each branch of a conditional
once, and the body of a loop as often as the loop runs. So a product in a loop of 12 passes counts 12 times, and a
product that the compiler removed does not count.

A product is the HLO instruction `dot`, or a call of a GPU library (`__cublas$gemm`, `__cublas$lt$matmul`). An
instruction that may hold products in another form is an error: its operations would be missing from the count.
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
_LIBRARY_PRODUCT = re.compile(r"__cublas\$(gemm|lt\$matmul\S*)|__onednn\$matmul\S*")
_UNCOUNTED = re.compile(r"cublas|cudnn|onednn|gemm|matmul|ragged|conv", re.IGNORECASE)
"""Names of custom calls that may multiply matrices."""
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SMALL_CALLS = {"to_apply", "called_computations"}  # scalar functions of reduce, sort, scatter: no products


@dataclass(frozen=True)
class Dot:
    """A matrix product of the compiled program: an instruction `dot`, or a call of a library."""

    op_name: str
    """The traced operation that it came from: "jit(step)/.../experts/dot_general"."""
    left: tuple[int, ...]
    right: tuple[int, ...]
    out: tuple[int, ...]
    dtype: str
    operand_dtype: str
    precision: str
    """The precision that its operands ask for: "highest", or "default". At the default precision a GPU of compute
    capability 8.0 or more rounds float32 operands to TF32."""
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
class Instruction:
    """One line of HLO."""

    opcode: str
    arrays: list[tuple[str, tuple[int, ...]]]
    """Dtype and shape of each array of the result."""
    operands: list[str]
    text: str


@dataclass
class Computation:
    """The instructions of one computation, by name."""

    instructions: dict[str, Instruction] = field(default_factory=dict)


def parse(text: str | None) -> tuple[dict[str, Computation], str]:
    """The computations of optimised HLO by name, and the name of the entry. Raises ValueError if there is no text."""
    if text is None:
        raise ValueError("this backend does not show its optimised program")
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], Computation())
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
            current.instructions[found[1]] = Instruction(opcode[1], arrays or [("", ())], operands, found[2])
    return computations, entry


def trips(loop: Instruction) -> int | None:
    """How often a loop runs its body. None if the compiler does not know."""
    known = _TRIPS.search(loop.text)
    return int(known[1]) if known else None


def called(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction calls, without the scalar functions of a reduction."""
    found = _CALLED.findall(instruction.text)
    for kind, names in _CALLED_MANY.findall(instruction.text):
        found += [(kind, name.strip().lstrip("%")) for name in names.split(",")]
    for kind, name in found:
        if kind in _SMALL_CALLS and instruction.opcode not in ("call", "async-start", "custom-call"):
            continue
        yield name


def _calls(instruction: Instruction) -> Iterator[tuple[str, int]]:
    """The computations that an instruction calls, each with the number of its executions."""
    times = 1
    if instruction.opcode == "while":
        known = trips(instruction)
        if known is None:
            raise ValueError(f"the number of passes of a loop is unknown: {instruction.text[:200]}")
        times = known
    for name in called(instruction):
        yield name, times


def _is_product(instruction: Instruction) -> bool:
    """Whether an instruction is one matrix product. Raises ValueError if it may have products that nobody counts."""
    if instruction.opcode == "dot":
        return True
    target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    name = target[1] if instruction.opcode == "custom-call" and target else ""
    if _LIBRARY_PRODUCT.fullmatch(name):
        return True
    if instruction.opcode in ("convolution", "ragged-dot") or _UNCOUNTED.search(name):
        raise ValueError(f"operations of this instruction cannot be counted: {instruction.text[:200]}")
    return False


def _dot(instruction: Instruction, computation: Computation, runs: int) -> Dot:
    (operand_dtype, left), (_, right) = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    dtype, out = instruction.arrays[0]
    text = instruction.text
    # `lhs_contracting_dims={2}` of a dot, `"lhs_contracting_dimensions":["2"]` of a library's call.
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', text)
    axes = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    asked = re.search(r'operand_precision"?[=:][{\[]"?(\w+)', text)
    precision = asked[1].lower() if asked else "default"
    name = _OP_NAME.search(text)
    flops = 2 * math.prod(out) * math.prod(left[i] for i in axes)
    return Dot(name[1] if name else "", left, right, out, dtype, operand_dtype, precision, flops, runs)


def read_program(text: str | None) -> Program:
    """The products and buffers of optimised HLO, as `compiled.as_text()` prints it.

    Raises ValueError if there is no text, if the program has a loop whose number of passes the compiler does not know,
    or if it has products that cannot be counted.
    """
    computations, entry = parse(text)
    runs: Counter[str] = Counter()
    fused: set[str] = set()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name].instructions.values():
            for target, passes in _calls(instruction):
                if target in computations:
                    if instruction.opcode == "fusion":
                        fused.add(target)
                    visit(target, times * passes)

    visit(entry, 1)
    dots, buffers = [], []
    for name, times in runs.items():
        for instruction in computations[name].instructions.values():
            if _is_product(instruction):
                dots.append(_dot(instruction, computations[name], times))
            if name not in fused:
                source = _OP_NAME.search(instruction.text)
                buffers += [
                    Buffer(source[1] if source else "", instruction.opcode, shape, dtype)
                    for dtype, shape in instruction.arrays
                ]
    return Program(dots, buffers)

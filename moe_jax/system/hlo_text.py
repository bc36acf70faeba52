"""The text of optimised HLO, as `compiled.as_text()` prints it: computations, and the instructions of each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
_OPCODE = re.compile(r"^(?:\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(([^)]*)\)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:?\s*\{"?n"?:\s*"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SMALL_CALLS = {"to_apply", "called_computations"}  # scalar functions of reduce, sort, scatter: no products


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    opcode: str
    arrays: list[tuple[str, tuple[int, ...]]]
    """Dtype and shape of each array of the result. A result that is no array has the one entry ("", ())."""
    operands: list[str]
    """Names of instructions of the same computation."""
    text: str

    @property
    def op_name(self) -> str:
        """The traced operation that it came from, such as "jit(step)/.../experts/dot_general". "" if it has none."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def custom_call(self) -> str:
        """The name of the function that a `custom-call` calls, else ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if self.opcode == "custom-call" and found else ""


@dataclass(frozen=True)
class Computation:
    """The instructions of a computation by name, in order."""

    root: str = ""
    """The name of the instruction whose result the computation returns."""
    instructions: dict[str, Instruction] = field(default_factory=dict)


def parse(text: str | None) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry computation. Raises ValueError if there is no text."""
    if text is None:
        raise ValueError("this backend does not show its optimised program")
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, root, instructions = header[2], "", {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(root, instructions)
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            root = found[2] if found[1] else root
            if instruction := _instruction(found[3]):
                instructions[found[2]] = instruction
    return computations, entry


def _instruction(text: str) -> Instruction | None:
    opcode = _OPCODE.match(text)
    if opcode is None:
        return None
    arrays = [
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(text[: opcode.start(1)])
    ]
    return Instruction(opcode[1], arrays or [("", ())], re.findall(r"%([\w.\-]+)", opcode[2]), text)


def trips(loop: Instruction) -> int | None:
    """How often a loop runs its body. None if the compiler does not know."""
    known = _TRIPS.search(loop.text)
    return int(known[1]) if known else None


def called(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """The computations that an instruction calls: in which role ("body", "calls" and others), and the name. Scalar
    functions, such as the sum of a `reduce`, are left out."""
    found = _CALLED.findall(instruction.text)
    for role, names in _CALLED_MANY.findall(instruction.text):
        found += [(role, name.strip().lstrip("%")) for name in names.split(",")]
    for role, name in found:
        if role in _SMALL_CALLS and instruction.opcode not in ("call", "async-start", "custom-call"):
            continue
        yield role, name


def calls(instruction: Instruction) -> Iterator[tuple[str, str, int]]:
    """The same as `called`, each with the number of executions.

    Raises ValueError for a loop whose number of passes the compiler does not know.
    """
    passes = trips(instruction) if instruction.opcode == "while" else 1
    if passes is None:
        raise ValueError(f"the number of passes of a loop is unknown: {instruction.text[:200]}")
    for role, name in called(instruction):
        yield role, name, passes

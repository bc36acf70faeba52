"""The text of optimised HLO, as `compiled.as_text()` prints it: computations, and the instructions of each.

On a CPU or a GPU, XLA writes how often a loop runs (`known_trip_count`). On a TPU it does not. There the count is found
in the loop itself: it starts at a constant, adds 1 in each pass, and is compared with another constant.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
_LAYOUT = re.compile(_ARRAY.pattern + r"(\{[^}]*\})?")
# A TPU's tuples have brackets within brackets: ((f32[8]{0:T(8)}), f32[8]{0:T(8)S(1)}, s32[]{:S(2)}).
_OPCODE = re.compile(r"^(?:\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\S+) ([\w\-]+)\(([^)]*)\)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:?\s*\{"?n"?:\s*"?(\d+)')
_KERNEL_CODE = re.compile(r'\bir = "[^"]*"')
"""The code of a kernel that the program brings along. It may look like any other attribute."""
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
    trip_count: int | None = None
    """How often a loop runs its body. None if it is not known, and for anything else than a loop."""

    @property
    def in_memory(self) -> list[bool]:
        """For each array of the result, whether it lies in the device's main memory. A TPU's layouts name other ones:
        S(1) is on the chip."""
        opcode = _OPCODE.match(self.text)
        layouts = _LAYOUT.findall(self.text[: opcode.start(1)]) if opcode else []
        return ["S(" not in layout for *_, layout in layouts] or [True]

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
    for computation in computations.values():
        for key, loop in computation.instructions.items():
            if loop.opcode == "while":
                computation.instructions[key] = replace(loop, trip_count=_trips(loop, computation, computations))
    return computations, entry


def _instruction(text: str) -> Instruction | None:
    opcode = _OPCODE.match(text)
    if opcode is None:
        return None
    text = _KERNEL_CODE.sub("", text) if opcode[1] == "custom-call" else text
    arrays = [_array(kind, dims) for kind, dims in _ARRAY.findall(text[: opcode.start(1)])]
    return Instruction(opcode[1], arrays or [("", ())], re.findall(r"%([\w.\-]+)", opcode[2]), text)


def _array(kind: str, dims: str) -> tuple[str, tuple[int, ...]]:
    return kind, tuple(int(n) for n in dims.split(",") if n)


def _trips(loop: Instruction, outside: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: as the compiler says, else as its counter does."""
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    parts = dict(called(loop))
    condition, body = (computations.get(parts.get(role, "")) for role in ("condition", "body"))
    start = outside.instructions.get(loop.operands[0]) if loop.operands else None
    if condition is None or body is None or start is None or start.opcode != "tuple":
        return None
    test = condition.instructions.get(condition.root)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    place, end = _counter(condition, test.operands[0]), _constant(condition, test.operands[1])
    if place is None or end is None or place >= len(start.operands):
        return None
    first, following = _constant(outside, start.operands[place]), body.instructions[body.root]
    step = body.instructions.get(following.operands[place]) if following.opcode == "tuple" else None
    if first is None or step is None or step.opcode != "add":
        return None
    by_one = _counter(body, step.operands[0]) == place and _constant(body, step.operands[1]) == 1
    return max(end - first, 0) if by_one else None


def _through_copies(computation: Computation, name: str) -> Instruction | None:
    found = computation.instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = computation.instructions.get(found.operands[0])
    return found


def _counter(computation: Computation, name: str) -> int | None:
    """The place in the loop's state that an instruction reads, or None."""
    found = _through_copies(computation, name)
    index = re.search(r"index=(\d+)", found.text) if found and found.opcode == "get-tuple-element" else None
    return int(index[1]) if index else None


def _constant(computation: Computation, name: str) -> int | None:
    found = _through_copies(computation, name)
    value = re.search(r"constant\((-?\d+)\)", found.text) if found and found.opcode == "constant" else None
    return int(value[1]) if value else None


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
    passes = instruction.trip_count if instruction.opcode == "while" else 1
    if passes is None:
        raise ValueError(f"the number of passes of a loop is unknown: {instruction.text[:200]}")
    for role, name in called(instruction):
        yield role, name, passes

"""The kernels that a compiled GPU program launches, and the memory that each reads and writes, from optimised HLO.

A kernel is an instruction outside of fusions that computes or copies something: a fusion, a library's call, a copy.
The body of a loop counts as often as the loop runs. The condition of a loop does not count: the number of passes is
known, so the host counts them.

The traffic of a kernel is what it must read and write at least, each operand once:

    an operand of which a fusion takes slices or rows only    the slices or rows
    an operand that a fusion updates in place                 nothing
    the result of an update in place                          the part that is written
    the result of a scatter                                   the updates, read and written
    any other operand or result                               all of it

On a TPU, arrays in the memory of the chip itself take no traffic. A copy into it or out of it counts once.

So it is a lower limit. Caches may save some of it, a kernel that reads an operand twice takes more, and an update that
XLA cannot do in place copies the whole array.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_jax.certify.collectives import array_bytes
from moe_jax.system.hlo import Computation, Dot, Instruction, calls, parse, passes, scopes
from predicted.tpu_programs import in_main_memory, product

_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"),
    *("partition-id", "replica-id", "while", "conditional", "call", "async-start", "async-update"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice", "scatter"}
_WORKSPACE = "s8"
"""The dtype of the scratch memory that a library's product has as its second result."""


@dataclass(frozen=True)
class Kernel:
    """One launch of a program, repeated `runs` times. Bytes and products are those of one launch."""

    op_name: str
    """The traced operation that it came from: "jit(step)/.../experts/dot_general". If it has none, that of the loop."""
    opcode: str
    inner: frozenset[str]
    """The opcodes that it contains. Those of a fusion, else its own."""
    bytes_read: int
    bytes_written: int
    dots: tuple[Dot, ...]
    """Its matrix products. Their `runs` are those of the kernel."""
    runs: int
    beside: bool = False
    """Started now and waited for later. Other kernels run in between."""

    @property
    def traffic(self) -> int:
        """Bytes that all its launches read and write."""
        return (self.bytes_read + self.bytes_written) * self.runs

    @property
    def scopes(self) -> set[str]:
        return scopes(self.op_name)


def read_kernels(text: str | None) -> list[Kernel]:
    """The kernels of a program, as `compiled.as_text()` prints it for a GPU.

    Raises ValueError if there is no text, if the program has a loop whose number of passes the compiler does not know,
    or if it has products that cannot be counted.
    """
    computations, entry = parse(text)
    if entry not in computations:
        raise ValueError("the text has no entry computation")
    kernels: list[Kernel] = []

    def visit(name: str, times: int, caller: str) -> None:
        for instruction in computations[name].instructions.values():
            if instruction.opcode not in _NO_KERNEL and not instruction.opcode.endswith("-done"):
                kernel = _kernel(instruction, computations[name], computations, times)
                kernels.append(kernel if kernel.op_name else replace(kernel, op_name=caller))
            elif instruction.opcode in ("while", "conditional", "call", "async-start"):
                for role, called in calls(instruction):
                    if role != "condition" and called in computations:
                        visit(called, times * passes(instruction), instruction.op_name)

    visit(entry, 1, "")
    return kernels


def _kernel(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation], runs: int
) -> Kernel:
    opcode = instruction.opcode.removesuffix("-start")  # launched now, waited for later (`fusion-done`)
    inner = next((computations[c] for _, c in calls(instruction) if c in computations), None)
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "fusion" and inner is not None:
        parts = list(_with_nested(inner, computations))
        used = _used_entries(inner, computations)
        read = sum(_size(x) * used[_parameter(inner, i)] // max(_elements(x), 1) for i, x in enumerate(operands))
        written = _bytes_written(inner, inner.root)
        found = [product(part, owner, runs) for owner, part in parts]
        op_name = instruction.op_name or next((part.op_name for _, part in parts if part.op_name), "")
        opcodes = frozenset(part.opcode for _, part in parts)
    else:
        alone = Computation("root", {**computation.instructions, "root": instruction})
        read = sum(_size(x) for x in operands[1 if opcode in _UPDATES else 0 :])
        if opcode in _SLICES:
            read = _size(instruction) + sum(_size(x) for x in operands[1:])
        found = [product(instruction, computation, runs)]
        written = _size_of_product(instruction) if found[0] else _bytes_written(alone, "root")
        if opcode != instruction.opcode:  # its result also names its operands
            written = read
        if instruction.opcode in ("copy-start", "slice-start"):
            read, written = _moved(instruction)
        op_name, opcodes = instruction.op_name, frozenset({opcode})
    dots = tuple(dot for dot in found if dot is not None)
    return Kernel(op_name, opcode, opcodes, read, written, dots, runs, beside=opcode != instruction.opcode)


def _moved(start: Instruction) -> tuple[int, int]:
    """Bytes that a `copy-start` or a `slice-start` reads from the main memory, and writes to it."""
    size = array_bytes(*start.arrays[1])
    first, second = in_main_memory(start)[:2]
    source, target = (first, second) if start.opcode == "slice-start" else (second, first)
    return size * source, size * target


def _with_nested(
    computation: Computation, computations: dict[str, Computation]
) -> Iterator[tuple[Computation, Instruction]]:
    """The instructions of a fusion, and of the fusions within it, each with its computation."""
    for instruction in computation.instructions.values():
        yield computation, instruction
        if instruction.opcode in ("fusion", "call"):
            for _, called in calls(instruction):
                yield from _with_nested(computations[called], computations)


def _size(instruction: Instruction) -> int:
    """Bytes of the result in the main memory."""
    there = zip(instruction.arrays, in_main_memory(instruction), strict=True)
    return sum(array_bytes(*array) for array, main in there if main)


def _size_of_product(instruction: Instruction) -> int:
    """Bytes of the result of a product, without a library's workspace."""
    there = zip(instruction.arrays, in_main_memory(instruction), strict=True)
    return sum(
        array_bytes(*array) for i, (array, main) in enumerate(there) if main and (i == 0 or array[0] != _WORKSPACE)
    )


def _elements(instruction: Instruction) -> int:
    return sum(math.prod(shape) for _, shape in instruction.arrays)


def _parameter(fused: Computation, index: int) -> str:
    return next(n for n, x in fused.instructions.items() if x.opcode == "parameter" and f"parameter({index})" in x.text)


def _used_entries(fused: Computation, computations: dict[str, Computation]) -> dict[str, int]:
    """For each instruction of a fusion, how many entries of its result the fusion uses, at most all of them."""
    used = dict.fromkeys(fused.instructions, 0)
    used[fused.root] = _elements(fused.instructions[fused.root])
    for name, user in reversed(fused.instructions.items()):
        for place, operand in enumerate(user.operands):
            whole = _elements(fused.instructions[operand])
            need = _used_of_operand(fused, name, place, whole, used[name], computations)
            used[operand] = min(used[operand] + need, whole)
    return used


def _used_of_operand(
    fused: Computation, name: str, place: int, whole: int, used: int, computations: dict[str, Computation]
) -> int:
    """How many entries of its operand at `place` an instruction uses, of whose result `used` entries are used."""
    user = fused.instructions[name]
    if user.opcode in _SLICES:
        return used if place == 0 else whole
    if user.opcode in _UPDATES and place == 0:
        return 0 if _is_result(fused, name) else whole
    if user.opcode == "fusion":
        inner = computations[next(called for _, called in calls(user))]
        return _used_entries(inner, computations)[_parameter(inner, place)]
    # Entry for entry, or in another order: it needs of its operand as much as is used of its own result.
    return used if _elements(user) == whole and user.opcode != "tuple" else whole


def _is_result(fused: Computation, name: str) -> bool:
    """Whether an instruction's result is a result of the fusion, perhaps as another shape."""
    root = fused.instructions[fused.root]
    results = root.operands if root.opcode == "tuple" else [fused.root]
    return any(_before_bitcasts(fused, result) == name for result in results)


def _before_bitcasts(fused: Computation, name: str) -> str:
    while fused.instructions[name].opcode == "bitcast":
        name = fused.instructions[name].operands[0]
    return name


def _bytes_written(fused: Computation, name: str) -> int:
    """Bytes that the result of an instruction writes. A scatter also reads what it adds to."""
    result = fused.instructions[_before_bitcasts(fused, name)]
    if result.opcode == "tuple":
        return sum(_bytes_written(fused, part) for part in result.operands)
    if result.opcode == "dynamic-update-slice":
        return _size(fused.instructions[result.operands[1]])
    if result.opcode == "scatter":
        updates = result.operands[1 + len(result.operands) // 2 :]
        return 2 * sum(_size(fused.instructions[update]) for update in updates)
    return _size(fused.instructions[name])

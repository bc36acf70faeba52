"""What only the programs of a TPU have: products written as convolutions, and loops that count their passes themselves.

A product of a TPU's program is an instruction `convolution`. On a CPU or a GPU, XLA writes how often a loop runs
(`known_trip_count`). On a TPU the count is in the loop itself: it starts at a constant, adds 1 in each pass, and is
compared with another constant.
"""

import re

from moe_jax.system import hlo
from moe_jax.system.hlo import Computation, Dot, Instruction, calls, parse

_LAYOUT = re.compile(r"\b(?:pred|[suf]\d+|bf16|f8\w+|c\d+)\[[\d,]*\](\{[^}]*\})?")


def in_main_memory(instruction: Instruction) -> list[bool]:
    """For each array of the result, whether it lies in the device's main memory. A TPU's layouts name other ones: S(1)
    is on the chip."""
    result = instruction.text[: instruction.text.index(f" {instruction.opcode}(")]
    return ["S(" not in layout for layout in _LAYOUT.findall(result)] or [True]


def with_trip_counts(text: str) -> str:
    """The program with `known_trip_count` at each loop whose counter says how often it runs."""
    computations, _ = parse(text)
    for computation in computations.values():
        for loop in computation.instructions.values():
            if loop.opcode == "while" and loop.trip_count is None:
                count = _passes(loop, computation, computations)
                if count is not None:
                    text = text.replace(
                        loop.text, f'{loop.text}, backend_config={{"known_trip_count":{{"n":"{count}"}}}}'
                    )
    return text


def _passes(loop: Instruction, outside: Computation, computations: dict[str, Computation]) -> int | None:
    parts = dict(calls(loop))
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


def product(instruction: Instruction, computation: Computation, runs: int) -> Dot | None:
    """The matrix product that an instruction is (`hlo.product`), also as a convolution."""
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation, runs)
    return hlo.product(instruction, computation, runs)


def _convolution(instruction: Instruction, computation: Computation, runs: int) -> Dot:
    """The multiplications of a convolution, without those of padding and of the zeros that dilation inserts.

    A TPU's compiler writes a batched product as a convolution over the batch, dilated so that each entry of the batch
    meets its own matrix only. So the zeros are most of the window, and they do not count.
    """
    (operand_dtype, left), (_, right) = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    dtype, out = instruction.arrays[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if labels is None:
        raise ValueError(f"a convolution names no dimensions: {instruction.text[:200]}")
    of_left, of_right, of_out = labels.groups()
    sizes = dict(zip(of_out, out, strict=True))
    taps = 1
    for number, label in enumerate(sorted(label for label in of_out if label.isdigit())):
        taps *= _taps(left[of_left.index(label)], right[of_right.index(label)], sizes[label], instruction.text, number)
    pairs = sizes["b"] * sizes["f"] * right[of_right.index("i")] * taps
    asked = re.search(r"operand_precision=\{(\w+)", instruction.text)
    flops = 0 if dtype[0] in "su" else 2 * pairs
    precision = asked[1] if asked else "default"
    return Dot(instruction.op_name, left, right, out, dtype, operand_dtype, precision, flops, runs)


def _taps(size: int, window: int, out: int, text: str, number: int) -> int:
    """Pairs of an entry of the result and an entry of the window that meet an entry of the operand, in one dimension.

    `size` are the entries of the operand, and `number` is the place of the dimension in the attribute `window`.
    """
    stride, dilation, spread = (
        int(_window(text, name, number, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(_window(text, "pad", number, "0_0").split("_")[0])
    last = (size - 1) * dilation
    found = 0
    for tap in range(window):
        places = range(tap * spread - before, tap * spread - before + out * stride, stride)
        found += sum(0 <= place <= last and place % dilation == 0 for place in places)
    return found


def _window(text: str, name: str, number: int, default: str) -> str:
    """One number of the attribute `window`, such as the 3 in `window={size=4x2 stride=3x1}`."""
    found = re.search(rf"window=\{{[^}}]*\b{name}=([\w\-]+)", text)
    return re.split("x", found[1])[number] if found else default

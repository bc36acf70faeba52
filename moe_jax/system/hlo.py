"""The matrix products and buffers of a compiled program, read from its optimised HLO.

A formula gives the expected cost of a layer. The optimised HLO gives the real cost, after the compiler's changes.
`read_program` follows the calls from the entry computation. It counts a fusion, a call and each branch of a conditional
once, and the body of a loop as often as the loop runs. So a product in a loop of 12 passes counts 12 times, and a
product that the compiler removed does not count.

A product is the HLO instruction `dot`, a call of a GPU library (`__cublas$gemm`, `__cublas$lt$matmul`), a program of
this project's own for a GPU (`model/kernels/grouped_kernel.py`), or a `convolution`, as which a TPU's compiler writes
every product. cuDNN's attention (`__cudnn$fmhaSoftmax`) is one call with several products, and is counted as one. An
instruction that may hold products in another form is an error: its operations would be missing from the count.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

from moe_jax.system.hlo_text import Computation, Instruction, calls, parse

_LIBRARY_PRODUCT = re.compile(r"__cublas\$(gemm|lt\$matmul\S*)|__onednn\$matmul\S*")
_LIBRARY_ATTENTION = re.compile(r"__cudnn\$fmhaSoftmax(Backward)?")
_OWN_PROGRAM = "__gpu$xla.gpu.triton"
_GROUPED_ROWS, _GROUPED_WEIGHTS = "grouped_rows", "grouped_weights"
"""Names of the programs of `model/kernels/grouped_kernel.py`."""
_UNCOUNTED = re.compile(r"cublas|cudnn|onednn|gemm|matmul|ragged|conv|triton", re.IGNORECASE)
"""Names of custom calls that may multiply matrices."""


@dataclass(frozen=True)
class Dot:
    """A matrix product of the compiled program: an instruction `dot` or `convolution`, or a call of a library."""

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
    """Floating-point operations of one execution: 2 x elements of the result x contracted elements. 0 for
    integers."""
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


def product(instruction: Instruction, computation: Computation, runs: int) -> Dot | None:
    """The matrix product that an instruction of `computation` is, or None if it is something else.

    Raises ValueError if it may have products that nobody counts.
    """
    name = instruction.custom_call
    if instruction.opcode == "dot" or _LIBRARY_PRODUCT.fullmatch(name):
        return _dot(instruction, computation, runs)
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation, runs)
    if _LIBRARY_ATTENTION.fullmatch(name):
        return _attention(instruction, computation, runs)
    if name == _OWN_PROGRAM and (grouped := _grouped(instruction, computation, runs)):
        return grouped
    if instruction.opcode == "ragged-dot" or _UNCOUNTED.search(name):
        raise ValueError(f"operations of this instruction cannot be counted: {instruction.text[:200]}")
    return None


def _dot(instruction: Instruction, computation: Computation, runs: int) -> Dot:
    (operand_dtype, left), (_, right) = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    dtype, out = instruction.arrays[0]
    text = instruction.text
    # `lhs_contracting_dims={2}` of a dot, `"lhs_contracting_dimensions":["2"]` of a library's call.
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', text)
    axes = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    asked = re.search(r'operand_precision"?[=:][{\[]"?(\w+)', text)
    precision = asked[1].lower() if asked else "default"
    flops = 2 * math.prod(out) * math.prod(left[i] for i in axes)
    return Dot(instruction.op_name, left, right, out, dtype, operand_dtype, precision, flops, runs)


def _grouped(instruction: Instruction, computation: Computation, runs: int) -> Dot | None:
    """The product of a program of `grouped_kernel.py`, or None if it is another program.

    The last two operands are rows [G, R, C] and matrices [E, ...], or two arrays of rows, [G, R, D] and [G, R, F].
    Every row is multiplied, those of empty groups too.
    """
    kind = re.search(r'\bname = "(\w+)"', instruction.text)
    if kind is None or kind[1] not in (_GROUPED_ROWS, _GROUPED_WEIGHTS):
        return None
    (operand_dtype, left), (_, right) = (computation.instructions[name].arrays[0] for name in instruction.operands[-2:])
    dtype, out = instruction.arrays[0]
    flops = 2 * math.prod(left) * (out[2] if kind[1] == _GROUPED_ROWS else right[2])
    precision = "highest" if operand_dtype == "f32" else "default"
    return Dot(instruction.op_name, left, right, out, dtype, operand_dtype, precision, flops, runs)


def _attention(instruction: Instruction, computation: Computation, runs: int) -> Dot:
    """All products of a call of cuDNN's attention, whose first operands are queries and keys, [B, T, H, A].

    There are two in the forward pass, q k^T and P v. The backward pass has five (Dao et al. 2022, "FlashAttention",
    algorithm 4): q k^T again, P^T d_o, d_o v^T, d_S k and d_S^T q. Each has 2 A operations for a score. With a causal
    mask the scores of later positions are not needed, and do not count.
    """
    (dtype, query), (_, key) = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    batch, positions, heads, width = query
    asked = re.search(r'"mask_type": ?"(\w+)"', instruction.text)
    if asked is None or asked[1] not in ("CAUSAL", "NO_MASK") or key[1] != positions:
        raise ValueError(f"attention with this mask cannot be counted: {instruction.text[:200]}")
    scores = positions * (positions + 1) // 2 if asked[1] == "CAUSAL" else positions**2
    products = 5 if instruction.custom_call.endswith("Backward") else 2
    flops = products * 2 * batch * heads * scores * width
    return Dot(instruction.op_name, query, key, instruction.arrays[0][1], dtype, dtype, "default", flops, runs)


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
            for _, called, trips in calls(instruction):
                if called in computations:
                    if instruction.opcode == "fusion":
                        fused.add(called)
                    visit(called, times * trips)

    visit(entry, 1)
    dots, buffers = [], []
    for name, times in runs.items():
        for instruction in computations[name].instructions.values():
            if dot := product(instruction, computations[name], times):
                dots.append(dot)
            if name not in fused:
                buffers += [
                    Buffer(instruction.op_name, instruction.opcode, shape, dtype) for dtype, shape in instruction.arrays
                ]
    return Program(dots, buffers)

"""The matrix products and buffers of a compiled program, read from its optimised HLO.

A formula gives the expected cost of a layer. The optimised HLO gives the real cost, after the compiler's changes.
`read_program` follows the calls from the entry computation. It counts a fusion, a call and each branch of a conditional
once, and the body of a loop as often as the loop runs. So a product in a loop of 12 passes counts 12 times, and a
product that the compiler removed does not count.

A product is the HLO instruction `dot`, a call of a GPU library (`__cublas$gemm`, `__cublas$lt$matmul`), or a
`convolution`, as which a TPU's compiler writes every product. cuDNN's attention (`__cudnn$fmhaSoftmax`) is one call
with several products, and is counted as one. An instruction that may hold products in another form is an error: its
operations would be missing from the count.

On a CPU or a GPU, XLA writes how often a loop runs (`known_trip_count`). On a TPU it does not. There the count is in
the loop itself: it starts at a constant, adds 1 in each pass, and is compared with another constant.
"""

import math
import re
from collections import Counter
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
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SMALL_CALLS = {"to_apply", "called_computations"}  # scalar functions of reduce, sort, scatter: no products
_LIBRARY_PRODUCT = re.compile(r"__cublas\$(gemm|lt\$matmul\S*)|__onednn\$matmul\S*")
_LIBRARY_ATTENTION = re.compile(r"__cudnn\$fmhaSoftmax(Backward)?")
_UNCOUNTED = re.compile(r"cublas|cudnn|onednn|gemm|matmul|ragged|conv|triton", re.IGNORECASE)
"""Names of custom calls that may multiply matrices."""


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
    result = _ARRAY.findall(text[: opcode.start(1)])
    arrays = [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in result]
    return Instruction(opcode[1], arrays or [("", ())], re.findall(r"%([\w.\-]+)", opcode[2]), text)


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
    targets = _CALLED.findall(instruction.text)
    for role, names in _CALLED_MANY.findall(instruction.text):
        targets += [(role, name.strip().lstrip("%")) for name in names.split(",")]
    opcode_calls = instruction.opcode in ("call", "async-start", "custom-call")
    return ((role, name) for role, name in targets if opcode_calls or role not in _SMALL_CALLS)


def calls(instruction: Instruction) -> Iterator[tuple[str, str, int]]:
    """The same as `called`, each with the number of executions.

    Raises ValueError for a loop whose number of passes the compiler does not know.
    """
    passes = instruction.trip_count if instruction.opcode == "while" else 1
    if passes is None:
        raise ValueError(f"the number of passes of a loop is unknown: {instruction.text[:200]}")
    for role, name in called(instruction):
        yield role, name, passes


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

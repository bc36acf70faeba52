"""The matrix products of a compiled program, read from its optimised HLO.

A formula gives the expected cost of a layer. The optimised HLO gives the real cost, after the compiler's changes.
`read_program` follows the calls from the entry computation. It counts a fusion, a call and each branch of a conditional
once, and the body of a loop as often as the loop runs. So a product in a loop of 12 passes counts 12 times, and a
product that the compiler removed does not count.

A product is the HLO instruction `dot`, or a call of a GPU library (`__cublas$gemm`, `__cublas$lt$matmul`). cuDNN's
attention (`__cudnn$fmhaSoftmax`) is one call with several products, and is counted as one. An instruction that may hold
products in another form is an error: its operations would be missing from the count.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
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

    @property
    def passes(self) -> int:
        """How often it executes what it calls: a loop its body as often as the compiler says, anything else once.

        Raises ValueError for a loop of unknown length.
        """
        if self.opcode != "while":
            return 1
        known = _TRIPS.search(self.text)
        if known is None:
            raise ValueError(f"the number of passes of a loop is unknown: {self.text[:200]}")
        return int(known[1])

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


type Computation = dict[str, Instruction]
"""The instructions of a computation by name, in order."""


def parse(text: str | None) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry computation. Raises ValueError if there is no text."""
    if text is None:
        raise ValueError("this backend does not show its optimised program")
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: Computation = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, instructions = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = instructions
            name = ""
        elif name and (found := _INSTRUCTION.match(line)) and (instruction := _instruction(found[2])):
            instructions[found[1]] = instruction
    return computations, entry


def _instruction(text: str) -> Instruction | None:
    opcode = _OPCODE.match(text)
    if opcode is None:
        return None
    result = _ARRAY.findall(text[: opcode.start(1)])
    arrays = [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in result]
    return Instruction(opcode[1], arrays or [("", ())], re.findall(r"%([\w.\-]+)", opcode[2]), text)


def calls(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """The computations that an instruction calls: in which role ("body", "calls" and others), and the name. Scalar
    functions, such as the sum of a `reduce`, are left out."""
    targets = _CALLED.findall(instruction.text)
    for role, names in _CALLED_MANY.findall(instruction.text):
        targets += [(role, name.strip().lstrip("%")) for name in names.split(",")]
    opcode_calls = instruction.opcode in ("call", "async-start", "custom-call")
    return ((role, name) for role, name in targets if opcode_calls or role not in _SMALL_CALLS)


@dataclass(frozen=True)
class Dot:
    """A matrix product of the compiled program: an instruction `dot`, or a call of a library."""

    op_name: str
    """The traced operation that it came from: "jit(step)/.../experts/dot_general"."""
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
class Program:
    """The products of one compiled program."""

    dots: list[Dot]

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products in one call of the program."""
        return sum(dot.total for dot in self.dots)

    @property
    def unnamed(self) -> int:
        """Operations without a traced name. The compiler rewrites some products and drops their names, such as those
        with a single head of keys. They may belong to any part."""
        return sum(dot.total for dot in self.dots if not dot.op_name)

    def flops_of(self, *parts: str) -> int:
        """Operations of the products whose traced name contains one of the `parts`, such as "experts"."""
        wanted = set(parts)
        return sum(dot.total for dot in self.dots if wanted & scopes(dot.op_name))


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
    if _LIBRARY_ATTENTION.fullmatch(name):
        return _attention(instruction, computation, runs)
    if instruction.opcode in ("ragged-dot", "convolution") or _UNCOUNTED.search(name):
        raise ValueError(f"operations of this instruction cannot be counted: {instruction.text[:200]}")
    return None


def _dot(instruction: Instruction, computation: Computation, runs: int) -> Dot:
    (operand_dtype, left), (other, _) = (computation[name].arrays[0] for name in instruction.operands[:2])
    operand_dtype += f" x {other}" * (other != operand_dtype)
    _, out = instruction.arrays[0]
    text = instruction.text
    # `lhs_contracting_dims={2}` of a dot, `"lhs_contracting_dimensions":["2"]` of a library's call.
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', text)
    axes = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    asked = re.search(r'operand_precision"?[=:][{\[]"?(\w+)', text)
    precision = asked[1].lower() if asked else "default"
    flops = 2 * math.prod(out) * math.prod(left[i] for i in axes)
    return Dot(instruction.op_name, operand_dtype, precision, flops, runs)


def _attention(instruction: Instruction, computation: Computation, runs: int) -> Dot:
    """All products of a call of cuDNN's attention, whose first operands are queries and keys, [B, T, H, A].

    There are two in the forward pass, q k^T and P v. The backward pass has five (Dao et al. 2022, "FlashAttention",
    algorithm 4): q k^T again, P^T d_o, d_o v^T, d_S k and d_S^T q. Each has 2 A operations for a score. With a causal
    mask the scores of later positions are not needed, and do not count.
    """
    (dtype, query), (_, key) = (computation[name].arrays[0] for name in instruction.operands[:2])
    batch, positions, heads, width = query
    asked = re.search(r'"mask_type": ?"(\w+)"', instruction.text)
    if asked is None or asked[1] not in ("CAUSAL", "NO_MASK") or key[1] != positions:
        raise ValueError(f"attention with this mask cannot be counted: {instruction.text[:200]}")
    scores = positions * (positions + 1) // 2 if asked[1] == "CAUSAL" else positions**2
    products = 5 if instruction.custom_call.endswith("Backward") else 2
    flops = products * 2 * batch * heads * scores * width
    return Dot(instruction.op_name, dtype, "default", flops, runs)


def read_program(text: str | None) -> Program:
    """The products of optimised HLO, as `compiled.as_text()` prints it.

    Raises ValueError if there is no text, if the program has a loop whose number of passes the compiler does not know,
    or if it has products that cannot be counted.
    """
    computations, entry = parse(text)
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name].values():
            for _, called in calls(instruction):
                if called in computations:
                    visit(called, times * instruction.passes)

    visit(entry, 1)
    called = [(computations[name], times) for name, times in runs.items()]
    dots = [product(i, computation, times) for computation, times in called for i in computation.values()]
    return Program([dot for dot in dots if dot])

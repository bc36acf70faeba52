"""The collectives of a compiled program, read from its optimised HLO: what devices send each other, and how often.

A program for several devices is one program that each of them runs. So every size here is that of one device. The
`replica_groups` of a collective come in these forms:

    {{0,1},{2,3}}            lists of devices; {} is one group of all devices
    [2,2]<=[2,2]T(1,0)       a range that is reshaped, transposed and reshaped again
    mesh['a'=2,'b'=2] {'b'}  axes of a mesh: the devices along `b` are a group

On a GPU a collective is two instructions, and the result of its `-start` repeats the operands. So sizes are taken from
the operands.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from moe_jax.system.hlo import Computation, Instruction, calls, parse

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]

_LISTS = re.compile(r"replica_groups=\{(\{[\d, ]*\}(?:, ?\{[\d, ]*\})*)?\}")
_RANGE = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] \{((?:'\w+',?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{([\d{}, ]*)\}")
_PARTITIONS = re.compile(r"^HloModule.*?num_partitions=(\d+)", re.MULTILINE)

type Groups = tuple[tuple[int, ...], ...]
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
    groups: Groups
    """The devices of each group. A device talks to its own group only. Of a permutation, pairs of source and target."""
    loops: tuple[int, ...]
    """How often each enclosing loop runs, from the outermost on. Empty outside of loops."""

    @property
    def runs(self) -> int:
        """Executions in one call of the program."""
        return math.prod(self.loops)

    @property
    def bytes(self) -> int:
        """Bytes of the whole array on a device, in one execution: the operands, or what an all-gather makes of them."""
        sent = sum(array_bytes(dtype, shape) for dtype, shape in self.operands)
        return sent * len(self.groups[0]) if self.kind == "all-gather" else sent

    @property
    def total(self) -> int:
        return self.bytes * self.runs

    @property
    def wire(self) -> float:
        """Bytes that a device sends in one call of the program, if the devices of a group form a ring."""
        if self.kind == "collective-permute":
            return self.total
        devices = len(self.groups[0])
        return self.total * (devices - 1) / devices * (2 if self.kind == "all-reduce" else 1)


def read_collectives(text: str | None) -> list[Collective]:
    """The collectives of optimised HLO, as `compiled.as_text()` prints it, in the order of the text.

    Raises ValueError if there is no text, if a collective is inside a loop whose number of passes the compiler does not
    know, or if its groups are written in an unknown form.
    """
    computations, entry = parse(text)
    partitions = _PARTITIONS.search(text or "")
    everyone = int(partitions[1]) if partitions else 1
    collectives: list[Collective] = []

    def visit(name: str, loops: tuple[int | None, ...]) -> None:
        for instruction in computations[name].instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in get_args(Kind):
                collectives.append(_collective(kind, instruction, computations[name], everyone, loops))
            inner = (*loops, instruction.trip_count) if instruction.opcode == "while" else loops
            for _, target in calls(instruction):
                if target in computations:
                    visit(target, inner)

    visit(entry, ())
    return collectives


def _collective(
    kind: str, instruction: Instruction, computation: Computation, everyone: int, loops: tuple[int | None, ...]
) -> Collective:
    known = tuple(n for n in loops if n is not None)
    if len(known) != len(loops):
        raise ValueError(f"a collective is inside a loop of unknown length: {instruction.text[:200]}")
    operands = tuple(a for name in instruction.operands for a in computation.instructions[name].arrays)
    groups = _groups(instruction.text, everyone)
    return Collective(kind, instruction.op_name, operands, groups, known)  # pyright: ignore[reportArgumentType]


def _groups(text: str, everyone: int) -> Groups:
    if match := _RANGE.search(text):
        shape, reshaped, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
        devices = np.arange(math.prod(reshaped or ())).reshape(reshaped or ())
        return _tuples(devices.transpose(order).reshape(shape or ()))
    if match := _MESH.search(text):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return groups_along(axes, re.findall(r"\w+", match[2]))
    if match := _PAIRS.search(text) or _LISTS.search(text):
        if not match[1]:
            return (tuple(range(everyone)),)
        return tuple(tuple(int(n) for n in part.split(",")) for part in re.findall(r"\{([\d, ]+)\}", match[1]))
    raise ValueError(f"the groups of this collective are written in an unknown form: {text[:200]}")


def groups_along(mesh: Mapping[str, int], axes: Sequence[str]) -> Groups:
    """The groups of devices along the axes `axes` of a mesh, whose axes have the sizes `mesh`."""
    inside = [list(mesh).index(name) for name in axes]
    outside = [axis for axis in range(len(mesh)) if axis not in inside]
    devices = np.arange(math.prod(mesh.values())).reshape(*mesh.values()).transpose(*outside, *inside)
    return _tuples(devices.reshape(-1, math.prod(devices.shape[len(outside) :])))


def _tuples(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in group) for group in groups)


def bytes_by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes on a device in one call of the program, by kind."""
    sizes: Counter[str] = Counter()
    for collective in collectives:
        sizes[collective.kind] += collective.total
    return dict(sizes)

"""The collectives of a compiled program with their groups of devices, read from `replica_groups` in these forms:

{{0,1},{2,3}}            lists of devices; {} is one group of all devices
[2,2]<=[2,2]T(1,0)       a range that is reshaped, transposed and reshaped again
mesh['a'=2,'b'=2] {'b'}  axes of a mesh: the devices along `b` are a group
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.certify.collectives import Arrays, Kind, array_bytes, read_collectives

_LISTS = re.compile(r"replica_groups=\{(\{[\d, ]*\}(?:, ?\{[\d, ]*\})*)?\}")
_RANGE = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] \{((?:'\w+',?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{([\d{}, ]*)\}")
_PARTITIONS = re.compile(r"^HloModule.*?num_partitions=(\d+)", re.MULTILINE)

type Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class GroupedCollective:
    """One collective of a program."""

    kind: Kind
    operands: Arrays
    """Dtype and shape of each array that a device gives."""
    groups: Groups
    """The devices of each group. A device talks to its own group only. Of a permutation, pairs of source and target."""
    loops: tuple[int, ...]
    """How often each enclosing loop runs, from the outermost on."""

    @property
    def bytes(self) -> int:
        """Bytes of the whole array on a device, in one execution: the operands, or what an all-gather makes of them."""
        sent = sum(array_bytes(dtype, shape) for dtype, shape in self.operands)
        return sent * len(self.groups[0]) if self.kind == "all-gather" else sent

    @property
    def total(self) -> int:
        """Bytes in one call of the program."""
        return self.bytes * math.prod(self.loops)

    @property
    def wire(self) -> float:
        """Bytes that a device sends in one call of the program, if the devices of a group form a ring."""
        if self.kind == "collective-permute":
            return self.total
        devices = len(self.groups[0])
        return self.total * (devices - 1) / devices * (2 if self.kind == "all-reduce" else 1)


def read_grouped(text: str) -> list[GroupedCollective]:
    """The collectives of optimised HLO. Raises ValueError as `read_collectives` does, and for groups in an unknown
    form."""
    partitions = _PARTITIONS.search(text)
    everyone = int(partitions[1]) if partitions else 1
    return [GroupedCollective(c.kind, c.operands, _groups(c.text, everyone), c.loops) for c in read_collectives(text)]


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

"""A training step on many devices that need not be there: memory, operations, what is sent, and the predicted time.

Everything is read from the program that XLA has compiled for these devices. The step takes as long as the roofline of
its arithmetic (`roofline.py`) and then its collectives, by the stated bandwidth of the links (`interconnect.py`).
Nothing is measured.

Scaling is weak: each device has the same sequences, however many devices there are. So with perfect scaling a step
takes the same time on every number of devices, and efficiency is the time of one device over the time of many.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, get_args

import jax.numpy as jnp

from moe_jax.certify.collectives import Kind, bytes_by_kind, read_collectives
from moe_jax.certify.mesh import ideal_bytes
from moe_jax.config import MeshShape, RunConfig
from moe_jax.planning.target import Target
from moe_jax.system.environment import MIB
from predicted.ahead_of_time import Compiled, Devices, compile_step, programs_for
from predicted.collectives import GroupedCollective, groups_along, read_grouped
from predicted.interconnect import GPU_COUNTS, V5E_SLICES, Hosts, Place
from predicted.kernels import Kernel, read_kernels
from predicted.roofline import Rates
from predicted.tpu import Slice

REDUCTIONS: tuple[Kind, ...] = ("all-reduce", "reduce-scatter")


@dataclass(frozen=True)
class DevicePlan:
    """One row: a training step on some devices. Sizes and times are those of one device."""

    name: str
    """The devices, such as "v5e-256" or "8 x h100-80gb"."""
    devices: int
    mesh: str
    arguments_mib: float
    temporary_mib: float
    total_mib: float
    memory_mib: float
    budget_mib: float
    """Memory of the device that a plan may use."""
    fits: bool
    refused: bool
    """The compiler refused the program, because it takes more memory than the device has. So it has no text to read."""
    flops: int | None
    """Operations of matrix products. None if they cannot be counted, as in a loop of unknown length."""
    sent: dict[str, int] | None
    """Bytes by kind of collective, as the program has them. None if they cannot be counted."""
    ideal: dict[str, int]
    """Bytes by kind of collective that the algorithm must move. Reductions have the name "all-reduce"."""
    arithmetic_ms: float | None
    collectives_ms: float | None
    compile_seconds: float
    """Processor time of the compilation. 0 for a row that another row's program gave."""
    program_of: int
    """Devices of the row whose compiled program this row is read from: mostly its own."""

    @property
    def step_ms(self) -> float | None:
        if self.arithmetic_ms is None or self.collectives_ms is None:
            return None
        return self.arithmetic_ms + self.collectives_ms

    def efficiency(self, base: "DevicePlan") -> float | None:
        """Predicted step on the devices of `base` / predicted step on these. None if one of them is not known."""
        if self.step_ms is None or base.step_ms is None:
            return None
        return base.step_ms / self.step_ms

    def needed(self, kind: str) -> int:
        return self.ideal.get(kind, 0)


def by_kind(sent: dict[str, int]) -> dict[str, int]:
    """The bytes by kind, with reduce-scatter under "all-reduce", as the ideal has them."""
    merged = {"all-to-all": 0, "all-gather": 0, "all-reduce": 0}
    for kind, size in sent.items():
        name = "all-reduce" if kind in REDUCTIONS else kind
        merged[name] = merged.get(name, 0) + size
    return merged


def arithmetic_seconds(kernels: Sequence[Kernel], rates: Rates) -> float:
    """Time of a program's kernels without its collectives.

    Kernels follow one another, except copies that run beside them. But all traffic together takes at least as long as
    the memory needs for it.
    """
    ours = [kernel for kernel in kernels if kernel.opcode not in get_args(Kind)]
    in_turn = sum(rates.seconds(kernel) for kernel in ours if not kernel.beside)
    return max(in_turn, sum(kernel.traffic for kernel in ours) / rates.bytes)


def collective_seconds(collectives: Sequence[GroupedCollective], devices: Devices, places: Sequence[Place]) -> float:
    return sum(devices.links.seconds(collective, places) for collective in collectives)


@dataclass(frozen=True)
class Step:
    """A compiled step, and what its row needs."""

    devices: Devices
    mesh: str
    compiled: Compiled
    ideal: dict[str, int]
    places: Sequence[Place]

    def collectives(self) -> list[GroupedCollective]:
        return read_grouped(self.compiled.text) if self.compiled.text else []


def compiled_for(config: RunConfig, mesh: str, devices: Devices, sequences: int) -> Step:
    """Compile the step for the devices.

    Raises ConfigError for a mesh that does not fit the devices or the model, UserError without the compiler.
    """
    described = devices.described()
    programs = programs_for(config.on_mesh(mesh, sequences), devices, described)
    ideal = {"all-to-all": 0, "all-gather": 0, "all-reduce": 0}
    if programs.layout is not None:
        item_bytes = jnp.dtype(programs.policy.compute).itemsize
        ideal = ideal_bytes(programs.config, programs.param_shapes, programs.layout, item_bytes)
    compiled = compile_step(programs, devices, described)
    return Step(devices, mesh, compiled, ideal, devices.places(mesh))


def read_plan(step: Step) -> DevicePlan:
    """The row of a compiled step."""
    compiled, devices = step.compiled, step.devices
    refused, flops, sent, arithmetic, collectives = not compiled.text, None, None, None, None
    if not refused:
        with contextlib.suppress(ValueError):
            kernels = read_kernels(compiled.text)
            flops = sum(dot.total for kernel in kernels for dot in kernel.dots)
            arithmetic = 1e3 * arithmetic_seconds(kernels, devices.rates)
        with contextlib.suppress(ValueError):
            found = step.collectives()
            sent = by_kind(bytes_by_kind(read_collectives(compiled.text)))
            collectives = 1e3 * collective_seconds(found, devices, step.places)
    return DevicePlan(
        name=devices.name,
        devices=devices.count,
        mesh=step.mesh,
        arguments_mib=compiled.arguments / MIB,
        temporary_mib=compiled.temporary / MIB,
        total_mib=compiled.total / MIB,
        memory_mib=devices.memory / MIB,
        budget_mib=devices.usable / MIB,
        fits=compiled.total <= devices.usable and not refused,
        refused=refused,
        flops=flops,
        sent=sent,
        ideal=step.ideal,
        arithmetic_ms=arithmetic,
        collectives_ms=collectives,
        compile_seconds=compiled.seconds,
        program_of=devices.count,
    )


def scaling_mesh(config: RunConfig, devices: Devices) -> str:
    """The mesh of a scaling table: as many devices along `expert` as divide the experts, the rest along `data`.

    The experts of a layer lie within one host of GPUs, because tokens travel to them four times a layer. With dispatch
    by blocks there is no axis `expert`: nothing is dropped without one.
    """
    near = min(devices.count, devices.links.per_host) if isinstance(devices.links, Hosts) else devices.count
    expert = math.gcd(near, config.model.experts) if not config.model.dropless else 1
    return f"data={devices.count // expert},expert={expert}"


def counts_for(chip: Target | Slice) -> list[int]:
    """Numbers of devices in a scaling table: the slices up to this one, or 1 to 16 cards."""
    return [n for n in V5E_SLICES if n <= chip.chips] if isinstance(chip, Slice) else list(GPU_COUNTS)


def devices_like(chip: Target | Slice, count: int) -> Devices:
    return Devices.tpus(Slice(count)) if isinstance(chip, Slice) else Devices.gpus(chip, count)


def scaling(config: RunConfig, chip: Target | Slice, sequences: int) -> Iterator[DevicePlan]:
    """The rows of a scaling table, each when it is known.

    Meshes that differ only in the size of `data` (above 1) run the same program on each device. Of such meshes the
    smallest and the largest are compiled. If their programs agree, the rows between them are read from the largest.
    """

    counts = counts_for(chip)
    devices = {count: devices_like(chip, count) for count in counts}
    meshes = {count: scaling_mesh(config, devices[count]) for count in counts}
    steps: dict[int, Step] = {}

    def compiled(count: int) -> Step:
        return compiled_for(config, meshes[count], devices[count], sequences)

    for count in counts:
        alike = [n for n in counts if _local(meshes[n]) == _local(meshes[count])]
        first, last = alike[0], alike[-1]
        if first < count < last:
            steps[last] = steps.get(last) or compiled(last)
            if derived := derived_plan(steps[first], steps[last], devices[count]):
                yield derived
                continue
        steps[count] = steps.get(count) or compiled(count)
        yield read_plan(steps[count])


def _local(mesh: str) -> tuple[bool, int]:
    """What decides the program of one device: whether there is a data axis, and the size of the expert axis."""
    shape = MeshShape.parse(mesh)
    return shape.data > 1, shape.expert


def derived_plan(smaller: Step, larger: Step, devices: Devices) -> DevicePlan | None:
    """The row of a mesh between two others, from the program of the larger one. None if the two programs do not agree:
    equal operations and bytes, and memory within 1 %."""
    low, high = read_plan(smaller), read_plan(larger)
    same = (low.flops, low.sent, low.arguments_mib) == (high.flops, high.sent, high.arguments_mib)
    if (
        high.sent is None
        or high.flops is None
        or not same
        or not math.isclose(low.total_mib, high.total_mib, rel_tol=0.01)
    ):
        return None
    old, shape = (MeshShape.parse(mesh) for mesh in (larger.mesh, smaller.mesh))
    new = shape._replace(data=devices.count // shape.expert)
    try:
        found = [on_other_mesh(c, old._asdict(), new._asdict()) for c in larger.collectives()]
    except ValueError:
        return None
    mesh = f"data={new.data},expert={new.expert}"
    places = devices.places(mesh)
    return dataclasses.replace(
        high,
        name=devices.name,
        devices=devices.count,
        mesh=mesh,
        collectives_ms=1e3 * collective_seconds(found, devices, places),
        compile_seconds=0.0,
    )


def on_other_mesh(collective: GroupedCollective, old: Mapping[str, int], new: Mapping[str, int]) -> GroupedCollective:
    """The same collective in the same program for a mesh with other sizes: along the same axes.

    Raises ValueError if its groups do not lie along axes of the mesh `old`.
    """
    for count in range(1, len(old) + 1):
        for axes in combinations(old, count):
            if {frozenset(group) for group in collective.groups} == {frozenset(g) for g in groups_along(old, axes)}:
                return dataclasses.replace(collective, groups=groups_along(new, axes))
    raise ValueError(f"the groups of this {collective.kind} do not lie along axes of the mesh {dict(old)}")


def in_json(plan: DevicePlan, base: DevicePlan | None) -> dict[str, Any]:
    """A row for JSON output. null for what is not known."""
    efficiency = plan.efficiency(base) if base else None
    return {
        "devices": plan.devices,
        "mesh": plan.mesh,
        "arguments_mib": round(plan.arguments_mib, 1),
        "temporary_mib": round(plan.temporary_mib, 1),
        "total_mib": round(plan.total_mib, 1),
        "memory_mib": round(plan.memory_mib, 1),
        "budget_mib": round(plan.budget_mib, 1),
        "fits": plan.fits,
        "gflop": None if plan.flops is None else round(plan.flops / 1e9, 1),
        "sent_bytes": plan.sent,
        "ideal_bytes": plan.ideal,
        "arithmetic_ms": _rounded(plan.arithmetic_ms),
        "collectives_ms": _rounded(plan.collectives_ms),
        "predicted_step_ms": _rounded(plan.step_ms),
        "efficiency": _rounded(efficiency),
        "efficiency_base_devices": base.devices if base else None,
        "compile_cpu_seconds": round(plan.compile_seconds, 1),
        "program_of_devices": plan.program_of,
    }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)

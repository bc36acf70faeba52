"""Predicted times, by hand: kernels on a card, collectives on links, a step on many devices. Some are compiled.

The compiled ones need the extra `gpu-plan` and the group `tpu-plan`, and have the marker `plan`.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from predicted import many_devices
from predicted.ahead_of_time import Compiled, Devices
from predicted.collectives import GroupedCollective, read_grouped
from predicted.interconnect import Hosts
from predicted.kernels import Kernel, read_kernels
from predicted.many_devices import DevicePlan, Step, read_plan
from predicted.roofline import Rates, predict
from predicted.tpu import Slice

from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.planning.device_memory import back_ends, compile_for_gpu, lower_for
from moe_jax.planning.target import load_target
from moe_jax.system.hlo import Dot
from moe_jax.training.programs import Programs
from tests.support import tiny
from tests.support.programs import compiled_for_gpu

RATES = Rates(bytes=1e9, float32=1e12, tf32=2e12, narrow=4e12, launch=1e-6)
MIB = 2**20
HOSTS = Hosts("bus", card=8e9, per_host=4, network_name="net", network=1e9, source="here")


def dot(dtype: str, precision: str = "default", flops: int = 8_000_000) -> Dot:
    return Dot("", (), (), (), dtype, dtype, precision, flops, 1)


def kernel(name: str, read: int, written: int, *dots: Dot, runs: int = 1) -> Kernel:
    return Kernel(name, "fusion", frozenset(), read, written, dots, runs)


@pytest.mark.parametrize(
    ("found", "microseconds"),
    [
        (kernel("", 600, 400), 1 + 1),  # memory: 1,000 bytes at 1 GB/s
        (kernel("", 600, 400, runs=5), 5 * 2),
        (kernel("", 0, 0, dot("f32", "highest")), 8 + 1),
        (kernel("", 0, 0, dot("bf16")), 2 + 1),
        (kernel("", 0, 0, dot("f16"), dot("bf16")), 4 + 1),
        (kernel("", 3000, 0, dot("bf16")), 3 + 1),  # the longer of memory and products
    ],
)
def test_a_kernel_takes_the_longer_of_memory_and_products_and_its_launch(found: Kernel, microseconds: float) -> None:
    assert RATES.seconds(found) == pytest.approx(1e-6 * microseconds)


def collective(kind: Any, groups: tuple, size: int = 800_000, loops: tuple = ()) -> GroupedCollective:
    """`size` numbers of one byte on each device."""
    return GroupedCollective(kind, (("s8", (size,)),), groups, loops)


@pytest.mark.parametrize(
    ("kind", "groups", "microseconds"),
    [
        # Four cards of a host at 8 GB/s each, 80 % reached: a ring sends 3/4 of 800 kB, an all-reduce twice.
        ("all-to-all", ((0, 1, 2, 3),), 600e3 / 6.4e3),
        ("all-reduce", ((0, 1, 2, 3),), 1200e3 / 6.4e3),
        # Two hosts of four: each of four cards sends half of its 800 kB to the other host, at 1 GB/s together.
        ("all-to-all", (tuple(range(8)),), 1600e3 / 0.8e3),
        # A host sends half of 800 kB, and in an all-reduce twice.
        ("reduce-scatter", (tuple(range(8)),), 400e3 / 0.8e3),
        # Four groups of two cards, one on each host: they share the network.
        ("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), 4 * 800e3 / 0.8e3),
    ],
)
def test_time_of_a_collective_between_cards(kind: Any, groups: tuple, microseconds: float) -> None:
    places = [HOSTS.place(device) for device in range(8)]
    assert HOSTS.seconds(collective(kind, groups), places) == pytest.approx(1e-6 * microseconds)
    assert HOSTS.seconds(collective(kind, groups, loops=(3,)), places) == pytest.approx(3e-6 * microseconds)


# The predicted step of a toy program

TOY = """HloModule jit_step, num_partitions=2
ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %y = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = bf16[64,16]{1,0} copy(%y)
  ROOT %sum = bf16[64,16]{1,0} all-reduce(%z), replica_groups={{0,1}}, to_apply=%add
}
"""


def devices(count: int, **changes: Any) -> Devices:
    rates = Rates(bytes=1e9, float32=1e9, tf32=1e9, narrow=1e10, launch=1e-6)
    found = Devices(load_target("rtx3060-12gb"), count, rates, HOSTS, 100 * MIB, 80 * MIB)
    return dataclasses.replace(found, **changes)


def step(count: int, text: str = TOY, mesh: str = "data=2", temporary: int = 3 * MIB) -> Step:
    compiled = Compiled(20 * MIB, MIB, temporary, text, 7.0)
    ideal = {"all-to-all": 0, "all-gather": 0, "all-reduce": 2048}
    return Step(devices(count), mesh, compiled, ideal, [HOSTS.place(i) for i in range(count)])


def test_the_row_of_a_toy_program_by_hand() -> None:
    """The product reads 4,096 + 1,024 bytes and writes 2,048: 7.168 microseconds at 1 GB/s, more than its 65,536
    operations at 10 GFLOP/s take (6.5536). The copy moves 4,096 bytes. Each takes 1 microsecond to start. The
    all-reduce of two cards sends 2,048 bytes at 6.4 GB/s."""
    plan = read_plan(step(2))
    assert plan.flops == 2 * 64 * 32 * 16
    assert plan.sent == {"all-to-all": 0, "all-gather": 0, "all-reduce": 2048}
    assert plan.arithmetic_ms == pytest.approx(1e-3 * (7.168 + 1 + 4.096 + 1))
    assert plan.collectives_ms == pytest.approx(1e-3 * 0.32)
    assert plan.step_ms == pytest.approx(1e-3 * 13.584)
    assert (plan.arguments_mib, plan.temporary_mib, plan.total_mib, plan.fits) == (20, 3, 24, True)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['data'=2,'fsdp'=1,'expert'=2] {'data'}", ((0, 2), (1, 3))),
        ("mesh['data'=2,'fsdp'=1,'expert'=2] {'data','expert'}", ((0, 1, 2, 3),)),
    ],
)
def test_groups_in_every_form(written: str, groups: tuple) -> None:
    (found,) = read_grouped(one(f"replica_groups={written}, to_apply=%add"))
    assert found.groups == groups


def one(attributes: str) -> str:
    return (
        f"HloModule jit_step, num_partitions=4\nENTRY %main (a: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[4]{{0}} all-reduce(%a), {attributes}\n}}\n"
    )


# Compiled


@pytest.mark.slow
@compiled_for_gpu
def test_the_kernels_and_the_traffic_of_a_step_of_seed_158m() -> None:
    """With every back end of a 4 GB card: few launches, and no float32 product beside the router's."""
    config = with_vocabulary(preset("seed-158m"))
    train = dataclasses.replace(config.train, batch_size=32, grad_accum=1, optimizer="adamw-bf16")
    config = dataclasses.replace(config, train=train, execution=ExecutionConfig(remat=True))
    programs = Programs.of(config, target := load_target("rtx3050-4gb"))
    lowered = lower_for(target, programs.step, programs.state_shapes, programs.batch_shapes(32))
    for options in back_ends(target).values():
        kernels = read_kernels(compile_for_gpu(lowered, options).as_text())
        prediction = predict(kernels, Rates.of(target))
        assert prediction.kernels <= 1250
        assert prediction.traffic_gb <= 36
        assert prediction.traffic_by_part["head and loss"] <= 13.5
        wide = {k.op_name for k in kernels for d in k.dots if d.operand_dtype == "f32" and "router" not in k.scopes}
        assert not wide


HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
TINY = RunConfig(model=tiny.config(), train=TrainConfig(optimizer="adamw"))
"""Compiled with two sequences on each device."""


def check_compiled(asked: Devices, expert: int) -> DevicePlan:
    """The bytes of the program are the ideal ones: four all-to-alls of bfloat16 a layer, and each gradient once."""
    plan = read_plan(many_devices.compiled_for(TINY, f"expert={expert}", asked, 2))
    model = TINY.model
    assert plan.sent is not None
    rows = model.layers * model.experts * 2 * model.capacity
    assert plan.sent["all-to-all"] == rows * (4 * model.width * 2 + 2 * 4)  # a gate goes there, its gradient comes back
    assert plan.sent["all-gather"] == 0
    assert plan.ideal["all-reduce"] <= plan.sent["all-reduce"] <= plan.ideal["all-reduce"] + 256
    assert plan.fits
    assert plan.flops is not None
    assert plan.step_ms is not None
    assert min(plan.flops, plan.step_ms) > 0
    return plan


@pytest.mark.slow
@pytest.mark.plan
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: uv run --isolated --group tpu-plan pytest -m plan")
@pytest.mark.timeout(1800)
def test_a_slice_of_four_chips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    check_compiled(Devices.tpus(Slice(4)), 4)


@pytest.mark.slow
@compiled_for_gpu
def test_two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    check_compiled(Devices.gpus(load_target("rtx3060-12gb"), 2), 2)

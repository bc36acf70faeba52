"""Plans for many devices: times by hand, rows, tables, bad input; and two that are compiled (marker `plan`).

The compiled ones need the extras `gpu-plan` and `tpu-plan`.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.config import RunConfig, TrainConfig, UserError
from moe_jax.config.presets import plan_preset, with_vocabulary
from moe_jax.model.costs import count_parameters, totals
from moe_jax.planning import ahead_of_time, many_devices
from moe_jax.planning.ahead_of_time import Compiled, Devices
from moe_jax.planning.interconnect import Hosts
from moe_jax.planning.many_devices import DevicePlan, Step, derived_plan, devices_like, read_plan, scaling, scaling_mesh
from moe_jax.planning.plan_cache import looked_up
from moe_jax.planning.roofline import Rates
from moe_jax.planning.target import load_target
from moe_jax.planning.tpu import Slice
from moe_jax.system import environment
from tests.support import tiny
from tests.support.programs import compiled_for_gpu

MIB = 2**20
HOSTS = Hosts("bus", card=8e9, per_host=4, network_name="net", network=1e9, source="here")


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


def test_copies_beside_the_arithmetic_take_time_only_if_the_memory_is_busy() -> None:
    started = TOY.replace("%z = bf16[64,16]{1,0} copy(%y)", "%c = (bf16[64,16]{1,0}, bf16[64,16]{1,0}) copy-start(%y)")
    text = started.replace("  ROOT %sum", "  %z = bf16[64,16]{1,0} copy-done(%c)\n  ROOT %sum")
    plan = read_plan(step(2, text))
    # All traffic is 11.264 microseconds, more than the product with its start, 8.168.
    assert plan.arithmetic_ms == pytest.approx(1e-3 * 11.264)


def test_a_step_that_takes_more_than_the_device_has_does_not_fit() -> None:
    assert read_plan(step(2, temporary=59 * MIB)).fits
    assert not read_plan(step(2, temporary=59 * MIB + 1)).fits
    refused = read_plan(step(2, text=""))
    assert (refused.fits, refused.refused, refused.flops, refused.sent) == (False, True, None, None)
    assert refused.step_ms is None


def test_a_program_that_cannot_be_counted_still_has_its_memory() -> None:
    plan = read_plan(step(2, TOY.replace(" dot(%a, %b)", " ragged-dot(%a, %b)")))
    assert (plan.total_mib, plan.fits, plan.refused, plan.flops, plan.step_ms) == (24, True, False, None, None)
    assert plan.sent is not None


def row(count: int, arithmetic: float | None, collectives: float | None, fits: bool = True) -> DevicePlan:
    sent = {"all-to-all": 3 * MIB, "all-gather": 0, "all-reduce": MIB}
    mesh = f"data={count}"
    return DevicePlan(
        f"{count} x card",
        count,
        mesh,
        10,
        5,
        15,
        100,
        80,
        fits,
        not fits,
        10**9,
        sent,
        sent,
        arithmetic,
        collectives,
        6.0,
        count,
    )


def test_efficiency_is_the_time_of_one_device_over_the_time_of_many() -> None:
    assert row(8, 30, 10).efficiency(row(1, 32, 0)) == pytest.approx(0.8)
    assert row(8, 30, 10).efficiency(row(1, None, None, fits=False)) is None


# Rows that share a program


@pytest.mark.parametrize(
    ("chip", "meshes"),
    [
        (Slice(256), {1: "data=1,expert=1", 8: "data=1,expert=8", 16: "data=1,expert=16", 256: "data=16,expert=16"}),
        (load_target("rtx3060-12gb"), {2: "data=1,expert=2", 4: "data=1,expert=4", 16: "data=4,expert=4"}),
        (load_target("h100-80gb"), {8: "data=1,expert=8", 16: "data=2,expert=8"}),
    ],
)
def test_meshes_of_a_scaling_table(chip: Any, meshes: dict[int, str]) -> None:
    """`seed-158m` has 16 experts. Four RTX 3060 or eight H100 are in a host."""
    config = plan_preset("seed-158m")
    assert {n: scaling_mesh(config, devices_like(chip, n)) for n in meshes} == meshes
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, dense="active"))
    assert scaling_mesh(dense, devices_like(chip, 8)) == "data=8,expert=1"


def meshed(count: int, text: str = TOY, temporary: int = 3 * MIB) -> Step:
    """A step whose reduction is over all devices of a mesh with data = count."""
    groups = "{{" + ",".join(map(str, range(count))) + "}}"
    return step(count, text.replace("{{0,1}}", groups), f"data={count}", temporary)


def test_a_row_between_two_of_the_same_program_is_read_from_the_larger() -> None:
    plan = derived_plan(meshed(2), meshed(8), devices(4))
    assert plan is not None
    assert (plan.devices, plan.mesh, plan.program_of, plan.compile_seconds) == (4, "data=4,expert=1", 8, 0)
    assert plan.collectives_ms == pytest.approx(1e3 * 2 * 2048 * 3 / 4 / 6.4e9), "a ring of 4 in one host"


@pytest.mark.parametrize(
    ("text", "temporary"),
    [
        (TOY, 4 * MIB),
        (TOY.replace("bf16[64,32]", "bf16[64,48]").replace("bf16[32,16]", "bf16[48,16]"), 3 * MIB),
        ("", 3 * MIB),
        (TOY.replace("all-reduce(%z)", "all-to-all(%z)"), 3 * MIB),
    ],
)
def test_programs_that_differ_give_no_row(text: str, temporary: int) -> None:
    assert derived_plan(meshed(2), meshed(8, text, temporary), devices(4)) is None


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of devices whose step would have been compiled. Each compiles to the toy program."""
    counts: list[int] = []

    def compiled_for(config: RunConfig, mesh: str, asked: Devices, sequences: int) -> Step:
        counts.append(asked.count)
        return dataclasses.replace(meshed(asked.count), devices=devices(asked.count, chip=asked.chip), mesh=mesh)

    monkeypatch.setattr(many_devices, "compiled_for", compiled_for)
    monkeypatch.setattr(environment, "prepare_environment", list)
    chips = [SimpleNamespace(platform="tpu", coords=(i % 16, i // 16, 0)) for i in range(256)]
    monkeypatch.setattr(Devices, "described", lambda self: chips[: self.count])
    return counts


def test_a_table_compiles_each_program_once(pretended: list[int]) -> None:
    """32 and 256 chips differ in the size of `data` only, so 64 and 128 need no compilation."""
    rows = list(scaling(plan_preset("seed-158m"), Slice(256), 8))
    assert [r.devices for r in rows] == [1, 4, 8, 16, 32, 64, 128, 256]
    assert pretended == [1, 4, 8, 16, 32, 256]
    assert [r.program_of for r in rows] == [1, 4, 8, 16, 32, 256, 256, 256]


# The command


def test_a_plan_of_one_mesh(pretended: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_command, ["plan", "--mesh", "data=2", "--gpu", "rtx3060-12gb", "--json"]) == 0
    said = capsys.readouterr().out
    assert pretended == [2, 1]
    assert "total 24 of the 80 that a plan may use: fits (80% of the 100 MiB of a device)" in said
    assert "predicted, nothing measured" in said
    assert "no such device was used and nothing was measured" in said
    result = json.loads(said.splitlines()[-1])
    assert (result["total_mib"], result["memory_mib"], result["budget_mib"], result["fits"]) == (24, 100, 80, True)
    assert result["sent_bytes"] == result["ideal_bytes"] == {"all-to-all": 0, "all-gather": 0, "all-reduce": 2048}
    assert result["predicted_step_ms"] == pytest.approx(0.0136, abs=1e-3)


def test_a_plan_of_one_mesh_prints_its_command_and_the_whole_run(
    pretended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two cards with 32 sequences of 256 tokens each: 16,384 tokens in 13.584 microseconds. 5,000 such steps take 0.07
    s, and half of them read as many tokens as one card would."""
    assert main(run_command, ["plan", "--mesh", "data=2", "--gpu", "rtx3060-12gb", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(lines)
    assert "16,384 tokens a step, 8,192 on each device: 1,206,124,853 tokens/s, under a second for 5,000 steps" in said
    assert "for the same tokens --steps 2500 are enough" in said
    command = (
        "uv run --extra cuda12 train.py --preset seed-158m --mesh data=2 --batch-size 64 --grad-accum 1 "
        "--optimizer adamw"
    )
    assert command in lines
    assert json.loads(lines[-1])["command"] == command
    assert json.loads(lines[-1])["tokens_per_step"] == 16384
    told = next(i for i, line in enumerate(lines) if "now the step is compiled for one device" in line)
    assert lines.index(command) < told < next(i for i, line in enumerate(lines) if "efficiency against one" in line)


def test_commands_for_several_hosts_for_tpus_and_for_plans_only(
    pretended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> str:
        assert main(run_command, ["plan", *words, "--json"]) == 0
        return capsys.readouterr().out

    assert "once on each host" not in printed("--mesh", "expert=4", "--gpu", "rtx3060-12gb")
    assert "once on each host" in printed("--mesh", "data=2,expert=4", "--gpu", "rtx3060-12gb")
    tpu = printed("--mesh", "expert=8", "--tpu", "v5e-8", "--optimizer", "adafactor", "--lr", "0.01")
    start = "\nJAX_PLATFORMS=tpu uv run --extra tpu-plan train.py --preset seed-158m --lr 0.01 --mesh expert=8 "
    assert start + "--batch-size 256 --grad-accum 1 --optimizer adafactor\n" in tpu
    pod = printed("--mesh", "expert=8", "--gpu", "h100-80gb", "--preset", "pod-1b", "--seq-len", "512")
    assert "8 sequences of 512 tokens on each device" in pod
    assert "pod-1b is for plans only" in pod
    assert json.loads(pod.splitlines()[-1])["command"] is None


def test_a_table_and_its_picture(pretended: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "pictures"
    assert main(run_command, ["plan", "--scaling", "--gpu", "h100-80gb", "--out", str(out), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["1", "2", "4", "8", "16"]
    assert "weak scaling" in "\n".join(lines)
    result = json.loads(lines[-1])
    assert [r["devices"] for r in result["rows"]] == [1, 2, 4, 8, 16]
    assert result["rows"][0]["efficiency"] == 1
    for scheme in ("light", "dark"):
        assert "</svg>" in (out / f"seed-158m-h100-80gb-{scheme}.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mesh", "data=4", "--tpu", "v5e-8"], "--mesh data=4: has 4 places, and v5e-8 has 8 chips"),
        (["--mesh", "data=2", "--tpu", "v5e-2"], "--tpu v5e-2: must be one of v5e-1, v5e-4"),
        (["--mesh", "expert=3", "--gpu", "rtx3060-12gb"], "--mesh expert=3: must be an expert axis that divides"),
        (["--mesh", "fsdp=16", "--gpu", "h100-80gb", "--preset", "max-4gb", "--lora", "4"], "--lora 4: is for plans"),
        (["--mesh", "data=2,expert=9", "--gpu", "h100-80gb"], "--mesh data=2,expert=9: has 18 places"),
        (["--mesh", "data=6", "--gpu", "rtx3060-12gb"], "in hosts of 4"),
        (["--mesh", "data=2"], "--gpu rtx3050-4gb (the default): the links between several such cards are not known"),
        (["--mesh", "data=2", "--scaling", "--gpu", "h100-80gb"], "--mesh, --scaling: give one"),
        (["--mesh", "data=8", "--gpu", "h100-80gb", "--tpu", "v5e-8"], "--tpu v5e-8 names the devices too"),
        (["--mesh", "data=8", "--gpu", "rtx3050-4gb", "--tpu", "v5e-8"], "--tpu v5e-8 names the devices too"),
        (["--mesh", "data=8", "--tpu", "v5e-8", "--experts", "4", "--top-k", "9"], "--top-k 9"),
        (["--mesh", "data=8", "--gpu", "h100-80gb", "--out", "x"], "--out x: is for the picture of --scaling"),
        (["--mesh", "data=8", "--gpu", "h100-80gb", "--sequences", "-1"], "--sequences -1: must be between"),
        (["--mesh", "data=x", "--gpu", "h100-80gb"], "--mesh data=x"),
        (["--tpu", "v5e-8"], "--tpu v5e-8: is for plans of several devices; add --mesh or --scaling"),
        (["--preset", "pod-1b"], "--preset pod-1b: is for plans of several devices; add --mesh or --scaling"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, pretended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_command, ["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert pretended == []


def test_without_libtpu_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"planning for TPUs needs libtpu: .*--extra tpu-plan"):
        Slice(4).devices()


def compiled_step(found: Any, platform: str = "tpu") -> Compiled:
    """The outcome of a compilation that returns `found`, or raises it."""

    def compile_(compiler_options: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(as_text=lambda: found, memory_analysis=lambda: sizes)

    sizes = SimpleNamespace(
        argument_size_in_bytes=8, output_size_in_bytes=6, alias_size_in_bytes=4, temp_size_in_bytes=1
    )
    return ahead_of_time._compile(SimpleNamespace(compile=compile_), platform, 2 * MIB)


def test_memory_of_a_compiled_step() -> None:
    """Outputs that take the memory of a donated argument do not count."""
    found = compiled_step("f32[8]{0:T(8,128)}")
    assert (found.arguments, found.outputs, found.temporary, found.total) == (8, 2, 1, 11)
    with pytest.raises(AssertionError, match="compiled for another device"):
        compiled_step("f32[8]{0}")


def test_a_compiled_step_is_the_same_after_a_while_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    forms = ahead_of_time._to_json, ahead_of_time._from_json
    found = compiled_step("é f32[8]{0:T(8,128)}")
    assert [looked_up(["a"], made, *forms) for made in (lambda: found, pytest.fail)] == [found, found]


def test_a_step_that_the_compiler_refuses_has_its_memory_and_no_program() -> None:
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    found = compiled_step(jax.errors.JaxRuntimeError(said))
    assert (found.arguments, found.total, found.text) == (2 * MIB, 16.5 * 2**30, "")
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        compiled_step(jax.errors.JaxRuntimeError("another"))
    with pytest.raises(UserError, match="planning needs ptxas"):
        compiled_step(jax.errors.JaxRuntimeError("libdevice not found at"), "gpu")


def test_pod_1b_is_planned_for_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Its parameters by hand: 16 experts of three 1,280 x 2,432 matrices, a router, four 1,280 x 1,280 matrices of
    attention and two norms in each of 8 layers; a tied embedding of 50,257 rows, and a last norm."""
    layer = 16 * 3 * 1280 * 2432 + 1280 * 16 + 4 * 1280**2 + 2 * 1280
    total = 8 * layer + 50257 * 1280 + 1280
    assert totals(count_parameters(with_vocabulary(plan_preset("pod-1b")).model)).total == total
    assert main(run_command, ["train", "--preset", "pod-1b"]) == 2
    assert "--preset pod-1b: must be one of nano" in capsys.readouterr().err


# Compiled


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


@pytest.mark.plan
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: uv run --extra tpu-plan --extra gpu-plan pytest -m plan")
@pytest.mark.timeout(1800)
def test_a_slice_of_four_chips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    plan = check_compiled(Devices.tpus(Slice(4)), 4)
    monkeypatch.setattr(ahead_of_time, "_compile", lambda *_: pytest.fail("looked up, and not compiled again"))
    assert check_compiled(Devices.tpus(Slice(4)), 4) == plan


@compiled_for_gpu
def test_two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    check_compiled(Devices.gpus(load_target("rtx3060-12gb"), 2), 2)

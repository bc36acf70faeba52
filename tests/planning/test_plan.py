"""The verdicts on the 4 GB cards, by compiling the real training step for them; and the parts of a plan without that.

The compiled ones carry the marker `plan` and need the extra `gpu-plan`: `uv run --extra gpu-plan pytest -m plan`.
"""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.config.baselines import dense_baseline
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.inference.decode import cast_once
from moe_jax.model.costs import expert_flops, multiplied_rows, step_products
from moe_jax.model.precision import choose_policy
from moe_jax.planning import device_memory, search
from moe_jax.planning.device_memory import Bound, Memory
from moe_jax.planning.roofline import Rates
from moe_jax.planning.target import GPU_TARGETS, Target, load_target
from moe_jax.system import environment
from moe_jax.system.hlo_kernels import Kernel, read_kernels
from moe_jax.training.programs import Programs
from tests.support.programs import compiled_for_gpu

RATES = Rates(1e11, 1e12, 2e12, 4e12)
FOUR_GB = ["rtx3050-4gb", "quadro-t1000-4gb"]


def configured(name: str, **train: Any) -> RunConfig:
    """A preset with remat, and `train` in place of its own settings."""
    config = with_vocabulary(preset(name))
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, **train), execution=ExecutionConfig(remat=True)
    )


def plan(name: str, gpu: str, **train: Any) -> search.Row:
    """The training step of a preset (`configured`) on a card."""
    return search.plan_step(configured(name, **train), load_target(gpu))


WHOLE = {"batch_size": 32, "grad_accum": 1}
"""seed-158m's 32 sequences of 256 tokens in one micro-batch."""


@pytest.fixture
def compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Kernel]]:
    """The kernels of each program that is compiled for a GPU in a test."""
    found: list[list[Kernel]] = []
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))  # a plan that is looked up compiles nothing
    monkeypatch.setattr(device_memory, "read_kernels", lambda text: found.append(read_kernels(text)) or found[-1])
    return found


@pytest.mark.parametrize(
    ("gpu", "optimizer", "precision", "kernels", "traffic"),
    [
        ("rtx3050-4gb", "adamw-bf16", "bfloat16", 1250, 36),
        # Float32: no tensor cores. Two numbers of 8 bits of state, because activations take twice as much.
        ("quadro-t1000-4gb", "adamw-8bit", "float32", 1680, 55.5),
    ],
)
@compiled_for_gpu
def test_seed_158m_trains_on_a_4_gb_card(
    gpu: str, optimizer: str, precision: str, kernels: int, traffic: float, compiled_kernels: list[list[Kernel]]
) -> None:
    """Its memory, its kernels and its traffic, with every back end of the card."""
    row = plan("seed-158m", gpu, **WHOLE, optimizer=optimizer)
    assert row.precision == precision
    assert not any(m.warned for m in row.step.back_ends.values())
    assert row.step.total <= 2402
    assert row.fits
    assert len(compiled_kernels) == len(row.step.back_ends)
    for memory, launched in zip(row.step.back_ends.values(), compiled_kernels, strict=True):
        assert memory.prediction is not None
        assert memory.prediction.kernels <= kernels
        assert memory.prediction.traffic_gb <= traffic
        assert memory.prediction.traffic_by_part["head and loss"] <= (13.5 if precision == "bfloat16" else 18)
        assert not [k.op_name for k in launched if k.runs > 1 and "pad" in k.inner], "padded in each pass of a loop"
        wide = {
            k.op_name for k in launched for dot in k.dots if dot.operand_dtype == "f32" and "router" not in k.scopes
        }
        assert bool(wide) == (precision == "float32"), wide


@compiled_for_gpu
def test_without_drops_seed_158m_takes_little_longer_than_its_dense_twin() -> None:
    """With every back end: the time over that of the dense model with as many active parameters, and the kernels."""
    sparse = configured("seed-158m", **WHOLE, optimizer="adamw-bf16")
    routing = dataclasses.replace(sparse.model.routing, dispatch="blocks")
    sparse = dataclasses.replace(sparse, model=dataclasses.replace(sparse.model, routing=routing))
    target = load_target("rtx3050-4gb")
    ours, twin = (search.plan_step(c, target).step.back_ends for c in (sparse, dense_baseline(sparse, "active")))
    assert len(ours) == 2
    for back_end, memory in ours.items():
        mine, dense = memory.prediction, twin[back_end].prediction
        assert mine is not None
        assert dense is not None
        assert mine.kernels <= 1290
        assert mine.milliseconds <= 1.10 * dense.milliseconds
        assert memory.total <= 2060


@compiled_for_gpu
def test_blocks_of_experts_are_few_launches(compiled_kernels: list[list[Kernel]]) -> None:
    """Two layers of story-4gb, with 527 blocks of 64 rows. A block needs no turn of a loop and no copy of a matrix."""
    config = with_vocabulary(preset("story-4gb"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=2))
    lowered = Programs.of(config, target := load_target("rtx3050-4gb"))
    batch = lowered.batch_shapes(config.train.batch_size, config.train.grad_accum)
    step = device_memory.lower_for(target, lowered.step, lowered.state_shapes, batch)
    device_memory._compile(step, {}, Rates.of(target))
    (launched,) = compiled_kernels
    experts = [k for k in launched if "experts" in k.scopes]
    assert sum(k.runs for k in experts) <= 2 * 40
    assert sum(k.traffic for k in experts) <= 2 * 0.9e9, "each matrix of an expert is read in place"
    assert not [k.op_name for k in experts if "gather" in k.inner], "copied for a block"
    # The backward pass repeats the first two of the three products, because of remat.
    forward = expert_flops(config.model, multiplied_rows(config.model, 16, in_place=True))
    assert 3 * sum(dot.total for k in experts for dot in k.dots) == 2 * (3 + 2 + 2 * 3) * forward


@pytest.mark.parametrize(("remat", "again"), [(False, 0), (True, 1)])
@compiled_for_gpu
def test_attention_by_cudnn_is_counted_and_keeps_no_weights(
    remat: bool, again: int, compiled_kernels: list[list[Kernel]]
) -> None:
    """Two layers of story-4gb. Each has one call forward, with remat once more, and one backward. The weights of its 16
    sequences, 8 heads and 512 positions would be 67 MB a layer."""
    config = with_vocabulary(preset("story-4gb"))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, layers=2), execution=ExecutionConfig(remat=remat)
    )
    programs = Programs.of(config, target := load_target("rtx3050-4gb"))
    assert programs.attention.reason == "cuDNN's"
    batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    step = device_memory.lower_for(target, programs.step, programs.state_shapes, batch)
    device_memory._compile(step, {}, Rates.of(target))
    (launched,) = compiled_kernels
    attention = [k for k in launched if "attention" in k.scopes]
    calls = [k for k in attention if k.opcode == "custom-call" and "dot_product_attention" in k.op_name]
    assert len(calls) == 2 * (2 + again)
    needed = step_products(config, config.train.batch_size, in_place=True, cudnn=True)["attention"]
    assert sum(dot.total for k in attention for dot in k.dots) == needed
    assert max(k.bytes_written for k in attention) <= 2 * 16 * 512 * 3 * 512, "at most three gradients"


@compiled_for_gpu
def test_a_token_is_decoded_in_few_launches(compiled_kernels: list[list[Kernel]]) -> None:
    """The layers' six pairs of products have no loop. Weights are read once, in bfloat16: 90 MB. Those cast at every
    token would be 180 MB, and a copy of the head."""
    programs = Programs.of(with_vocabulary(preset("seed-158m")), target := load_target("rtx3050-4gb"))
    decoder = programs.decoder()
    prompt, length = jax.ShapeDtypeStruct((1, 256), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    params = jax.eval_shape(partial(cast_once, programs.writer), programs.param_shapes)
    state = jax.eval_shape(decoder.prefill, params, prompt, length)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = device_memory.lower_for(target, decoder.advance, params, state, token)
    device_memory._compile(step, {}, Rates.of(target))
    (launched,) = compiled_kernels
    assert sum(k.runs for k in launched) <= 100
    assert {k.runs for k in launched} == {1}
    assert sum(k.traffic for k in launched) <= 0.1e9


@pytest.mark.parametrize(("gpu", "most"), [("rtx3050-4gb", 1160), ("quadro-t1000-4gb", 1570)])
@compiled_for_gpu
def test_the_leanest_setting_of_seed_158m_takes_about_half_of_that(gpu: str, most: float) -> None:
    row = plan("seed-158m", gpu, **WHOLE, optimizer="adafactor")
    assert row.step.total <= most
    assert row.fits


@compiled_for_gpu
def test_max_4gb_trains_on_a_4_gb_card_with_tensor_cores() -> None:
    """In float32, as on the T1000, it takes 2,999 MiB and does not fit."""
    row = plan("max-4gb", "rtx3050-4gb")
    shapes = Programs.of(row.config, load_target("rtx3050-4gb")).param_shapes
    assert sum(p.size for p in jax.tree.leaves(shapes)) > 4e8
    assert row.step.total <= 2402
    assert row.fits


@pytest.mark.parametrize("path", sorted(GPU_TARGETS.glob("*.txtpb")), ids=lambda p: p.stem)
def test_every_target_says_what_it_is_and_where_that_comes_from(path: Path) -> None:
    target = load_target(path.stem)
    gigabytes = int(path.stem.rpartition("-")[2].removesuffix("gb"))
    assert 0.9 * gigabytes * 2**30 < target.memory <= gigabytes * 2**30, "what a card reports, not what is on its box"
    assert 7 < float(target.compute_capability) < 13
    assert "Source: " in target.text
    reason = str(choose_policy("auto", target))
    assert reason.startswith("float32" if path.stem.startswith("quadro-t1000") else "bfloat16")
    assert target.device_kind in reason


def test_the_budget_of_the_4_gb_cards_by_hand() -> None:
    """3,951,369,912 bytes are 3,768.3 MiB; 75 % of that is 2,826.2, and 85 % of that 2,402.3."""
    assert [load_target(gpu).budget for gpu in FOUR_GB] == pytest.approx([2402.3] * 2, abs=0.05)


def memory(total: float, warned: bool = False) -> Memory:
    return Memory(arguments=total - 30, outputs=10, temporary=20, warned=warned)


def test_the_larger_back_end_decides_and_a_warning_forbids() -> None:
    target = load_target("rtx3050-4gb")
    assert Bound({"triton": memory(2000), "cublas": memory(2402)}).fits(target)
    assert Bound({"triton": memory(2000), "cublas": memory(2402)}).total == 2402
    assert not Bound({"triton": memory(2403), "cublas": memory(2000)}).fits(target)
    assert not Bound({"triton": memory(2000, warned=True), "cublas": memory(2000)}).fits(target)


def test_candidates_keep_the_batch_and_go_from_fast_to_lean() -> None:
    train = TrainConfig(batch_size=2, grad_accum=3, optimizer="adamw-bf16")
    tried = list(search.candidates(RunConfig(train=train), every_optimizer=False))
    assert all(c.train.batch_size * c.train.grad_accum == 6 for c in tried)
    assert [(c.train.optimizer, c.execution.remat, c.train.batch_size) for c in tried] == [
        *((kind, remat, 6) for kind in ("adamw-bf16", "adamw-8bit", "adafactor") for remat in (False, True)),
        ("adafactor", True, 3),
    ]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """A compiler that says 100 MiB for every program between steps, and for a step 600 MiB a byte of state."""
    steps: list[TrainConfig] = []

    def step(config: RunConfig, target: Target) -> search.Row:
        steps.append(config.train)
        state = {"adamw": 8, "adamw-bf16": 6, "adamw-8bit": 2, "adafactor": 0}[config.train.optimizer]
        taken = Bound({"cublas": memory(600 * state + (2000 if not config.execution.remat else 100))})
        return search.Row(config, "float16", state, 4, taken, taken.fits(target), "cuDNN's")

    monkeypatch.setattr(search, "plan_step", step)
    monkeypatch.setattr(search, "plan_inference", lambda config, target: {"evaluation": 100.0})
    monkeypatch.setattr(environment, "prepare_environment", list)
    return steps


def test_the_command_stops_at_the_first_setting_that_fits(
    pretended: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """8 and 6 bytes of state are too many; 2 x 600 + 100 = 1,300 MiB with remat fits."""
    assert main(run_command, ["plan", "--gpu", "quadro-t1000-4gb"]) == 0
    assert len(pretended) == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == (
        "uv run --extra cuda12 train.py --preset seed-158m --batch-size 32 --grad-accum 1 --optimizer adamw-8bit "
        "--execution.remat"
    )
    result = json.loads(lines[-1])
    assert result["command"] == lines[-2]
    assert (result["total_mib"], result["fits"], result["micro_batch"]) == (1300.0, True, 32)
    assert (result["optimizer"], result["remat"], result["gpu"]) == ("adamw-8bit", True, "quadro-t1000-4gb")


def test_adapters_are_planned_beside_frozen_weights_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, pretended: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed command repeats what the plan took: here 500 MiB a byte of a weight, so bfloat16 without remat."""

    def step(config: RunConfig, target: Target) -> search.Row:
        width = 2 if config.train.param_dtype == "bfloat16" else 4
        taken = Bound({"cublas": memory(500 * width + 1000)})
        return search.Row(config, "bfloat16", 0, width, taken, taken.fits(target), "cuDNN's")

    monkeypatch.setattr(search, "plan_step", step)
    assert main(run_command, ["plan", "--preset", "seed-158m", "--lora", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(
        "uv run --extra cuda12 python -m moe_jax sft --run RUN --data CHATS.jsonl --out NEW --lora 16 "
    )
    assert lines[-2].endswith("--optimizer adamw --train.param-dtype bfloat16")
    assert json.loads(lines[-1])["param_dtype"] == "bfloat16"


def test_the_command_fails_where_nothing_fits(
    pretended: list[TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.txtpb"
    small.write_text(load_target("rtx3050-4gb").text.replace("3951369912", "99999999"))
    assert main(run_command, ["plan", "--gpu", str(small)]) == 1
    assert len(pretended) == 2 * 4 + 5, "four optimizers with and without remat, then 16, 8, 4, 2 and 1 sequences"
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["fits"], result["command"]) == (False, None)


def test_an_unknown_card_is_answered_with_those_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_command, ["plan", "--gpu", "rtx9090"]) == 2
    said = capsys.readouterr().err
    assert "--gpu rtx9090" in said
    assert all(gpu in said for gpu in FOUR_GB)


def test_verifying_needs_a_card(pretended: list[TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_command, ["plan", "--verify"]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert pretended == []


def test_a_program_that_was_compiled_for_the_cpu_is_no_plan() -> None:
    lowered = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(AssertionError, match="for the CPU"):
        device_memory._compile(lowered, {}, RATES)


def test_what_was_planned_is_looked_up_and_a_damaged_note_of_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    compiles: list[dict[str, bool]] = []

    def compile_once(lowered: Any, options: dict[str, bool], rates: Any) -> Memory:
        compiles.append(options)
        return memory(100 + len(compiles))

    monkeypatch.setattr(device_memory, "_compile", compile_once)
    target = load_target("rtx3050-4gb")
    lowered = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((3,), jnp.float32))
    other = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((4,), jnp.float32))
    assert [device_memory._measured(target, lowered, {}).total for _ in range(2)] == [101, 101]
    assert device_memory._measured(target, lowered, {"x": True}).total == 102
    assert device_memory._measured(load_target("rtx3060-12gb"), lowered, {}).total == 103
    assert device_memory._measured(target, other, {}).total == 104
    for note in (tmp_path / "plans").iterdir():
        os.truncate(note, 7)
    assert device_memory._measured(target, lowered, {}).total == 105

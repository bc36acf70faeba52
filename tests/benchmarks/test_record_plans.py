"""`benchmarks/record_plans.py`: descriptions of GPUs, and what compiles for them.

The tests with the marker `plan` need the extra `gpu-plan`: `uv run --isolated --extra gpu-plan pytest -m plan`.
"""

import json
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import described_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_plans
from described_gpu import GPUS, Target, compile_for_gpu, lower_for

from moe_jax.config import ConfigError, RunConfig, TrainConfig, UserError
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.inference.decode import NOTHING_GIVEN, Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.costs import count_parameters
from moe_jax.model.precision import choose_policy
from moe_jax.model.quantized import quantized_shapes
from moe_jax.planning.plans import RECORDED, known_card, known_cards, recorded
from moe_jax.system.environment import MIB
from moe_jax.training.plan import Plan
from moe_jax.training.programs import Programs
from tests.support import short_form, tiny
from tests.support.programs import compiled_for_gpu

CONFIG = RunConfig(model=tiny.config(), train=TrainConfig(batch_size=4, grad_accum=2, optimizer="adamw"))


@pytest.mark.parametrize("path", sorted(GPUS.glob("*.txtpb")), ids=lambda p: p.stem)
def test_every_description_says_where_it_comes_from_and_its_facts_are_recorded(path: Path) -> None:
    target = Target.load(path.stem)
    gigabytes = int(path.stem.rpartition("-")[2].removesuffix("gb"))
    facts = target.facts()
    assert known_cards()[path.stem] == facts
    assert 0.9 * gigabytes * 2**30 < facts.memory <= gigabytes * 2**30, "what a card reports, not what is on its box"
    assert "Source: " in target.text
    older = {"quadro-t1000-4gb": "float32", "rtx2060-6gb": "float16"}  # without bfloat16 units
    assert str(choose_policy("auto", target)).startswith(older.get(path.stem, "bfloat16"))


def test_the_peaks_of_two_cards_by_hand() -> None:
    """16 multiprocessors of 128 cores at 1.5 GHz, and 256 multiply-adds of bfloat16; 14 of 64 at 1.455 GHz, without
    tensor cores."""
    ampere, turing = known_card("rtx3050-4gb"), known_card("quadro-t1000-4gb")
    assert ampere[4:] == (192e9, 2 * 16 * 128 * 1.5e9, 2 * 16 * 256 * 1.5e9)
    assert turing[4:] == (128e9, *[pytest.approx(2 * 14 * 64 * 1.455e9)] * 2)


def test_a_target_is_a_name_or_a_file(tmp_path: Path) -> None:
    own = tmp_path / "own.txtpb"
    own.write_text((GPUS / "h100-80gb.txtpb").read_text(encoding="utf-8").replace("H100", "X100"), encoding="utf-8")
    assert Target.load(str(own)).device_kind == "NVIDIA X100 80GB HBM3"
    own.write_text("gpu { }", encoding="utf-8")
    for name, said in (("gone", "must be one of h100-80gb, "), (str(own), "its description has no ")):
        with pytest.raises(ConfigError, match=f"^--gpu .*{said}"):
            Target.load(name)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(compiler_options: Any) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: No PTX compilation provider here")

    with pytest.raises(UserError, match=r"needs ptxas: .*--extra gpu-plan"):
        compile_for_gpu(SimpleNamespace(compile=refuse), {})
    monkeypatch.setattr(described_gpu, "has_cuda_plugin", lambda: False)
    with pytest.raises(UserError, match=r"needs JAX's CUDA plugin: .*--extra gpu-plan"):
        described_gpu.gpu_devices(Target.load("rtx3050-4gb"))


# Compiled for described cards

PAIRS = [tuple(key.split()) for key in json.loads(RECORDED.read_text())["plans"]]


@pytest.mark.parametrize(("name", "gpu"), short_form(PAIRS, [("nano", "quadro-t1000-4gb")]))
@compiled_for_gpu
def test_a_pair_compiles_to_what_is_recorded(name: str, gpu: str) -> None:
    """With the jaxlib that recorded it, to the last digit; with another one, within 2 %."""
    config, target = with_vocabulary(preset(name)), Target.load(gpu)
    plans, jaxlib = recorded(config, known_card(gpu))
    now = [Plan(**record_plans.rounded(plan)) for plan in record_plans.walk(config, target, target.facts().budget)]
    if jaxlib == version("jaxlib"):
        assert now == plans
    assert [plan.setting for plan in now] == [plan.setting for plan in plans]
    for plan, old in zip(now, plans, strict=True):
        assert plan.programs == pytest.approx(old.programs, rel=0.02)


@compiled_for_gpu
def test_two_cards_divide_the_experts() -> None:
    """Half of the experts and of their state on each card, and all of the rest: what is measured is one card's."""
    card = Target.load("rtx3060-12gb")
    one, two = (record_plans.mesh_mib(record_plans.on_mesh(CONFIG, f"expert={n}", 2), card) for n in (1, 2))
    experts = sum(count.total for name, count in count_parameters(CONFIG.model).items() if name == "experts")
    assert (one - two) * MIB == pytest.approx(experts / 2 * 3 * 4, rel=0.5)


def waits_for_the_host(card: Target, program: Any, *arguments: Any) -> list[str]:
    """The instructions of a program for the card at which it waits for the host, which decides what comes next:
    conditionals, and loops whose length is not known when they are compiled."""
    text = compile_for_gpu(lower_for(card, program, *arguments), {}).as_text()
    lines = [line for line in text.splitlines() if re.search(r" (while|conditional)\(", line)]
    return [re.findall(r" (while|conditional)\(", line)[0] for line in lines if "known_trip_count" not in line]


@compiled_for_gpu
@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_writing_waits_for_the_host_once_a_token(weights: Any) -> None:
    """One text has the loop over its tokens. A step of 16 slots and the reading of a prompt do not wait at all."""
    config = with_vocabulary(preset("nano"))
    card, length, vocabulary = Target.load("rtx3060-12gb"), config.model.seq_len, config.model.vocab_size
    programs = Programs.of(config, card)
    params = programs.param_shapes
    params = params if weights == "float32" else quantized_shapes(params, weights)
    decoder, nothing, number = Decoder(programs.writer, length, vocabulary), np.zeros(vocabulary, bool), np.int32(1)
    text = jax.eval_shape(decoder.begin_empty, params, nothing, Sampling().in_own_types(), jax.random.key(0))
    slots = jax.eval_shape(lambda one: jax.tree.map(lambda row: jnp.repeat(row, 16, 0), one), text)
    waits = partial(waits_for_the_host, card)
    assert waits(decoder.write, params, text, NOTHING_GIVEN, number, number) == ["while"]
    assert waits(decoder.step, params, slots, np.zeros(16, bool)) == []
    assert waits(decoder.prefill, params, np.zeros((1, length), np.int32), number) == []

"""A step on eight devices is the step of one device: the same bits where no sum is reordered, and close losses."""

import re
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
import pytest

from moe_jax.config import OptimizerKind
from moe_jax.data.batches import MaskedBatch
from moe_jax.inference.sampling import Sampling
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.training.programs import Programs
from tests.parallel import made
from tests.parallel.made import MESHES
from tests.support import short_form, tiny

pytestmark = pytest.mark.parallel

CLOSE = 5e-6
"""Largest difference of two losses in nats, over 50 steps. Sums over devices are made in another order."""


WIDE = {"seq_len": 64, "width": 64, "layers": 2}
"""A shape whose products have the same bits for 2 sequences as for 16, but for those of the experts. Products of fewer
rows and columns take another routine of the CPU's library, so their last bits differ on one device too. T * K is a
power of 2, so that a load is an exact number, and its mean over devices is the same in any order."""


@pytest.fixture(scope="module")
def whole() -> Callable[[int], tuple[np.ndarray, ...]]:
    """Hidden states, drop fractions and load of one device in a training pass, of so many sequences at a time."""
    programs = made.programs(**WIDE)

    @jax.jit
    def forward(params, tokens):
        hidden, stats, _ = merge(programs.graphdef, params)(tokens, Mode.TRAIN)
        return hidden, stats.drop_fraction, stats.load

    def in_parts(sequences: int) -> tuple[np.ndarray, ...]:
        params, tokens = programs.initial_params(), made.batch(0, length=64)[0][:, :-1]
        parts = [forward(params, part) for part in np.split(tokens, len(tokens) // sequences)]
        hidden, dropped, load = zip(*parts, strict=True)
        return np.concatenate(hidden), np.concatenate(dropped, axis=-1), np.mean(load, axis=0, dtype=np.float32)

    return in_parts


@pytest.mark.parametrize("mesh", short_form(MESHES, ["data=8", "fsdp=2,expert=4"]))
def test_hidden_states_drops_and_load_have_the_bits_of_one_device(
    mesh: str, whole: Callable[[int], tuple[np.ndarray, ...]]
) -> None:
    """Number 1 of the strict list, while choices are dropped.

    Without an axis for experts, a device's experts have the rows of its own 2 sequences. On a CPU with AVX-512 a
    product of so few rows has other bits than one of 16 sequences. So one device is given 2 sequences at a time there.
    """
    expected = whole(16 if "expert" in mesh else 2)
    assert expected[1].max() > 0.2
    programs = made.programs(mesh, **WIDE)
    assert programs.layout is not None
    forward = made.make_mesh_forward(programs.layout, programs.trained_graphdef, programs.param_shapes)
    params = jax.device_put(
        programs.initial_params(), programs.layout.shardings(programs.param_shapes, programs.layout.params)
    )
    tiny.assert_same_bits(forward(params, made.batch(0, length=64)[0][:, :-1]), expected)


TRAINED = [
    *((mesh, "adamw", 2) for mesh in MESHES),
    *(("fsdp=2,expert=4", kind, 1) for kind in get_args(OptimizerKind) if kind != "adamw"),
]
BY_DAY = [("expert=8", "adamw", 2), ("fsdp=2,expert=4", "muon", 1)]


@pytest.mark.parametrize(("mesh", "optimizer", "micro_batches"), short_form(TRAINED, BY_DAY))
def test_fifty_losses_are_those_of_one_device(mesh: str, optimizer: str, micro_batches: int) -> None:
    """Number 3 of the strict list: every optimizer, with dropout, and accumulated. The step is compiled once."""
    programs = made.programs(mesh, optimizer, grad_accum=micro_batches)
    _, losses = made.train(programs, 50)
    _, expected = made.train(made.programs("", optimizer, grad_accum=micro_batches), 50)
    assert np.abs(np.array(losses) - expected).max() <= CLOSE
    assert expected[0] - expected[-1] > 0.1
    assert programs.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_answers_of_conversations_count_alike() -> None:
    """Weights of targets sum over all devices: some devices have no answer at all."""
    tokens = made.batch(0)
    counted = np.zeros(tokens[..., 1:].shape, bool)
    counted[:, :5, 3:17] = True
    found = []
    for mesh in ("", "fsdp=2,expert=4"):
        programs = made.programs(mesh)
        _, report = programs.step(programs.state(programs.initial_params()), MaskedBatch.of(tokens, counted))
        found.append((float(report.metrics.loss), float(report.grad_norm)))
        assert float(report.metrics.answers) == counted.sum()
    np.testing.assert_allclose(found[0], found[1], rtol=2e-6)


def test_evaluation_scores_alike() -> None:
    """The rows of the last batch do not fill the devices, and nothing is dropped."""
    params = made.programs().initial_params()
    rows = tiny.tokens(13, made.T + 1, seed=3, vocabulary=made.V)
    start = np.full(13, made.T // 2, np.int32)
    weights = np.ones((13, made.T // 2), np.float32)
    batch = (rows[:, :-1], rows[:, made.T // 2 + 1 :], start, weights)
    expected = made.programs().evaluation(params, *batch)
    found = made.programs("fsdp=2,expert=4").evaluation(params, *batch)
    np.testing.assert_allclose(np.asarray(found[0]), np.asarray(expected[0]), rtol=1e-6)
    assert float(found[1]) == float(expected[1]) == 0


def test_adapters_on_a_mesh() -> None:
    """Losses and merged weights are those of one device, and no bit of the model itself changes."""
    found = []
    for mesh in ("", "fsdp=2,expert=4"):
        programs = made.programs(mesh, lora_rank=4, train_router=True, shared_experts=1)
        state, losses = made.train(programs, 5)
        tiny.assert_same_bits(jax.device_get(state.params), jax.device_get(programs.initial_params()))
        found.append((losses, jax.device_get(programs.weights(state)), programs))
    (expected, weights, _), (losses, cut, programs) = found
    assert np.abs(np.array(losses) - expected).max() <= CLOSE
    assert expected[0] - expected[-1] > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), cut, weights)
    assert programs.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


OF_A_MESH = re.compile(
    r"\bsdy\.|sharding|manual_computation|all_to_all|all_gather|all_reduce|reduce_scatter|partition_id"
)
"""Words of a lowered program for several devices. `partition_id` is read by `jax.lax.axis_index`."""


@pytest.mark.parametrize("dispatch", ["capacity", "blocks"])
def test_one_device_runs_a_program_without_a_mesh(dispatch: str) -> None:
    """Without --mesh, and with --mesh data=1, the step has nothing of the code for a mesh."""
    steps = {}
    for mesh in ("", "data=1", "data=8"):
        programs = made.programs(mesh, dispatch=dispatch)
        lower = programs.step.lower  # pyright: ignore[reportFunctionMemberAccess]
        steps[mesh] = lower(programs.state_shapes, programs.batch_shapes(made.B)).as_text()
    assert OF_A_MESH.findall(steps[""]) == []
    assert OF_A_MESH.search(steps["data=8"])
    assert steps["data=1"] == steps[""]


# Samples and snapshots of the routing


MESH = "fsdp=2,expert=4"


def whole_params(programs: Programs) -> Any:
    """The parameters as evaluation and samples take them: on a mesh whole on every device."""
    params = programs.weights(programs.state(programs.initial_params()))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    return params


def written(programs: Programs) -> list[int]:
    """A sample that is longer than the context, so that its end becomes a new prompt. A prompt of 20 tokens goes
    through blocks of experts, and a single token through its own experts."""
    params, prompt = whole_params(programs), [*range(20)]
    key = jax.random.key(5)
    return [*programs.decoder().stream(params, prompt, settings=Sampling(), key=key, stop=-1, limit=30)]


def test_samples_and_snapshots_are_those_of_one_device() -> None:
    changes: dict[str, Any] = {
        "layers": 2,
        "shared_experts": 1,
        "shared_gate": True,
        "qkv_bias": True,
        "tied_head": False,
    }
    programs, one = made.programs(MESH, **changes), made.programs(**changes)
    assert written(programs) == written(one)
    stream = tiny.tokens(100, seed=4, vocabulary=made.V)
    found, expected = programs.tracer(stream), one.tracer(stream)
    assert found is not None
    assert expected is not None
    assert found(whole_params(programs)) == expected(whole_params(one))

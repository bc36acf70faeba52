"""Products of float32 numbers are float32 on a GPU too: never TF32, which keeps 10 bits of the fraction.

A CPU has no TF32. So the tests read the precision that each product asks for, from the program before it is compiled;
the last test reads it from the program compiled for a GPU.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import DataConfig, ExecutionConfig, RunConfig, TrainConfig
from moe_jax.inference.decode import NOTHING_GIVEN
from moe_jax.inference.sampling import Sampling
from moe_jax.model.moe.router import route, router_logits
from moe_jax.model.precision import Card, choose_policy
from moe_jax.training.programs import Programs
from tests.support import short_form, tiny
from tests.support.programs import products


def run_config(compute_dtype: str, dispatch: str = "capacity") -> RunConfig:
    model = tiny.config(dispatch=dispatch, shared_experts=1, dropout=0.1)
    return RunConfig(
        model=model,
        data=DataConfig(),
        train=TrainConfig(steps=10, optimizer="adamw"),
        execution=ExecutionConfig(compute_dtype=compute_dtype),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_router_and_its_gradients(dtype: str) -> None:
    """x W, and the gradients for x and W."""

    def loss(x, kernel):
        return route(router_logits(x, kernel), 2).gate[..., 0].sum()

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = gradients.lower(jnp.ones((1, 8, 4), dtype), jnp.ones((4, 4))).as_text()
    assert products(text) == [("f32", "HIGHEST")] * 3


@pytest.mark.parametrize(
    ("compute_dtype", "dispatch"),
    short_form([("float32", "blocks"), ("bfloat16", "capacity")], [("bfloat16", "capacity")]),
)
def test_every_program_of_a_run(compute_dtype: str, dispatch: str) -> None:
    """In a bfloat16 run only the routers multiply float32 numbers: forward, and two gradients, in each layer."""
    programs = Programs.of(run_config(compute_dtype, dispatch))
    params, decoder = programs.param_shapes, programs.decoder()
    tokens, length = jax.ShapeDtypeStruct((1, tiny.T), "int32"), jax.ShapeDtypeStruct((), "int32")
    batch = jax.ShapeDtypeStruct((1, 2, tiny.T + 1), "int32")
    read = jax.eval_shape(decoder.prefill, params, tokens, length)
    seen, key = jax.eval_shape(lambda: (np.zeros(tiny.V, bool), jax.random.key(0)))
    text = jax.eval_shape(decoder.begin, read, seen, Sampling().in_own_types(), key, False)
    starts, weights = jax.ShapeDtypeStruct((1,), "int32"), jax.ShapeDtypeStruct((1, tiny.T), "float32")
    lowered = {
        "step": programs.step.lower(programs.state_shapes, batch),
        "evaluation": programs.evaluation.lower(params, tokens, tokens, starts, weights),
        "prefill": decoder.prefill.lower(params, tokens, length),
        "decoding": decoder.write.lower(params, text, NOTHING_GIVEN, length, length),
    }
    for name, program in lowered.items():
        found = products(program.as_text())
        wide = [precision for dtype, precision in found if dtype == "f32"]
        assert set(wide) == {"HIGHEST"}, name
        if compute_dtype == "bfloat16":
            assert len(wide) == 2 * (3 if name == "step" else 1), name
            # Decoding multiplies single rows, where the weights lie: on a CPU the library has no part in it.
            assert (len(found) > len(wide)) == (name != "decoding"), name


# Which matrix units a device has


def device(name: str, capability: str | None, platform: str = "gpu") -> SimpleNamespace:
    return SimpleNamespace(platform=platform, device_kind=name, compute_capability=capability)


@pytest.mark.parametrize(
    ("name", "capability", "tensor_cores", "compute"),
    [
        ("NVIDIA GeForce GTX 1080", "6.1", False, "float32"),
        ("Tesla V100-SXM2-16GB", "7.0", True, "float16"),
        ("Quadro RTX 4000", "7.5", True, "float16"),
        ("NVIDIA GeForce GTX 1650", "7.5", False, "float32"),
        ("Quadro T1000", "7.5", False, "float32"),
        ("NVIDIA T600 Laptop GPU", "7.5", False, "float32"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", "8.6", True, "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "9.0", True, "bfloat16"),
    ],
)
def test_the_precision_is_the_narrowest_that_the_matrix_units_take(
    name: str, capability: str, tensor_cores: bool, compute: str
) -> None:
    card = Card.of(device(name, capability))
    assert card == Card("gpu", name, float(capability))
    assert (card.tensor_cores, card.bfloat16_units) == (tensor_cores, compute == "bfloat16")
    policy = choose_policy("auto", device(name, capability))
    assert policy.compute == compute
    assert name in policy.reason


def test_a_device_without_a_compute_capability_has_no_tensor_cores() -> None:
    for found in (
        device("cpu", None, "cpu"),
        device("TPU v5", "", "tpu"),
        device("AMD Instinct MI300X", "gfx942"),
        SimpleNamespace(platform="x", device_kind="y"),
    ):
        card = Card.of(found)
        assert card.capability is None
        assert (card.tensor_cores, card.bfloat16_units) == (False, False)

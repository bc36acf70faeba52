"""The layer in somebody's own Flax model: what the README promises in ten lines."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moe_jax


class OwnModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, routing: moe_jax.RoutingConfig | None = None, **options) -> None:
        self.embed = nnx.Linear(3, 16, rngs=rngs)
        self.moe = moe_jax.MoE(16, 32, experts=4, routing=routing, rngs=rngs, **options)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        hidden = self.embed(x)
        mixed, stats = self.moe(hidden)
        return self.head(hidden + mixed), stats


def problem() -> tuple[jax.Array, jax.Array]:
    """Points, and a function of them that is not linear: no linear model gets its loss down."""
    x = np.random.default_rng(0).uniform(-1, 1, (8, 16, 3)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.abs(x).sum(-1, keepdims=True) - 1.5)


def loss_of(model: OwnModel, x: jax.Array, y: jax.Array) -> jax.Array:
    predicted, stats = model(x)
    return jnp.square(predicted - y).mean() + 0.01 * stats.balance_loss + 1e-3 * stats.z_loss


def losses(model: OwnModel, steps: int) -> list[float]:
    """Of each step of Adam, with the model split and merged inside a jitted function."""
    graphdef, params = nnx.split(model, nnx.Param)
    optimizer = optax.adam(1e-2)
    x, y = problem()

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graphdef, p), x, y))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, found = optimizer.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        found.append(float(loss))
    assert step._cache_size() == 1
    return found


def test_it_trains_in_a_model_of_ones_own() -> None:
    found = losses(OwnModel(nnx.Rngs(0)), 60)
    assert np.isfinite(found).all()
    assert found[1] < found[0], "one step of Adam helps"
    assert found[-1] < 0.5 * found[0]


def test_it_trains_by_the_tools_of_nnx_too() -> None:
    model = OwnModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: OwnModel, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, grads)
        return loss

    found = [float(step(model, optimizer, *problem())) for _ in range(5)]
    np.testing.assert_allclose(found, losses(OwnModel(nnx.Rngs(0)), 5), rtol=1e-4)


def test_eval_evaluates_and_train_trains() -> None:
    """Between steps of somebody's own loop, as every user of Flax does. Half of the pairs find a slot in training."""
    model = OwnModel(nnx.Rngs(0), moe_jax.RoutingConfig(top_k=2, capacity_factor=0.5))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x, y = problem()

    @nnx.jit
    def step(model: OwnModel, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(loss_of)(model, x, y))

    forward = nnx.jit(lambda model: model(x))
    for _ in range(2):
        model.train()
        step(model, optimizer)
        assert forward(model)[1].drop_fraction.mean() >= 0.5
        model.eval()
        predicted, stats = forward(model)
        assert not stats.drop_fraction.any()
        one_by_one = jnp.stack([model(x[:, i : i + 1])[0][:, 0] for i in range(x.shape[1])], axis=1)
        np.testing.assert_allclose(predicted, one_by_one, atol=1e-5)


@pytest.mark.parametrize("top_k", [5, 0])
def test_more_choices_than_experts_are_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k {top_k}: must be between 1 and the number of experts, 4"):
        OwnModel(nnx.Rngs(0), moe_jax.RoutingConfig(top_k=top_k))
    OwnModel(nnx.Rngs(0), moe_jax.RoutingConfig(top_k=4))


@pytest.mark.parametrize("shape", [(2, 16, 12), (16, 16), (1, 2, 16, 16), (16,), (2, 16, 0)])
def test_another_shape_is_refused_in_words(shape: tuple[int, ...]) -> None:
    """When the function is traced, so a compiled program has nothing of it. The annotations, which the tests check,
    would refuse some of these shapes first."""
    layer = moe_jax.MoE(16, 32, experts=4, rngs=nnx.Rngs(0))
    call = inspect.unwrap(type(layer).__call__)
    with pytest.raises(ValueError, match=re.escape(f"x must be [B, T, 16], not {list(shape)}")):
        jax.eval_shape(lambda x: call(layer, x), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_the_lazy_names_are_listed() -> None:
    """`dir` and completion in a notebook know them, although they are imported at their first use."""
    assert {"MoE", "Run", "load_run", "ModelConfig", "RoutingConfig"} <= set(dir(moe_jax))
    with pytest.raises(AttributeError, match="no attribute 'MOE'"):
        _ = moe_jax.MOE

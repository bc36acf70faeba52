"""The bias that balances the load: what it moves, how it steps, and that it evens the load out."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import TrainConfig
from moe_jax.model.moe.router import adjusted_bias, expert_load, route
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.state import initial_state
from moe_jax.training.step import make_step
from tests.support import tiny


def test_training_moves_the_bias_and_no_optimizer_does() -> None:
    config = tiny.config(balancing="bias")
    train = TrainConfig(steps=10, warmup_steps=0, router_bias_lr=0.25, weight_decay=0.5)
    graphdef, params = tiny.build(config)
    optimizer = make_optimizer(train)
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, False)
    before = [np.asarray(params["blocks"][i]["ffn"]["balance_bias"]) for i in range(2)]
    state, report = make_step(graphdef, optimizer, train, False)(state, tiny.tokens(1, 3, tiny.T + 1))
    for i in range(2):
        load = np.asarray(report.metrics.load)[i]
        expected = before[i] + 0.25 * np.sign(0.25 - load)
        np.testing.assert_allclose(state.params["blocks"][i]["ffn"]["balance_bias"], expected, rtol=1e-6)
        assert (expected != before[i]).any()


def test_bias_evens_out_a_crooked_router() -> None:
    """A router that loves two of four experts, and only its bias may change: the load becomes even."""
    love = np.array([1.5, 1.0, 0.0, -1.0])
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 4)) + love, jnp.float32)
    choose = jax.jit(lambda bias: expert_load(route(z, 2, bias)).mean(0))
    bias = jnp.zeros(4)
    loads = []
    for _ in range(400):
        load = choose(bias)
        loads.append(float(load.max()))
        bias = adjusted_bias(bias, load, 0.002)
    assert loads[0] > 0.4
    assert loads[-1] < 0.27

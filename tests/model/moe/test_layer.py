"""The MoE layer: every way to bring tokens to experts is one function, with one gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from suites.all_experts import AllExpertsMoE

from moe_jax.certify.arithmetic import layer_function, with_gradients
from moe_jax.config import Activation, ModelConfig, capacity
from moe_jax.model.moe import dispatch as d
from moe_jax.model.moe.experts import Experts, gated
from moe_jax.model.moe.layer import Mode, MoE, block_rows, inference_block_rows
from moe_jax.model.moe.router import route
from moe_jax.model.transformer import create, merge
from tests.support import oracles, tiny
from tests.support.one_hot import OneHotMoE
from tests.support.programs import scatter_adds_of_floats

B, T, D, E = 2, tiny.T, 4, 4


def layer_config(
    activation: str = "swiglu", top_k: int = 2, factor: float = 0.5, dispatch: str = "capacity"
) -> ModelConfig:
    return tiny.config(
        layers=1,
        width=D,
        expert_hidden=3,
        activation=activation,
        top_k=top_k,
        capacity_factor=factor,
        dispatch=dispatch,
    )


def values() -> tuple[jax.Array, jax.Array]:
    """An input, and a cotangent of the output."""
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.normal(size=(B, T, D))), jnp.asarray(rng.normal(size=(B, T, D)))


def ffn_params(config: ModelConfig) -> dict[str, Any]:
    return tiny.build(config, dtype="float64")[1]["blocks"][0]["ffn"]


def forward_and_gradients(function, params: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    """y, and the gradient of <y, cotangent> with respect to x, the router and every expert's weights."""
    x, cotangent = values()

    @jax.jit
    def run(x, params):
        y, pull = jax.vjp(function, x, params)
        d_x, d_params = pull(cotangent)
        return y, {"x": d_x, **d_params}

    return run(x, params)


def forward(function, params: dict[str, Any]) -> jax.Array:
    """y alone, for the forms that have no gradient."""
    return jax.jit(function)(values()[0], params)


def of_layer(config: ModelConfig, mode: Mode = Mode.TRAIN, moe: type[MoE] = MoE):
    graphdef, params = tiny.build(config, dtype="float64", moe=moe)

    def function(x, ffn):
        block = {**params["blocks"][0], "ffn": ffn}
        return merge(graphdef, {**params, "blocks": {0: block}}).blocks[0].ffn(x, mode)[0]

    return function


def plain(config: ModelConfig, params: dict[str, Any]):
    """All experts on all tokens, in plain jnp, with choices and drops of the NumPy loops."""
    x, _ = values()
    top_k = config.routing.top_k
    slots = capacity(T, E, top_k, config.routing.capacity_factor)
    weight = np.zeros((B, T, E))
    chosen = np.zeros((B, T, E))
    for b in range(B):
        choices = [oracles.choose(z, top_k) for z in np.asarray(x)[b] @ np.asarray(params["router"])]
        for t, places in enumerate(oracles.assign(choices, slots)):
            for e, place in zip(choices[t], places, strict=True):
                chosen[b, t, e] = 1
                weight[b, t, e] = place is not None

    def function(x, ffn):
        w = ffn["experts"]
        p = jnp.exp(x @ ffn["router"])
        total = p.sum(-1, keepdims=True) if top_k == 1 else (p * chosen).sum(-1, keepdims=True)
        hidden = jnp.einsum("btd,edf->btef", x, w["w_in"])
        if config.activation == "swiglu":
            gate = jnp.einsum("btd,edf->btef", x, w["w_gate"])
            hidden = gate / (1 + jnp.exp(-gate)) * hidden
        else:
            cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
            hidden = 0.5 * hidden * (1 + jnp.tanh(cubic))
        return jnp.einsum("bte,btef,efd->btd", p / total * weight, hidden, w["w_out"])

    return function, weight.sum() / chosen.sum()


def assert_equal_functions(one, other) -> None:
    assert tiny.relative_error(one[0], other[0]) < 1e-13
    errors = tiny.gradient_errors(one[1], other[1])
    assert max(errors.values()) < 1e-12, errors


def test_all_forms_are_one_function_without_drops(float64: None) -> None:
    config = layer_config(factor=float(E))
    params = ffn_params(config)
    function, kept = plain(config, params)
    assert kept == 1
    expected = forward_and_gradients(function, params)
    for moe in (MoE, AllExpertsMoE, OneHotMoE):
        assert_equal_functions(forward_and_gradients(of_layer(config, moe=moe), params), expected)
    for mode in (Mode.EVALUATE, Mode.GENERATE):
        assert tiny.relative_error(forward(of_layer(config, mode), params), expected[0]) < 1e-13


@pytest.mark.parametrize("skip", [False, True])
def test_an_invalid_token_of_a_small_batch_gives_nan_and_changes_no_other(skip: bool, float64: None) -> None:
    """Three tokens, whose pairs are summed by hand. The middle one is invalid, so one token of three is dropped."""
    layer = create(layer_config(), jax.random.key(0)).blocks[0].ffn
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 3, D)))
    routing = route(jnp.array([[[0.0, 2.0, 1.0, -1.0], [0.0, np.nan, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]]]), 2)
    y, dropped = jax.jit(lambda x, routing: d.PerToken(skip).apply(x, routing, layer.experts))(x, routing)
    single = jax.jit(layer.experts.apply_single_expert)
    for token, (first, second) in ((0, (1, 2)), (2, (0, 3))):
        share = 1 / (1 + np.exp(-1))  # the chosen logits differ by 1
        parts = (single(x[0, token], jnp.int32(e)) for e in (first, second))
        expected = sum(gate * part for gate, part in zip((share, 1 - share), parts, strict=True))
        assert tiny.relative_error(y[0, token], expected) < 1e-14
    assert np.isnan(y[0, 1]).all()
    assert dropped == jnp.float32(1 / 3)


def test_pairs_at_once_as_on_a_gpu_are_pairs_in_turn(float64: None) -> None:
    """Three pairs, two of them of one expert."""
    layer = create(layer_config(), jax.random.key(0)).blocks[0].ffn
    rows = jnp.asarray(np.random.default_rng(3).normal(size=(3, layer.router.shape[0])))
    expert = jnp.array([1, 0, 1])
    single = jax.jit(layer.experts.apply_single_expert)
    in_turn = np.stack([single(row, e) for row, e in zip(rows, expert, strict=True)])
    assert tiny.relative_error(jax.jit(layer.experts._rows_at_once)(rows, expert), in_turn) < 1e-14


def test_many_blocks_are_one_function_too(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 3 rows each expert has several, the last of them partly empty. Evaluation takes the first ones
    side by side, and the others in turn."""
    monkeypatch.setattr("moe_jax.model.moe.layer.BLOCK_ROWS", 3)
    monkeypatch.setattr("moe_jax.model.moe.layer.inference_block_rows", lambda pairs, experts: 3)
    config = layer_config(dispatch="blocks")
    layer = create(config, jax.random.key(0)).blocks[0].ffn
    assert layer.dispatch_for(Mode.TRAIN, B, T) == d.Blocks(3)
    assert layer.dispatch_for(Mode.EVALUATE, B, T) == d.Blocks(3, in_place=True)
    params = ffn_params(config)
    dropless = plain(layer_config(factor=float(E)), params)[0]
    expected = forward_and_gradients(dropless, params)
    assert_equal_functions(forward_and_gradients(of_layer(config), params), expected)
    assert tiny.relative_error(forward(of_layer(config, Mode.EVALUATE), params), expected[0]) < 1e-13


def test_blocks_are_about_the_fair_share_of_an_expert() -> None:
    """128 tokens to 2 of 16 experts: 16 pairs each. The next power of two, from 8 to 128, or all."""
    assert [block_rows(pairs, 16) for pairs in (256, 258, 4096, 40)] == [16, 32, 128, 8]
    assert block_rows(4, 16) == 4


def test_blocks_of_evaluation_have_room_for_half_as_much_again() -> None:
    assert [inference_block_rows(pairs, 16) for pairs in (256, 258, 4096, 40, 4)] == [24, 32, 384, 8, 4]


@pytest.mark.parametrize("dispatch", ["capacity", "blocks"])
@pytest.mark.parametrize("block", [1, 128])
def test_no_gradient_of_the_layer_is_a_scatter_add(dispatch: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats are added in a fixed order, so a GPU computes the same bits each time. Blocks of one row are multiplied in
    turn, larger blocks by copies of the matrices."""
    monkeypatch.setattr("moe_jax.model.moe.layer.BLOCK_ROWS", block)
    layer, params = layer_function(layer_config(dispatch=dispatch))
    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    assert scatter_adds_of_floats(jax.jit(with_gradients(layer)).lower(params, x, x).as_text()) == []


def test_experts_start_distinct_and_with_the_named_variance() -> None:
    config = tiny.config(layers=2, width=64, expert_hidden=32, heads=4)
    model = create(config, jax.random.key(0))
    matrices = []
    for block in model.blocks:
        experts = block.ffn.experts
        for param, fan_in, scale in ((experts.w_in, 64, 1), (experts.w_gate, 64, 1), (experts.w_out, 32, 0.5)):
            w = np.asarray(param[...])
            # 8,192 numbers: the standard deviation is known to 1 / sqrt(2 * 8192) = 0.8 %.
            np.testing.assert_allclose(w.std(), scale / np.sqrt(fan_in), rtol=0.04)
            matrices += [w[e].tobytes() for e in range(4)]
    assert len(set(matrices)) == 2 * 3 * 4


def test_a_gate_of_bfloat16_rows_has_a_gradient_in_float32() -> None:
    """The gradient of a gate is a sum over the row. Rounded to bfloat16 it would be wrong by up to 2^-9."""
    rng = np.random.default_rng(0)
    rows, d_y = (jnp.asarray(rng.normal(size=(3, 200)), jnp.bfloat16) for _ in range(2))
    gate = jnp.asarray(rng.random(3), jnp.float32)
    y, back = jax.vjp(gated, rows, gate)
    assert (y.dtype, back(d_y)[1].dtype) == (jnp.bfloat16, jnp.float32)
    expected = (np.float64(rows) * np.float64(d_y)).sum(1)
    assert tiny.relative_error(back(d_y)[1], expected) < 1e-6
    assert tiny.relative_error(y, np.float64(rows) * np.float64(gate)[:, None]) < 2**-8


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_gated_activation_of_bfloat16_is_rounded_once(activation: Activation) -> None:
    """It and its gradients are within half a unit of the last place, 2^-8. The gradients are compared with differences
    of the same formula in float64."""
    rng = np.random.default_rng(0)
    count = 2 if activation == "swiglu" else 1
    *hidden, d_y = (jnp.asarray(rng.normal(size=(3, 200)), jnp.bfloat16) for _ in range(count + 1))
    gate = jnp.asarray(rng.random(3), jnp.float32)
    experts = Experts(1, 2, 2, activation, 1.0, nnx.Rngs(0))

    @jax.jit
    def run(hidden: list[jax.Array], gate: jax.Array, d_y: jax.Array) -> Any:
        y, back = jax.vjp(experts._activate, hidden, gate)
        return y, back(d_y)

    def exact(*hidden: np.ndarray) -> np.ndarray:
        x, last = hidden[0], hidden[-1]
        if activation == "swiglu":
            return x * last / (1 + np.exp(-last))
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    y, (d_hidden, d_gate) = run(hidden, gate, d_y)
    wide, d_wide, factor = [np.float64(x) for x in hidden], np.float64(d_y), np.float64(gate)[:, None]
    assert d_gate.dtype == jnp.float32
    np.testing.assert_allclose(d_gate, (exact(*wide) * d_wide).sum(1), rtol=1e-5)
    expected = [exact(*wide) * factor]
    for n in range(count):
        above, below = ([x + sign * 1e-6 * (n == m) for m, x in enumerate(wide)] for sign in (1, -1))
        expected.append((exact(*above) - exact(*below)) / 2e-6 * factor * d_wide)
    for found, right in zip([y, *d_hidden], expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(found), right, rtol=1.01 * 2**-8, atol=1e-7)

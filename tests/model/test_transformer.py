"""The whole model: causal under drops, rows independent, and one function however it is run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.certify.hlo import read_program, scopes
from moe_jax.config import TrainConfig
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import create, merge, split
from moe_jax.training.loss import training_loss
from tests.support import checks, tiny


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"experts": 3, "top_k": 3, "norm": "layernorm", "bias": True, "positions": "learned", "qk_norm": "head"},
            marks=pytest.mark.slow,
        ),
        {"heads": 4, "kv_heads": 2, "head_size": 6, "qk_norm": "full", "renormalise_gates": False},
    ],
    ids=["K=E", "grouped"],
)
def test_other_models_are_causal_too(changes: dict) -> None:
    checks.check_causal(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1, "positions": "learned", "qk_norm": "head", "scaled_embedding": True, "tied_head": False},
        pytest.param({"dense": "total"}, marks=pytest.mark.slow),
        {"layers": 1, "shared_experts": 2, "shared_gate": True, "qkv_bias": True},
    ],
    ids=str,
)
def test_cached_decoding(changes: dict) -> None:
    checks.check_cached_decoding(**changes)


def test_the_cache_holds_the_key_heads_only() -> None:
    graphdef, params = tiny.build(tiny.config(heads=4, kv_heads=1, head_size=6))
    cache = jax.eval_shape(lambda p, t: merge(graphdef, p)(t, Mode.GENERATE)[2], params, tiny.tokens(3, tiny.T))
    assert {(layer.key.shape, layer.value.shape) for layer in cache} == {((3, 1, 6, tiny.T), (3, 1, tiny.T, 6))}


@pytest.mark.parametrize("qk_norm", ["none", "head"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_matrix_draws_its_own_key_in_a_fixed_order(tied: bool, qk_norm: str) -> None:
    """Key n of a model is fold_in(key, n): embedding 0, qkv 1, then out, unless it is a copy, and router. A change of
    this order would change the numbers of every preset."""
    config = tiny.config(layers=1, tie_value_output_init=tied, qk_norm=qk_norm)
    params = split(create(config, jax.random.key(3)))[1]

    def drawn(n: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(3), n), shape)

    block = params["blocks"][0]
    np.testing.assert_array_equal(params["embedding"], drawn(0, 13, 8) / math.sqrt(8))
    qkv = drawn(1, 8, 24) * (1 / math.sqrt(8))
    np.testing.assert_array_equal(block["attention"]["qkv"], qkv)
    out = qkv[:, 16:].T if tied else drawn(2, 8, 8) * (1 / math.sqrt(2) / math.sqrt(8))
    np.testing.assert_array_equal(block["attention"]["out"], out)
    np.testing.assert_array_equal(block["ffn"]["router"], drawn(3 - tied, 8, 4) * (0.1 / math.sqrt(8)))


def test_residual_branches_that_start_at_zero_pass_the_scaled_embedding_through() -> None:
    """The stream is the scaled embedding rows: entries of size 1, and a norm that hardly acts."""
    config = tiny.config(width=64, vocab_size=256, tied_head=False, scaled_embedding=True, zero_init_residual=True)
    model = create(config, jax.random.key(0))
    tokens = jnp.asarray(tiny.tokens(4, tiny.T, vocabulary=256))
    stream = np.asarray(model.embedding[...])[np.asarray(tokens)] * 8  # the root of 64
    assert 0.95 < stream.std() < 1.05
    hidden = jax.jit(lambda t: model(t, Mode.TRAIN)[0])(tokens)
    expected = stream / np.sqrt(np.square(stream).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(hidden, expected, rtol=1e-5)


def test_remat_recomputes_the_experts_first_product_and_no_decision() -> None:
    """Of the experts two products forward, four backward, and the first once more: the gradient of a gate needs no
    expert's output. Of the router one forward and two backward: its decisions are kept."""
    config = tiny.config(layers=1, activation="gelu", capacity_factor=2.0)
    graphdef, params = tiny.build(config, remat=True)

    def loss(params):
        model = merge(graphdef, params)
        return model(jnp.asarray(tiny.tokens(2, tiny.T)), Mode.TRAIN)[0].sum()

    lowered = jax.jit(jax.grad(loss)).lower(params)
    program = read_program(lowered.compile().as_text())
    assert sum(dot.runs for dot in program.dots if "experts" in scopes(dot.op_name)) == 7
    assert sum(dot.runs for dot in program.dots if "router" in scopes(dot.op_name)) == 3
    assert lowered.as_text().count("chlo.top_k") == 1


def test_rematerialised_gradients_have_the_same_bits() -> None:
    config = tiny.config(layers=1)
    tokens = jnp.asarray(tiny.tokens(2, tiny.T + 1))

    def gradient(remat: bool):
        graphdef, params = tiny.build(config, remat=remat)

        def loss(p):
            return training_loss(merge(graphdef, p), tokens, None, TrainConfig())[0]

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
        return jax.jit(jax.value_and_grad(loss))(params), jaxpr.count("checkpoint[") + jaxpr.count("remat2[")

    (plain, plain_has), (rematerialised, remat_has) = gradient(False), gradient(True)
    assert remat_has > plain_has  # the activation within an expert is always recomputed
    tiny.assert_same_bits(rematerialised, plain)


def test_bfloat16_stays_near_float32() -> None:
    """All experts are chosen, so that no rounding can change a choice. bfloat16 keeps 8 bits: each of the about 12
    roundings in a row (2 layers, 6 products each) is at most 2^-9, so 12 * 2^-9 = 2.3 % of the norm bounds them."""
    config = tiny.config(top_k=4, capacity_factor=1.0)
    tokens = tiny.tokens(2, tiny.T)

    def hidden(compute: str) -> np.ndarray:
        graphdef, params = tiny.build(config, compute=compute)
        return np.asarray(jax.jit(lambda t: merge(graphdef, params)(t, Mode.TRAIN)[0])(tokens), np.float64)

    wide, narrow = hidden("float32"), hidden("bfloat16")
    error = np.linalg.norm(wide - narrow) / np.linalg.norm(wide)
    assert 2**-11 < error < 12 * 2**-9


def test_an_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 0"):
        create(tiny.config(vocab_size=0), jax.random.key(0))

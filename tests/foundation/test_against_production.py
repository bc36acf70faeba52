"""What the chapters from 10 on derive is what `moe_jax` computes: the same numbers from both."""

import json
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from foundation import (
    adafactor,
    balancing,
    byte_pairs,
    caching,
    costs,
    flash_attention,
    low_rank,
    micro_batches,
    moe,
    optimizers,
    positions,
    rounding,
    sampling,
    small_weights,
)
from foundation.losses import IGNORE
from foundation.parity import max_relative_error
from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.config.rope import ORIGINAL, scaled_rotation
from moe_jax.data.batches import MaskedBatch
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inference.sampling import Sampling, adjusted_logits
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.kernels import causal_attention
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy
from moe_jax.model.low_rank import LowRank, merged
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing, adjusted_bias, balance_loss, queue_positions, route
from moe_jax.model.precision import stochastic_round
from moe_jax.model.quantized import quantize
from moe_jax.model.transformer import build_layer
from moe_jax.system.random_keys import sequence_keys
from moe_jax.training.initial_weights import copy_dense_params
from moe_jax.training.optimizers.adafactor import scale_by_adafactor
from moe_jax.training.optimizers.factory import make_optimizer
from tests.support import short_form
from tests.support.leaky import leaky_queue_positions, with_all_experts


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def test_adafactor_steps_as_production_does() -> None:
    rule, start = scale_by_adafactor(), normal(0, 6, 4)
    state, ours, our_state = rule.init(start), start, adafactor.adafactor_init(start)
    theirs = start
    for n in range(4):
        grad = normal(1 + n, 6, 4) * 3.0**n  # growing, so that steps are clipped
        update, state = rule.update(grad, state, theirs)
        theirs = theirs - 0.1 * update
        ours, our_state = adafactor.adafactor_update(grad, our_state, ours, 0.1)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)  # production keeps its decay in float32


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adamw_and_muon_step_as_production_does(kind: str) -> None:
    """A matrix of a block, at a constant learning rate. It has as many rows as columns, so that Muon's scale is 1."""
    config = TrainConfig(
        optimizer=kind, lr=0.1, muon_lr=0.1, weight_decay=0.2, warmup_steps=0, final_lr_ratio=1.0, steps=10
    )
    rule = make_optimizer(config)
    theirs: Any = {"blocks": {"attention": {"kernel": normal(0, 5, 5)}}}
    ours, state = normal(0, 5, 5), rule.init(theirs)
    our_state: Any = optimizers.adam_init(ours) if kind == "adamw" else optimizers.muon_init(ours)
    for n in range(4):
        grad = normal(1 + n, 5, 5)
        updates, state = rule.update({"blocks": {"attention": {"kernel": grad}}}, state, theirs, step=n)
        theirs = optax.apply_updates(theirs, updates)
        if kind == "adamw":
            ours, our_state = optimizers.adam_update(
                grad, our_state, ours, 0.1, config.beta1, config.beta2, config.eps, config.weight_decay
            )
        else:
            ours, our_state = optimizers.muon_update(grad, our_state, ours, 0.1, weight_decay=config.weight_decay)
        np.testing.assert_allclose(ours, theirs["blocks"]["attention"]["kernel"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rate", short_form([0.0, 0.25], [0.25]))
def test_recomputed_attention_has_the_gradients_of_the_tiles(rate: float) -> None:
    """Production takes whole rows of weights and blocks of queries; the chapter takes tiles of keys."""
    q, k, v, d_o = (normal(i, 2, 3, 9, 4) for i in range(4))
    keys = sequence_keys(jax.random.key(5), 2)

    def production(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention.causal_attention(q, k, v, rate, keys, "recomputed")

    keep = causal_attention._dropout_mask(q, rate, keys, jnp.int32(0), 9)[:, :, :9] if rate else None

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, Any]:
        theirs, gradient = jax.vjp(production, q, k, v)
        ours, cache = flash_attention.flash_attention_forward(q, k, v, keep, rate, True, 4)
        return (ours, flash_attention.flash_attention_backward(d_o, cache)), (theirs, gradient(d_o))

    ours, theirs = jax.jit(both)(q, k, v)
    assert max_relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("rule", ["token", "choice", "batch", "expert"])
def test_production_gives_its_slots_to_the_same_tokens(rule: str, factor: float) -> None:
    logits = normal(6, 1, 12, 4)
    probs = jax.nn.softmax(logits)
    gate, chosen = jax.lax.top_k(probs, 2)
    routing = Routing(logits=logits, probs=probs, expert_index=chosen, gate=gate, valid=jnp.ones((1, 12), bool))
    if rule == "token":
        places = queue_positions(chosen, routing.valid, 4)
    else:
        routing = with_all_experts(routing) if rule == "expert" else routing
        name: Any = {"choice": "choice-major", "batch": "batch-priority", "expert": "expert-choice"}[rule]
        places = leaky_queue_positions(routing, f"leaky-{name}")
    kept = places < moe.capacity(12, 4, 2, factor)
    theirs = (jax.nn.one_hot(routing.expert_index, 4, dtype=bool) & kept[..., None]).any(2)
    np.testing.assert_array_equal(caching.kept_choices(probs[0], 2, factor, rule), theirs[0])


def test_masked_micro_batches_have_the_loss_and_the_gradient_of_one_batch() -> None:
    """Weights of production, on logits that are the hidden stream times an identity."""
    logits, targets = normal(7, 4, 3, 5), jax.random.randint(jax.random.key(8), (4, 3), 0, 5)
    targets = targets.at[0].set(IGNORE).at[1, 1:].set(IGNORE)
    ours, cache = micro_batches.accumulated_loss_forward(logits, targets, 2)
    counted = np.asarray(targets != IGNORE).reshape(2, 2, 3)
    weights = jnp.asarray(MaskedBatch.of(np.zeros((2, 2, 4), np.int32), counted).weights, jnp.float64)

    def production(logits: jax.Array) -> jax.Array:
        parts = zip(logits.reshape(2, 6, 5), jnp.maximum(targets, 0).reshape(2, 6), weights.reshape(2, 6), strict=True)
        return sum(mean_cross_entropy(z, jnp.eye(5), wanted, None, w) for z, wanted, w in parts) / 2  # type: ignore[return-value]

    loss, gradient = jax.jit(jax.value_and_grad(production))(logits)
    assert float(loss) == pytest.approx(float(ours), rel=1e-6)  # its weights are float32
    by_hand = micro_batches.accumulated_loss_backward(jnp.ones(()), cache)
    np.testing.assert_allclose(by_hand, gradient, rtol=1e-6, atol=1e-9)


def test_the_balance_loss_of_production_is_the_one_by_sequence() -> None:
    logits = normal(9, 4, 6, 3)
    probs = jax.nn.softmax(logits)
    gate, chosen = jax.lax.top_k(probs, 2)
    routing = Routing(logits=logits, probs=probs, expert_index=chosen, gate=gate, valid=jnp.ones((4, 6), bool))
    by_sequence, _ = micro_batches.grouped_balance_forward(probs, chosen, 4)
    by_batch, _ = micro_batches.grouped_balance_forward(probs, chosen, 1)
    assert float(balance_loss(routing)) == pytest.approx(float(by_sequence), rel=1e-12)
    assert float(balance_loss(routing)) != pytest.approx(float(by_batch), rel=1e-3)


@pytest.mark.parametrize(("top_k", "least", "most"), short_form([(2, 0.0, 1e-13), (1, 1e-2, 1e9)], [(2, 0.0, 1e-13)]))
def test_an_upcycled_router_of_production_gets_nothing_where_k_is_above_1(
    top_k: int, least: float, most: float
) -> None:
    """Copies by `copy_dense_params`, in the real layer without drops."""
    small = {"width": 8, "heads": 2, "experts": 4, "expert_hidden": 6, "layers": 1, "vocab_size": 11, "seq_len": 10}
    config = ModelConfig(**small).with_routing(top_k=top_k, dispatch="blocks")
    layer = build_layer(config, nnx.Rngs(params=jax.random.key(10)), MoE)
    graphdef, state = nnx.split(layer)
    params = nnx.to_pure_dict(state)
    dense = {name: normal(11 + i, 1, *leaf.shape[1:]) for i, (name, leaf) in enumerate(params["experts"].items())}
    fresh = {"experts": params["experts"], "router": normal(20, *params["router"].shape)}
    copied: Any = copy_dense_params({"ffn": fresh}, {"ffn": {"experts": dense}})["ffn"]
    x, d_y = normal(21, 2, 10, 8), normal(22, 2, 10, 8)

    def output(copied: Any) -> jax.Array:
        return jnp.vdot(d_y, nnx.merge(graphdef, nnx.State({**params, **copied}))(x, Mode.TRAIN)[0])

    gradient = jax.jit(jax.grad(output))(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), copied))
    largest = float(jnp.max(jnp.abs(gradient["router"])))
    assert least <= largest <= most
    assert float(jnp.max(jnp.abs(gradient["experts"]["w_out"]))) > 1e-2


@pytest.mark.parametrize(("width", "base", "factor", "trained"), [(128, 5e5, 8.0, 8192), (8, 50.0, 4.0, 16)])
def test_production_slows_the_same_pairs(width: int, base: float, factor: float, trained: int) -> None:
    numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: trained}
    theirs, _ = scaled_rotation(json.dumps({"rope_type": "llama3", **numbers}), base, width)
    np.testing.assert_allclose(positions.slowed_pairs(width, factor, trained, base), theirs, rtol=1e-12)


def test_production_counts_the_same_operations() -> None:
    config = ModelConfig(width=8, heads=2, layers=2, vocab_size=11, seq_len=5, expert_hidden=6, dense="active")
    multiplied = totals(count_parameters(config)).multiplied
    ours, _ = costs.step_flops(2, 8, config.dense_hidden, 11, 3, 5)
    assert ours == 6 * multiplied * 3 * 5


def test_adapters_of_production_have_the_same_gradients() -> None:
    """The module's own A and B, and the weights that it merges."""
    x, kernel, a, b, d_y = (
        normal(30, 2, 6, 8),
        normal(31, 8, 5),
        normal(32, 8, 2),
        normal(33, 2, 5),
        normal(34, 2, 6, 5),
    )

    def production(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        adapter = LowRank(nnx.Param(kernel), 2, 1.5)
        adapter.a, adapter.b = nnx.Param(a), nnx.Param(b)
        rows = x.reshape(-1, 8)
        return (rows @ kernel + adapter(rows)).reshape(d_y.shape)

    theirs, back = jax.vjp(production, x, a, b)
    ours, cache = low_rank.low_rank_forward(x, a, b, kernel, 1.5)
    assert max_relative_error((ours, low_rank.low_rank_backward(d_y, cache)), (theirs, back(d_y))) < 1e-12
    one = merged({"w": kernel}, {"w_lora": {"a": a, "b": b}}, 1.5)["w"]
    np.testing.assert_allclose(low_rank.merged(kernel, a, b, 1.5), one, rtol=1e-12)


@pytest.mark.parametrize("settings", [(0.7, 0, 1.0, 0.0), (1.0, 3, 0.8, 0.0), (1.3, 5, 0.95, 0.1), (0.0, 0, 1.0, 0.0)])
def test_production_samples_from_the_same_law(settings: tuple[float, int, float, float]) -> None:
    logits = 1.5 * normal(23, 9)
    theirs = jax.nn.softmax(adjusted_logits(logits[None], Sampling(*settings), jnp.zeros((1, 9), bool)))[0]
    np.testing.assert_allclose(sampling.filtered_law(logits, *settings), theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("top_k", [2, 3])
def test_production_balances_by_the_same_bias(top_k: int) -> None:
    logits, bias = normal(24, 1, 9, 4), 0.1 * normal(25, 4)
    routing = route(logits, top_k, bias)
    chosen, gates = balancing.biased_choice(jax.nn.softmax(logits[0]), bias, top_k)
    theirs = jnp.sum(jax.nn.one_hot(routing.expert_index[0], 4) * routing.gate[0, ..., None], axis=1)
    np.testing.assert_allclose(gates, theirs, rtol=1e-12, atol=1e-15)
    fraction = balancing.choice_fraction(chosen)
    np.testing.assert_allclose(
        balancing.bias_step(bias, fraction, 0.01), adjusted_bias(bias, fraction, 0.01), rtol=1e-12
    )


def test_production_rounds_by_the_same_carry() -> None:
    """The same 16 random bits give the same bfloat16, of both signs and of all magnitudes."""
    key = jax.random.key(26)
    x = (normal(27, 4096) * 10.0 ** jnp.linspace(-30.0, 30.0, 4096)).astype(jnp.float32)
    draw = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    theirs = jax.lax.bitcast_convert_type(stochastic_round(x, key), jnp.uint16)
    np.testing.assert_array_equal(rounding.drawn_bits(rounding.bits_of(x), draw), theirs)


def test_production_cuts_a_word_into_the_same_pieces() -> None:
    """A tokenizer of the pairs that chapter 20 learns, applied by the library that production uses."""
    text = "the king and the queen of the north sing in the morning and in the evening"
    words = Counter(tuple(f" {word}".encode()) for word in text.split())
    pairs = byte_pairs.learn(words, 60)
    tokenizer = Tokenizer({"kind": "bpe", "merges": [list(pair) for pair in pairs]})
    for word in (*text.split(), "kingfisher", "thinking", "xylophone"):
        ids = tokenizer.encode(f" {word}")
        assert tuple(int(i) for i in ids) == byte_pairs.encode(f" {word}".encode(), pairs)


def test_production_stores_the_same_codes_of_8_bits() -> None:
    """Of an expert's stack of matrices too. In 4 bits production rounds the scale to bfloat16 first. A compiled program
    may multiply by 1 / 127 where the other divides by 127: the scales are one unit in the last place apart."""
    w = normal(28, 3, 64, 5).at[1, :, 2].set(0.0)
    stored = quantize({"w_in": w.astype(jnp.float32)}, "int8")["w_in"]
    for expert in range(3):
        codes, scale = small_weights.quantize(w[expert].astype(jnp.float32), 127, 64)
        np.testing.assert_array_equal(codes, stored.codes[expert])
        np.testing.assert_array_max_ulp(scale, stored.scale[expert], maxulp=1)

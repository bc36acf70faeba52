"""Forward passes against the framework's own, and the conventions that a gradient check cannot see.

A backward pass that is right for a wrong forward pass agrees with autodiff: these tests judge the forward
pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from foundation import (
    activations,
    attention,
    experts,
    grouped_heads,
    initializers,
    losses,
    moe,
    norms,
    positions,
    preferences,
    router,
    softmax,
)

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def compiled(function: Callable, *operands: Any) -> Any:
    """The results of a function as one program. One at a time, each of its operations would be compiled."""
    return jax.jit(lambda *operands: function(*operands))(*operands)


def test_activations_equal_jax_nn() -> None:
    x = 4.0 * normal(0, 50)
    references = {
        "tanh": jnp.tanh,
        "sigmoid": jax.nn.sigmoid,
        "relu": jax.nn.relu,
        "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu": lambda x: jax.nn.gelu(x, approximate=True),
        "silu": jax.nn.silu,
    }
    assert references.keys() == activations.ACTIVATIONS.keys()
    for name, (forward, _) in activations.ACTIVATIONS.items():
        np.testing.assert_allclose(forward(x)[0], references[name](x), **TIGHT, err_msg=name)


def test_softmax_and_losses_equal_jax_and_optax() -> None:
    logits, targets = 5.0 * normal(1, 3, 4, 6), jax.random.randint(jax.random.key(2), (3, 4), 0, 6)
    np.testing.assert_allclose(softmax.softmax_forward(logits)[0], jax.nn.softmax(logits), **TIGHT)
    np.testing.assert_allclose(softmax.logsumexp_forward(logits)[0], jax.nn.logsumexp(logits, axis=-1), **TIGHT)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(losses.cross_entropy_forward(logits, targets)[0], each.mean(), **TIGHT)
    # One position of twelve ignored: the mean is over the other eleven, and its own gradient is exactly 0.
    ignored = targets.at[1, 2].set(losses.IGNORE)
    loss, cache = losses.cross_entropy_forward(logits, ignored)
    np.testing.assert_allclose(loss, (each.sum() - each[1, 2]) / 11, **TIGHT)
    unmoved = (losses.cross_entropy_backward(jnp.ones(()), cache) == 0.0).all(-1)
    np.testing.assert_array_equal(unmoved, ignored == losses.IGNORE)


def test_norms_equal_flax() -> None:
    x, scale, bias = 3.0 * normal(4, 2, 3, 8) + 1.0, normal(5, 8), normal(6, 8)
    layer = nnx.LayerNorm(
        8, epsilon=1e-5, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64, use_fast_variance=False
    )
    layer.scale[...], layer.bias[...] = scale, bias  # type: ignore[index]
    np.testing.assert_allclose(norms.layernorm_forward(x, scale, bias)[0], layer(x), **TIGHT)
    rms = nnx.RMSNorm(8, epsilon=1e-6, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)
    rms.scale[...] = scale  # type: ignore[index]
    np.testing.assert_allclose(norms.rmsnorm_forward(x, scale)[0], rms(x), **TIGHT)


def test_rope_scores_see_only_the_distance() -> None:
    q, k = (jnp.broadcast_to(normal(seed, 1, 8), (6, 8)) for seed in (9, 10))  # the same at every position
    scores = positions.rope_forward(q)[0] @ positions.rope_forward(k)[0].T
    for distance in range(-5, 6):
        diagonal = jnp.diagonal(scores, offset=distance)
        np.testing.assert_allclose(diagonal, diagonal[0], **TIGHT)
    assert abs(scores[3, 0] - scores[0, 3]) > 1e-3  # but it does see the direction


@pytest.mark.parametrize(("base", "slow"), [((), 100), ((100.0,), 10)])
def test_rope_turns_the_first_pair_by_one_radian_a_position_anticlockwise(base: tuple, slow: int) -> None:
    """A = 4: the pairs are (0, 2) and (1, 3), the first at frequency 1, the second at 1 / sqrt(base)."""
    y = positions.rope_forward(jnp.tile(jnp.array([1.0, 1.0, 0.0, 0.0]), (3, 1)), *base)[0]
    expected = [[np.cos(t), np.cos(t / slow), np.sin(t), np.sin(t / slow)] for t in range(3)]
    np.testing.assert_allclose(y, expected, **TIGHT)


def test_shared_key_heads_are_equal_columns() -> None:
    """Four heads on two key heads: as if neighbours had the same columns of keys and values."""
    q, k, v = normal(20, 8, 12), normal(21, 8, 6), normal(22, 8, 6)
    x, out = normal(23, 2, 5, 8), {"kernel": normal(24, 12, 8)}
    own = [jnp.repeat(part.reshape(8, 2, 3), 2, axis=1).reshape(8, 12) for part in (k, v)]
    shared = {"qkv": {"kernel": jnp.concatenate([q, k, v], axis=1)}, "out": out}
    copied = {"qkv": {"kernel": jnp.concatenate([q, *own], axis=1)}, "out": out}
    ours, theirs = (compiled(lambda p: attention.multi_head_forward(x, p, 4)[0], params) for params in (shared, copied))
    np.testing.assert_allclose(ours, theirs, **TIGHT)


@pytest.mark.parametrize("together", [False, True])
def test_normalised_queries_have_a_mean_square_of_one(together: bool) -> None:
    """With scales of 1: each head by itself, or all heads together, and then not each."""
    x = normal(25, 2, 3, 8) * jnp.array([1.0] * 4 + [5.0] * 4)
    y, _ = grouped_heads.normalise_heads_forward(x, jnp.ones(8 if together else 4), 0.0)
    of_heads = np.square(np.asarray(y)).reshape(2, 3, 2, 4).mean(-1)
    np.testing.assert_allclose(of_heads.mean(-1), np.ones((2, 3)), **TIGHT)
    assert (np.abs(of_heads - 1).max() < 1e-9) == (not together)


def test_multi_head_attention_equals_flax() -> None:
    width, heads = 8, 2
    x = normal(11, 2, 5, width)
    layer = nnx.MultiHeadAttention(
        heads, width, decode=False, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64
    )
    parts = {name: normal(12 + i, width, width) for i, name in enumerate(("query", "key", "value"))}
    biases = {name: normal(15 + i, width) for i, name in enumerate(("query", "key", "value"))}
    for name in parts:
        getattr(layer, name).kernel[...] = parts[name].reshape(width, heads, width // heads)
        getattr(layer, name).bias[...] = biases[name].reshape(heads, width // heads)
    out, out_bias = normal(18, width, width), normal(19, width)
    layer.out.kernel[...] = out.reshape(heads, width // heads, width)  # type: ignore[index]
    layer.out.bias[...] = out_bias  # type: ignore[index]
    params = {
        "qkv": {
            "kernel": jnp.concatenate(list(parts.values()), axis=1),
            "bias": jnp.concatenate(list(biases.values())),
        },
        "out": {"kernel": out, "bias": out_bias},
    }
    ours, _ = attention.multi_head_forward(x, params, heads)
    # Sowing the weights takes Flax's plain path; its default one computes the softmax in float32 whatever the type.
    theirs = layer(x, mask=nnx.make_causal_mask(jnp.ones((2, 5))), sow_weights=True)
    np.testing.assert_allclose(ours, theirs, **TIGHT)


def test_attention_row_that_sees_nothing_is_zero() -> None:
    mask = jnp.array([[True, False], [False, False]])
    q, k, v = (normal(seed, 2, 3) for seed in (20, 21, 22))
    o, _ = attention.attention_forward(q, k, v, mask)
    np.testing.assert_allclose(o[0], v[0], **TIGHT)
    assert (o[1] == 0.0).all()


def test_experts_equal_one_network_after_another() -> None:
    u, w_gate, w_in, w_out = (
        normal(23, 2, 3, 4, 5),
        normal(24, 3, 5, 6),
        normal(25, 3, 5, 6),
        normal(26, 3, 6, 5),
    )
    gelu, _ = experts.gelu_experts_forward(u, w_in, w_out)
    swiglu, _ = experts.swiglu_experts_forward(u, w_gate, w_in, w_out)
    for e in range(3):
        np.testing.assert_allclose(gelu[:, e], jax.nn.gelu(u[:, e] @ w_in[e]) @ w_out[e], **TIGHT)
        hidden = jax.nn.silu(u[:, e] @ w_gate[e]) * (u[:, e] @ w_in[e])
        np.testing.assert_allclose(swiglu[:, e], hidden @ w_out[e], **TIGHT)


def moe_by_loops(x: np.ndarray, params: dict, top_k: int, places: int) -> tuple[np.ndarray, float, float, int]:
    """The layer by loops over tokens in NumPy: outputs, balance loss, z-loss, dropped choices."""
    p = {name: np.asarray(value) for name, value in params.items()}
    total = p["router"].shape[1]
    y, balances, squares, dropped = np.zeros_like(x), [], [], 0
    for b in range(x.shape[0]):
        taken, counts, mean_p = np.zeros(total, int), np.zeros(total), np.zeros(total)
        for t in range(x.shape[1]):
            logits = x[b, t] @ p["router"]
            probabilities = np.exp(logits) / np.exp(logits).sum()
            mean_p += probabilities / x.shape[1]
            squares.append(np.log(np.exp(logits).sum()) ** 2)
            chosen = np.argsort(-logits, kind="stable")[:top_k]
            share = probabilities[chosen].sum() if top_k > 1 else 1.0
            for e in chosen:
                counts[e] += 1
                if taken[e] == places:
                    dropped += 1
                    continue
                taken[e] += 1
                gate = x[b, t] @ p["w_gate"][e]
                hidden = gate / (1 + np.exp(-gate)) * (x[b, t] @ p["w_in"][e])
                y[b, t] += probabilities[e] / share * (hidden @ p["w_out"][e])
        balances.append(total * (counts / counts.sum() * mean_p).sum())
    return y, float(np.mean(balances)), float(np.mean(squares)), dropped


@pytest.mark.parametrize(("top_k", "factor", "places"), [(2, 2.0, 8), (2, 0.5, 2), (1, 1.0, 2), (3, 0.01, 1)])
def test_moe_layer_equals_loops_over_tokens(top_k: int, factor: float, places: int) -> None:
    x, total = normal(27, 2, 8, 5), 4
    assert moe.capacity(8, total, top_k, factor) == places
    params = {
        "router": normal(28, 5, total),
        "w_gate": normal(29, total, 5, 3),
        "w_in": normal(30, total, 5, 3),
        "w_out": normal(31, total, 3, 5),
    }
    output = compiled(lambda x, params: moe.moe_forward(x, params, top_k, factor)[0], x, params)
    y, balance, z, dropped = moe_by_loops(np.asarray(x), params, top_k, places)
    np.testing.assert_allclose(output.y, y, **TIGHT)
    np.testing.assert_allclose(output.balance, balance, **TIGHT)
    np.testing.assert_allclose(output.z, z, **TIGHT)
    assert round(float(output.dropped) * 2 * 8 * top_k) == dropped
    assert (dropped > 0) == (factor < 2.0)


def test_slots_worked_by_hand() -> None:
    # Three experts of two places. Expert 2 is chosen by tokens 0, 1, 2 (as their second, first, first choice):
    # token by token, so tokens 0 and 1 get its places 0 and 1 and token 2 is dropped. Its other choice stands.
    chosen = jnp.array([[[0, 2], [2, 1], [2, 0], [1, 0]]])
    slot, keep = moe.assign_slots(chosen, 3, 2)
    np.testing.assert_array_equal(keep[0], [[True, True], [True, True], [False, True], [True, False]])
    nowhere = 6
    np.testing.assert_array_equal(slot[0], [[0, 4], [5, 2], [nowhere, 1], [3, nowhere]])


@pytest.mark.parametrize("name", initializers.INITIALIZERS)
def test_initializers_have_the_variance_that_they_predict(name: str) -> None:
    shape = (400, 300)
    kernel = initializers.initialised(name, jax.random.key(0), shape)
    predicted = initializers.predicted_variance(name, shape)
    # The variance of 120,000 draws is off by less than 2 % with five standard deviations to spare.
    np.testing.assert_allclose(jnp.var(kernel), predicted, rtol=0.02, atol=0.0)
    assert abs(jnp.mean(kernel)) <= 5.0 * (predicted / kernel.size) ** 0.5


def test_dpo_is_at_rest_where_rewards_tilt_the_reference() -> None:
    """Over all pairs, each as often as it is preferred, the loss is stationary at pi = ref exp(r / beta) / Z."""
    beta, count = 0.4, 5
    reward, log_ref = jax.random.normal(jax.random.key(0), (2, count), jnp.float64)
    log_pi = jax.nn.log_softmax(log_ref + reward / beta)
    w, loser = jnp.indices((count, count)).reshape(2, -1)
    preferred = jax.nn.sigmoid(reward[w] - reward[loser])
    total = jnp.zeros(count)
    for at in range(count * count):
        pair = w[at : at + 1], loser[at : at + 1]
        reference = jnp.stack([log_ref[pair[0]], log_ref[pair[1]]])
        _, cache = preferences.dpo_forward(log_pi[pair[0]], log_pi[pair[1]], reference, beta)
        d_chosen, d_rejected = preferences.dpo_backward(preferred[at], cache)
        total = total.at[pair[0]].add(d_chosen).at[pair[1]].add(d_rejected)
    np.testing.assert_allclose(total, 0.0, atol=1e-14)


def test_k1_as_a_loss_pulls_nowhere_and_all_three_estimators_have_their_means() -> None:
    texts = preferences.all_texts(3, 2)
    logits, reference = jax.random.normal(jax.random.key(1), (2, 4, 3), jnp.float64)
    log_pi, cache = preferences.text_log_probs_forward(logits, texts)
    log_ref, _ = preferences.text_log_probs_forward(reference, texts)
    pi, rho = jnp.exp(log_pi), jnp.exp(log_ref - log_pi)
    np.testing.assert_allclose(preferences.text_log_probs_backward(pi, cache), 0.0, atol=1e-15)
    kl, _ = preferences.kl_forward(logits, reference, texts)
    np.testing.assert_allclose(jnp.sum(pi * -jnp.log(rho)), kl, **TIGHT)
    np.testing.assert_allclose(jnp.sum(pi * (rho - 1.0 - jnp.log(rho))), kl, **TIGHT)
    assert abs(float(jnp.sum(pi * jnp.log(rho) ** 2 / 2)) - float(kl)) > 0.01 * float(kl)


def test_gates_of_top_1_are_p_and_of_top_2_sum_to_one() -> None:
    x, kernel = normal(32, 1, 5, 4), normal(33, 4, 6)
    p = jax.nn.softmax(x @ kernel)
    top1, _ = router.router_forward(x, kernel, 1)
    np.testing.assert_allclose(top1.gates[..., 0], p.max(axis=-1), **TIGHT)
    best = jnp.sort(p, axis=-1)[..., ::-1][..., :2]
    for renormalise, gates in ((True, best / best.sum(axis=-1, keepdims=True)), (False, best)):
        top2, _ = router.router_forward(x, kernel, 2, renormalise)
        np.testing.assert_allclose(top2.gates, gates, **TIGHT)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_one_at_perfect_balance(top_k: int) -> None:
    # Token t prefers experts t, t+1, ... (mod 4) by logits that are a rotation of each other.
    logits = jnp.stack([jnp.roll(jnp.array([4.0, 3.0, 2.0, 1.0]), t) for t in range(4)])
    routing, _ = router.router_forward(jnp.eye(4)[None], logits, top_k)
    np.testing.assert_allclose(routing.balance, 1.0, **TIGHT)


@pytest.mark.parametrize(
    ("tokens", "total", "top_k", "factor", "places"),
    [(8, 4, 2, 1.0, 4), (8, 4, 2, 1.25, 5), (100, 10, 10, 1.1, 100), (100, 10, 1, 1.1, 11), (8, 4, 1, 0.01, 1),
     (3, 8, 1, 1.0, 1), (8, 4, 2, 9.0, 8), (1000, 10, 1, 1.1, 110)],
)  # fmt: skip
def test_capacity_table(tokens: int, total: int, top_k: int, factor: float, places: int) -> None:
    # 1.1 x 1000 / 10 is 110; in binary floating point it is a little more, and would round up to 111.
    assert moe.capacity(tokens, total, top_k, factor) == places

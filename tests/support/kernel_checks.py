"""Checks of dispatch and kernels, which must catch the bugs of `tests/support/planted_kernels.py`."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.certify.arithmetic import layer_function, with_gradients
from moe_jax.model import kernels as cut
from moe_jax.model.kernels import causal_attention as attention_kernel
from moe_jax.model.kernels import cross_entropy, embedding_lookup
from moe_jax.model.kernels import grouped_matmul as grouped
from moe_jax.model.kernels.causal_attention import causal_attention
from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from moe_jax.model.moe.dispatch import Blocks
from moe_jax.model.moe.layer import MoE
from moe_jax.model.transformer import build_layer
from tests.support import oracles, plain_kernels, tiny
from tests.support.one_hot import OneHotMoE


def check_dispatch_gradients() -> None:
    """Under drops, in float64: every gradient of the layer equals jax's own through one-hot masks and einsums."""
    config = tiny.config(layers=1)
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        forms = {cls: layer_function(config, cls) for cls in (MoE, OneHotMoE)}
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), forms[MoE][1])
        x, cotangent = jnp.asarray(rng.normal(size=(2, 3, tiny.T, config.width)))
        (y, ours), (expected, plain) = (
            jax.jit(with_gradients(forward))(params, x, cotangent) for forward, _ in forms.values()
        )
        assert tiny.relative_error(y, expected) < 1e-13
        errors = tiny.gradient_errors(ours, plain)
        assert max(errors.values()) < 1e-12, errors


def check_blocks() -> None:
    """Blocks of 3 rows, several for each expert, with copied weights and in place, against NumPy loops."""
    config = tiny.config(layers=1)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2, tiny.T, config.width))
    with jax.enable_x64(True):
        layer = build_layer(config, nnx.Rngs(params=jax.random.key(0)))
        experts = layer.experts
        for param in (layer.router, experts.w_in, experts.w_gate, experts.w_out):
            param[...] = jnp.asarray(rng.normal(size=param.shape))
        weights = [np.asarray(param[...]) for param in (layer.router, experts.w_in, experts.w_out, experts.w_gate)]
        expected, dropped = oracles.moe(x, *weights, top_k=2, capacity=tiny.T)
        assert dropped == 0
        routing = layer.route(jnp.asarray(x))
        counts = np.bincount(np.asarray(routing.expert_index).ravel(), minlength=4)
        assert (counts > 6).sum() >= 2, "fewer than two experts have three blocks, so the case is too easy"
        for in_place in (False, True):
            y, drop_fraction = jax.jit(Blocks(3, in_place).apply)(jnp.asarray(x), routing, experts)
            assert tiny.relative_error(y, expected) < 1e-13
            assert (np.asarray(drop_fraction) == 0).all()


def check_grouped_matmul() -> None:
    """Ours and the plain one against NumPy loops: product and gradients, without further groups and with them.

    A group of 7 rows takes a copy of its 5 x 3 matrix. A group of 1 row has fewer numbers than the matrix, so the
    further groups are multiplied in turn.
    """
    rng = np.random.default_rng(6)
    weights = rng.normal(size=(4, 5, 3))
    for chosen, count in itertools.product((None, [2, 0, 2, 3, 2, 0]), (7, 1)):
        experts = [0, 1, 2, 3, *(chosen or [])]
        rows, cotangent = rng.normal(size=(len(experts), count, 5)), rng.normal(size=(len(experts), count, 3))
        product = np.stack([rows[g] @ weights[e] for g, e in enumerate(experts)])
        d_rows = np.stack([cotangent[g] @ weights[e].T for g, e in enumerate(experts)])
        d_weights = np.zeros_like(weights)
        for g, e in enumerate(experts):
            d_weights[e] += rows[g].T @ cotangent[g]
        with jax.enable_x64(True):
            index = None if chosen is None else jnp.asarray(chosen)
            for function in (grouped_matmul, plain_kernels.grouped_matmul):
                multiply = functools.partial(function, further_expert=index)
                y, pull = jax.vjp(multiply, jnp.asarray(rows), jnp.asarray(weights))
                for ours, expected in zip(
                    (y, *pull(jnp.asarray(cotangent))), (product, d_rows, d_weights), strict=True
                ):
                    assert np.abs(np.asarray(ours) - expected).max() < 1e-12, function.__module__


def check_gathered_matmul() -> None:
    """The form of a GPU for groups that a CPU multiplies in turn, against loops: product and gradients."""
    rng = np.random.default_rng(2)
    further = [3, 3, 0, 1, 3]
    experts = [0, 1, 2, 3, *further]
    rows, weights, d_y = rng.normal(size=(9, 3, 5)), rng.normal(size=(4, 5, 2)), rng.normal(size=(9, 3, 2))
    d_weights = np.zeros_like(weights)
    for g, e in enumerate(experts):
        d_weights[e] += rows[g].T @ d_y[g]
    product = np.stack([rows[g] @ weights[e] for g, e in enumerate(experts)])
    d_rows = np.stack([d_y[g] @ weights[e].T for g, e in enumerate(experts)])
    with jax.enable_x64(True):
        operands = [jnp.asarray(x) for x in (rows, weights, np.array(further))]
        found = (grouped._copied(*operands), *grouped._copied_backward(*operands, jnp.asarray(d_y)))
    for ours, expected in zip(found, (product, d_rows, d_weights), strict=True):
        assert np.abs(np.asarray(ours) - expected).max() < 1e-12


def check_lookup() -> None:
    """The gradient of a table on a GPU, against a loop. 16 copies in blocks of 4: id 0 fills the first, and ids 0, 1
    and 2 go on in other blocks. The last block of 13, 14 and 15 copies is filled up, and 1 copy is a block."""
    rng = np.random.default_rng(9)
    ids = rng.permutation([0] * 5 + [1] * 6 + [2, 2, 4, 5, 5])
    rows = rng.normal(size=(16, 3)).astype(np.float32)
    for count in (16, 15, 14, 13, 1):
        sums = np.zeros((7, 3))
        for index, row in zip(ids[:count], rows[:count], strict=True):
            sums[index] += row
        found = jax.jit(embedding_lookup.sum_by_id, static_argnums=2)(ids[:count], rows[:count], 7)
        assert tiny.relative_error(found, sums) < 1e-6, count


def check_grouped_heads() -> None:
    """Four heads that share two key heads: the gradients of keys and values are sums over a group."""
    check_causal_attention(heads=4)


def check_causal_attention(heads: int = 2) -> None:
    """Attention by blocks, with hand-written gradients, equals attention with all scores at once, differentiated by
    jax. All in float64, with two key heads."""
    rng = np.random.default_rng(150)
    with jax.enable_x64(True):
        operands = [jnp.asarray(rng.normal(size=(2, n, 150, 4))) for n in (heads, 2, 2)]
        cotangent = jnp.asarray(rng.normal(size=(2, heads, 150, 4)))

        def run(function: Callable[..., jax.Array], *args: jax.Array) -> tuple[jax.Array, ...]:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return function(q, k, v, 0.3, jax.random.split(jax.random.key(3), 2))

            out, pull = jax.vjp(attend, *args)
            return out, *pull(cotangent)

        functions = causal_attention, plain_kernels.causal_attention
        ours, expected = (jax.jit(run, static_argnums=0)(function, *operands) for function in functions)
        for name, one, other in zip(("out", "d_query", "d_key", "d_value"), ours, expected, strict=True):
            assert tiny.relative_error(one, other) < 1e-12, name


def check_long_attention() -> None:
    """Attention whose weights are computed twice, in float64, with two key heads. Two spans of three blocks each, the
    last one filled up.

    Without dropout it is that with all scores at once. With dropout, whose masks depend on the spans, the gradients
    written by hand are those that jax takes of the same forward pass.
    """
    rng = np.random.default_rng(700)
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(cut, "SPANS", 2)
        operands = [jnp.asarray(rng.normal(size=(2, n, 700, 4))) for n in (4, 2, 2)]
        cotangent = jnp.asarray(rng.normal(size=(2, 4, 700, 4)))
        keys = jax.random.split(jax.random.key(3), 2)

        def run(attend: Callable[..., jax.Array], *args: jax.Array) -> tuple[jax.Array, ...]:
            out, pull = jax.vjp(attend, *args)
            return out, *pull(cotangent)

        recomputed = functools.partial(causal_attention, implementation="recomputed")
        by_hand = functools.partial(recomputed, dropout=0.3, dropout_keys=keys)
        pairs = [
            (recomputed, plain_kernels.causal_attention),
            (by_hand, lambda q, k, v: attention_kernel._forward_again(0.3, q, k, v, keys)[0]),
        ]
        for pair in pairs:
            ours, expected = (jax.jit(functools.partial(run, attend))(*operands) for attend in pair)
            for name, one, other in zip(("out", "d_query", "d_key", "d_value"), ours, expected, strict=True):
                assert tiny.relative_error(one, other) < 1e-12, name


def check_dropout_masks() -> None:
    """Three blocks of queries have independent masks: two of them disagree in 2 x 1/4 x 3/4 of their entries."""
    query, keys = jnp.zeros((2, 2, 300, 4)), jax.random.split(jax.random.key(0), 2)
    masks = [
        np.asarray(attention_kernel._dropout_mask(query, 0.25, keys, first, end)).ravel()
        for first, end in cut.query_blocks(300)
    ]
    assert len(masks) == 3
    for one, other in ((masks[0], masks[1]), (masks[1], masks[2]), (masks[0], masks[2])):
        count = min(one.size, other.size)
        share = (one[:count] != other[:count]).mean()
        assert abs(share - 0.375) < 5 * np.sqrt(0.375 * 0.625 / count)


def check_cross_entropy() -> None:
    """The mean over 12 tokens, in 4 blocks and in one; and its gradients, from d z = (softmax - onehot) / N. In 4
    blocks also in the form of a GPU, with 13 columns filled up to 16."""
    _check_cross_entropy(12, ((3, (4, 3)), (2**12, (1, 12))))


def check_cross_entropy_of_a_prime() -> None:
    """Of 11 tokens, in 3 blocks of 4. The last block has a row of padding, which counts nowhere."""
    _check_cross_entropy(11, ((4, (3, 4)),))


def _check_cross_entropy(tokens: int, cases: tuple[tuple[int, tuple[int, int]], ...]) -> None:
    """`cases` are (most tokens of a block, the expected number and size of the blocks)."""
    rng = np.random.default_rng(8)
    hidden, head, targets = rng.normal(size=(tokens, 5)), rng.normal(size=(5, 13)), rng.integers(0, 13, tokens)
    nats = oracles.cross_entropy(hidden, head, targets)
    d_z = np.stack([oracles.softmax(h @ head) for h in hidden])
    d_z[np.arange(tokens), targets] -= 1
    expected = (
        np.mean(nats),
        1.7 * d_z @ head.T / tokens,
        1.7 * hidden.T @ d_z / tokens,
    )
    with jax.enable_x64(True):
        operands = (jnp.asarray(hidden), jnp.asarray(head))
        ours, plain = cross_entropy.mean_cross_entropy, plain_kernels.mean_cross_entropy
        on_cpu = [(ours, 1, case) for case in cases]
        for function, columns, (most, blocks) in [*on_cpu, (ours, 8, cases[0]), (plain, 1, cases[0])]:
            with pytest.MonkeyPatch.context() as patch:
                padded = 13 + -13 % columns
                form = cross_entropy.Form(columns, one_pass=columns > 1)
                patch.setattr(cross_entropy, "CPU_FORM", form)
                patch.setattr(cross_entropy, "LOGITS_BYTES", most * padded * 4)
                assert cross_entropy.token_blocks(tokens, padded) == blocks
                loss, pull = jax.vjp(functools.partial(function, targets=jnp.asarray(targets)), *operands)
                for one, exact in zip((loss, *pull(jnp.asarray(1.7))), expected, strict=True):
                    assert np.abs(np.asarray(one) - exact).max() < 1e-13, function
                losses = cross_entropy.blocked_token_losses(*operands, jnp.asarray(targets))
                assert losses.shape == (tokens,)
                assert np.abs(np.asarray(losses) - nats).max() < 1e-12

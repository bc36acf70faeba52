"""Bugs to plant in `foundation`, one at a time, each with the check that must catch it.

A bug is a replacement in the source of one function. Most break a gradient, and must fail a parity check of
the operation named. Those that change the forward pass along with the backward one agree with autodiff, so
they must fail a test of the forward pass instead: it is named with `test:`.

The tests plant each of them. `python -m foundation hunt` plants one that the table shows.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Bug(NamedTuple):
    """`old`, which occurs once in the source of module.function, becomes `new`; `caught_by` must then
    fail."""

    name: str
    place: str
    old: str
    new: str
    caught_by: str

    @property
    def seen_in_the_table(self) -> bool:
        """Whether a row of the table fails, and not only a test of the forward pass."""
        return not self.caught_by.startswith("test:")


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug's function with its source replaced.

    Its code object is exchanged, so every module that has imported the function runs the bug. The old text
    must occur exactly once, so that a bug can't go stale when the source changes.
    """
    module_name, function_name = bug.place.split(".")
    module = importlib.import_module(f"foundation.{module_name}")
    function = inspect.unwrap(getattr(module, function_name))  # within the wrappers of jaxtyping
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.old!r} occurs {source.count(bug.old)} times in {bug.place}")
    changed = source.replace(bug.old, bug.new)
    scope: dict = dict(vars(module))
    exec(compile(changed[changed.index("def ") :], bug.place, "exec"), scope)  # without decorators
    original = function.__code__
    function.__code__ = scope[function_name].__code__
    try:
        yield
    finally:
        function.__code__ = original


BUGS = [
    Bug("tanh: derivative of the input, not the output", "activations.tanh_backward", "y**2", "y", "tanh"),
    Bug("sigmoid: factor 1 - y forgotten", "activations.sigmoid_backward", "d_y * y * (1.0 - y)", "d_y * y", "sigmoid"),
    Bug("relu: gradient passes everywhere", "activations.relu_backward", "d_y, 0.0", "d_y, d_y", "relu"),
    Bug(
        "gelu: density term forgotten",
        "activations.gelu_exact_backward",
        "_normal_cdf(x) + x * density",
        "_normal_cdf(x)",
        "gelu_exact",
    ),
    Bug("gelu: inner derivative without its 3", "activations.gelu_backward", "3.0 * ", "", "gelu"),
    Bug("gelu: another cubic coefficient", "activations.gelu_forward", "_GELU_CUBIC", "0.05", "gelu"),
    Bug("silu: treated as x times a constant", "activations.silu_backward", "(1.0 + x * (1.0 - s))", "1.0", "silu"),
    Bug("linear: weight not transposed", "linear.linear_backward", "kernel.T", "kernel", "linear"),
    Bug(
        "linear: divided by the batch a second time",
        "linear.linear_backward",
        "rows_x.T @ rows_d",
        "rows_x.T @ rows_d / rows_x.shape[0]",
        "linear",
    ),
    Bug("linear: bias gradient averaged", "linear.linear_backward", "jnp.sum(rows_d", "jnp.mean(rows_d", "linear"),
    Bug("dropout: scale forgotten", "dropout.dropout_backward", "d_y / (1.0 - rate)", "d_y", "dropout"),
    Bug(
        "softmax: Jacobian without its rank-one part",
        "softmax.softmax_backward",
        "(d_p - jnp.sum(p * d_p, axis=-1, keepdims=True))",
        "d_p",
        "softmax",
    ),
    Bug("mse: factor 2 forgotten", "losses.mse_backward", "2.0 * ", "", "mse"),
    Bug(
        "cross-entropy: ignored positions get a gradient",
        "losses.cross_entropy_backward",
        "jnp.where(counted, d_loss / count, 0.0)",
        "jnp.where(counted, d_loss / count, d_loss / count)",
        "cross_entropy",
    ),
    Bug(
        "cross-entropy: mean over ignored positions too",
        "losses.cross_entropy_forward",
        "jnp.maximum(jnp.sum(counted), 1)",
        "counted.size",
        "test:test_softmax_and_losses_equal_jax_and_optax",
    ),
    Bug("layernorm: mean term missing", "norms.layernorm_backward", "d_n - mean_d - n", "d_n - n", "layernorm"),
    Bug("layernorm: variance term missing", "norms.layernorm_backward", " - n * mean_dn", "", "layernorm"),
    Bug("layernorm: scale not applied to the gradient", "norms.layernorm_backward", "d_y * scale", "d_y", "layernorm"),
    Bug(
        "rmsnorm: scale gradient from the unscaled rows",
        "norms.rmsnorm_backward",
        "d_y * n, axis=tuple",
        "d_y * n / rrms, axis=tuple",
        "rmsnorm",
    ),
    Bug("embedding: the last occurrence wins", "embedding.embedding_backward", ".add(d_x)", ".set(d_x)", "embedding"),
    Bug(
        "positions: table gradient from the first sequence only",
        "positions.learned_positions_backward",
        "jnp.sum(d_y, axis=0)",
        "d_y[0]",
        "learned_positions",
    ),
    Bug("rope: gradient rotated the same way", "positions.rope_backward", "-angles", "angles", "rope"),
    Bug(
        "rope: neighbouring frequencies",
        "positions.rope_angles",
        "/ width",
        "/ width / 2",
        "test:test_rope_turns_the_first_pair_by_one_radian_a_position_anticlockwise",
    ),
    Bug(
        "attention: 1/sqrt(A) forgotten on the way back",
        "attention.attention_backward",
        " / math.sqrt(cache.q.shape[-1])",
        "",
        "attention",
    ),
    Bug(
        "attention: keys get the gradient of S, not its transpose",
        "attention.attention_backward",
        "jnp.swapaxes(d_scores, -1, -2) @ cache.q",
        "d_scores @ cache.q",
        "attention",
    ),
    Bug(
        "attention: d_v from the weights before dropout",
        "attention.attention_backward",
        "jnp.swapaxes(cache.kept, -1, -2)",
        "jnp.swapaxes(cache.softmax[0], -1, -2)",
        "attention",
    ),
    Bug(
        "attention: no causal mask",
        "attention.causal_mask",
        "jnp.tril(",
        "(",
        "test:test_multi_head_attention_equals_flax",
    ),
    Bug(
        "attention: q and k change places on the way back",
        "attention.multi_head_backward",
        "(d_q, d_k, d_v)",
        "(d_k, d_q, d_v)",
        "multi_head",
    ),
    Bug(
        "grouped heads: the gradients of a group averaged",
        "grouped_heads.share_heads_backward",
        "jnp.sum(",
        "jnp.mean(",
        "share_heads",
    ),
    Bug(
        "grouped heads: neighbours read different key heads",
        "grouped_heads.share_heads_forward",
        "jnp.repeat(x, heads // shared, axis=1)",
        "jnp.tile(x, (1, heads // shared, 1, 1))",
        "test:test_shared_key_heads_are_equal_columns",
    ),
    Bug(
        "router: plain gates get no gradient",
        "router.router_backward",
        "if not renormalised:",
        "if False:",
        "router",
    ),
    Bug(
        "router: gate gradient dropped",
        "router.router_backward",
        "d_chosen = softmax_backward(d_gates, cache.gates)",
        "d_chosen = jnp.zeros_like(d_gates)",
        "router",
    ),
    Bug(
        "router: renormalisation treated as a constant",
        "router.router_backward",
        "softmax_backward(d_gates, cache.gates)",
        "cache.gates[0] * d_gates",
        "router",
    ),
    Bug(
        "router: z-loss not divided by the tokens",
        "router.router_backward",
        "cache.log_total / (batch * tokens)",
        "cache.log_total",
        "router",
    ),
    Bug(
        "router: balance loss through the soft shares",
        "router.router_backward",
        "cache.share[:, None, :]",
        "jnp.mean(cache.softmax[0], axis=1, keepdims=True)",
        "router",
    ),
    Bug(
        "router: balance loss is K at balance",
        "router.choice_share",
        "jnp.mean(onehot, axis=(1, 2), dtype=dtype)",
        "jnp.mean(jnp.sum(onehot, axis=2), axis=1, dtype=dtype)",
        "test:test_balance_loss_is_one_at_perfect_balance",
    ),
    Bug(
        "router: gates not renormalised",
        "router.router_forward",
        "softmax_forward(chosen_logits)",
        "(jnp.take_along_axis(p, experts, axis=-1), (p,))",
        "test:test_gates_of_top_1_are_p_and_of_top_2_sum_to_one",
    ),
    Bug(
        "experts: SwiGLU forgets the way through the gate",
        "experts.swiglu_experts_backward",
        'jnp.einsum("becf,edf->becd", d_gate, w_gate) + ',
        "",
        "swiglu_experts",
    ),
    Bug(
        "experts: SwiGLU factors not swapped",
        "experts.swiglu_experts_backward",
        "d_hidden * opened",
        "d_hidden * u",
        "swiglu_experts",
    ),
    Bug(
        "moe: gradient leaks through a dropped choice",
        "moe._read_slots",
        "jnp.pad(flat, ((0, 0), (0, 1), (0, 0)))",
        'jnp.pad(flat, ((0, 0), (0, 1), (0, 0)), mode="edge")',
        "dispatch",
    ),
    Bug(
        "moe: choices of all first ranks before the second (leaks the future)",
        "moe.assign_slots",
        "experts.reshape(batch, tokens * top_k)",
        "experts.swapaxes(1, 2).reshape(batch, tokens * top_k)",
        "test:test_slots_worked_by_hand",
    ),
    Bug(
        "moe: one place too many",
        "moe.assign_slots",
        "place < places",
        "place <= places",
        "test:test_slots_worked_by_hand",
    ),
    Bug(
        "moe: capacity in floating point",
        "moe.capacity",
        "Fraction(str(capacity_factor))",
        "capacity_factor",
        "test:test_capacity_table",
    ),
    Bug(
        "moe: gate not applied on the way back",
        "moe.combine_backward",
        "gates[..., None] * d_y[:, :, None, :]",
        "jnp.ones_like(gates)[..., None] * d_y[:, :, None, :]",
        "combine",
    ),
    Bug("moe: only the experts' share of d_x", "moe.moe_backward", "d_x_experts + d_x_router", "d_x_experts", "moe"),
    Bug("block: residual path forgotten", "block.block_backward", "d_y + d_a_branch", "d_a_branch", "block"),
    Bug(
        "model: auxiliary losses not averaged over layers", "transformer.model_backward", "d_z / layers", "d_z", "model"
    ),
    Bug(
        "model: tied table without the head's share",
        "transformer.model_backward",
        'grads["embedding"] + d_table_head',
        'grads["embedding"]',
        "model",
    ),
    Bug(
        "feed-forward: silu treated as a constant gate",
        "feed_forward.feed_forward_backward",
        "d_a = silu_backward(d_h * u, silu_cache)",
        "d_a = d_h * u",
        "feed_forward",
    ),
    Bug(
        "feed-forward: only one way back to x",
        "feed_forward.feed_forward_backward",
        "d_x_gate + d_x_in",
        "d_x_in",
        "feed_forward",
    ),
    Bug(
        "dense block: the network's residual path forgotten",
        "dense_transformer.dense_block_backward",
        "d_y + d_a_branch",
        "d_a_branch",
        "dense_block",
    ),
    Bug(
        "dense block: attention's residual path counted twice",
        "dense_transformer.dense_block_backward",
        "d_a + d_x_branch",
        "d_a + d_y + d_x_branch",
        "dense_block",
    ),
    Bug(
        "dense model: the table's look-up forgotten",
        "dense_transformer.dense_model_backward",
        "d_table_head + embedding_backward(d_x, embedding_cache)",
        "d_table_head",
        "dense_model",
    ),
    Bug(
        "dense model: blocks' gradients in the order in which they come back",
        "dense_transformer.dense_model_backward",
        "d_blocks[::-1]",
        "d_blocks",
        "dense_model",
    ),
    Bug("adam: no bias correction", "optimizers.adam_update", "1.0 - beta2**step", "1.0", "test:test_adam"),
    Bug(
        "adamw: decay rescaled by the gradient",
        "optimizers.adam_update",
        "lambda m, g: beta1 * m + (1.0 - beta1) * g, state.mean, grads)",
        "lambda m, g, w: beta1 * m + (1.0 - beta1) * (g + weight_decay * w), state.mean, grads, params)",
        "test:test_adamw",
    ),
    Bug(
        "muon: no look ahead",
        "optimizers.muon_update",
        "beta * m / correct_next + (1.0 - beta) * g / correct_now",
        "m / correct_now",
        "test:test_muon",
    ),
]

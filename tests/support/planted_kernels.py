"""Bugs planted into dispatch, kernels, system and data, each with the check that must catch it."""

from moe_jax.model.kernels import causal_attention, cross_entropy, embedding_lookup, grouped_matmul
from moe_jax.model.moe import dispatch, experts
from moe_jax.system import files, random_keys
from tests.support import kernel_checks, system_checks
from tests.support.planting import Bug

BUGS = [
    Bug(
        "a key head's gradient comes from one head of its group",
        causal_attention._block_gradients,
        kernel_checks.check_grouped_heads,
    ).edit("d_s = _by_group(d_s, key)", "d_s = _by_group(d_s.at[:, 1:].set(0), key)"),
    Bug(
        "a token's gradient comes from another sequence",
        dispatch._dispatch_backward,
        kernel_checks.check_dispatch_gradients,
    ).edit("_sum_of_choices(d_rows, ", "_sum_of_choices(jnp.roll(d_rows, 1, axis=1), "),
    Bug("a row has the gate of another choice", dispatch.row_gates, kernel_checks.check_dispatch_gradients).edit(
        "dispatch(gate.reshape(", "dispatch(gate[..., ::-1].reshape("
    ),
    Bug("the gate gradient is dropped", dispatch.row_gates, kernel_checks.check_dispatch_gradients).edit(
        "dispatch(gate.reshape(", "dispatch(jax.lax.stop_gradient(gate).reshape("
    ),
    Bug("two blocks of an expert share their rows", dispatch.Blocks.plan_queues, kernel_checks.check_blocks).edit(
        "+ nth - 1)", "+ nth - nth)"
    ),
    Bug("further blocks belong to the next expert", dispatch.Blocks.plan_queues, kernel_checks.check_blocks).edit(
        "further_expert.clip(0, experts - 1)", "further_expert.clip(0, experts - 1)[::-1]"
    ),
    Bug("evaluation leaves out the last block in use", experts.Experts.apply_blocks, kernel_checks.check_blocks).edit(
        "fori_loop(experts, used, ", "fori_loop(experts, used - 1, "
    ),
    Bug("a grouped product takes the next expert", grouped_matmul._copies, kernel_checks.check_grouped_matmul).edit(
        "narrow[further_expert]]", "narrow[(further_expert + 1) % len(weights)]]"
    ),
    Bug(
        "the gradient of an expert's matrix is that of its last group",
        grouped_matmul._copied_backward_in_order,
        kernel_checks.check_grouped_matmul,
    ).edit(".add(d_copies", ".set(d_copies"),
    Bug("products in turn take the first expert", grouped_matmul._turns, kernel_checks.check_grouped_matmul).edit(
        "weights[further_expert[g - experts]]", "weights[0 * further_expert[g - experts]]"
    ),
    Bug(
        "the gradient of products in turn leaves out the first groups",
        grouped_matmul._turns_backward,
        kernel_checks.check_grouped_matmul,
    ).edit("add_group, (d_rows, d_weights)", "add_group, (d_rows, 0 * d_weights)"),
    Bug(
        "the sum over groups on a GPU leaves out the further groups",
        grouped_matmul._sum_of_groups,
        kernel_checks.check_gathered_matmul,
    ).edit("further_expert])[None]", "further_expert + experts])[None]"),
    Bug(
        "a row of a table gets the gradients of its first block only",
        embedding_lookup.sum_by_id,
        kernel_checks.check_lookup,
    ).edit("sums += jnp.where(of(number[:, -1:]), rest[:, None], 0)", "rest"),
    Bug(
        "a row of a table gets the gradients of a block twice", embedding_lookup.sum_by_id, kernel_checks.check_lookup
    ).edit("(block[:, None] < block)", "(block[:, None] <= block)"),
    Bug(
        "all blocks of queries have one dropout key", causal_attention._dropout_mask, kernel_checks.check_dropout_masks
    ).edit("fold_each(keys, first)", "keys"),
    Bug(
        "attention dropout is forgotten in the backward pass",
        causal_attention._block_gradients,
        kernel_checks.check_causal_attention,
    ).edit("(w * d_w - p * row_sum)", "(p * (d_w - row_sum))"),
    Bug(
        "the gradient of a later block replaces that of an earlier one",
        causal_attention._backward,
        kernel_checks.check_causal_attention,
    ).edit("d_key_t.at[..., :end].add(", "d_key_t.at[..., :end].set("),
    Bug(
        "the gradient of a later span replaces that of an earlier one",
        causal_attention._backward_again,
        kernel_checks.check_long_attention,
    ).edit("d_value_t.at[..., :end].add(", "d_value_t.at[..., :end].set("),
    Bug(
        "within a span only the last block reaches the keys",
        causal_attention._backward_again,
        kernel_checks.check_long_attention,
    ).edit("sums[0] + d_k", "d_k"),
    Bug(
        "the blocks of a span all start where the span starts",
        causal_attention._starts,
        kernel_checks.check_long_attention,
    ).edit("jnp.arange(first, end, blocking.QUERY_BLOCK)", "jnp.arange(first, end, blocking.QUERY_BLOCK) * 0 + first"),
    Bug(
        "the weights computed once more have another dropout",
        causal_attention._backward_again,
        kernel_checks.check_long_attention,
    ).edit("_dropout_mask(q, rate, keys, start, end)", "_dropout_mask(q, rate, keys, start + 1, end)"),
    Bug("the gradient of cross-entropy is a sum", cross_entropy._forward, kernel_checks.check_cross_entropy).edit(
        "1 / hidden.shape[0]", "1.0"
    ),
    Bug(
        "only the last block reaches the gradient of the head",
        cross_entropy._with_gradients,
        kernel_checks.check_cross_entropy,
    ).edit("d_head = d_head + transposed_product(", "d_head = transposed_product("),
    Bug(
        "the columns that fill up the head take part in the softmax",
        cross_entropy._logits,
        kernel_checks.check_cross_entropy,
    ).edit("z, -jnp.inf)", "z, 0.0)"),
    Bug(
        "the GPU's softmax subtracts the largest logit only",
        cross_entropy._logsumexp_and_softmax,
        kernel_checks.check_cross_entropy,
    ).edit("jnp.exp(z - logsumexp[:, None])", "jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))"),
    Bug(
        "a row of padding counts in the loss",
        cross_entropy._with_gradients,
        kernel_checks.check_cross_entropy_of_a_prime,
    ).edit("(losses * token_weight).sum()", "losses.sum()"),
    Bug("all purposes share one key", random_keys.purpose_key, system_checks.check_keys).edit(
        "jax.random.fold_in(jax.random.key(seed), int(purpose))", "jax.random.key(seed)"
    ),
    Bug("every step draws the same", random_keys.purpose_key, system_checks.check_keys).edit(
        "jax.random.fold_in(key, step)", "key"
    ),
    Bug("a file is written in place", files._replacing, system_checks.check_atomic_write).edit(
        "draft.replace(path)", "path.write_bytes(draft.read_bytes())"
    ),
    Bug("a failed write leaves its draft", files._replacing, system_checks.check_atomic_write).edit(
        "draft.unlink(missing_ok=True)\n", "pass\n"
    ),
    Bug("two hold one lock", files.locked, system_checks.check_lock).edit(
        "lock.acquire(timeout=-1 if wait else 0)", "pass"
    ),
]

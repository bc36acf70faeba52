"""Bugs planted into routing, model, training and generation, each with the check that must catch it."""

from tests.support import checks
from tests.support.planting import Bug

BUGS = [
    Bug(
        "no causal mask",
        "moe_jax.model.kernels.causal_attention:masked_softmax",
        "jnp.where(visible, scores, -jnp.inf)",
        "scores",
        checks.check_causal,
    ),
    Bug(
        "choice-major order",
        "moe_jax.model.moe.queues:queue_positions",
        "before = jnp.cumsum(hits, axis=1) - hits",
        """one = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
    queue = one.swapaxes(1, 2).reshape(expert.shape[0], -1, experts)
    queue = (jnp.cumsum(queue, axis=1) - queue).reshape(one.swapaxes(1, 2).shape).swapaxes(1, 2)
    return (queue * one).sum(-1)""",
        checks.check_causal,
    ),
    Bug(
        "choice-major order, by the worked case",
        "moe_jax.model.moe.queues:queue_positions",
        "before = jnp.cumsum(hits, axis=1) - hits",
        """one = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
    queue = one.swapaxes(1, 2).reshape(expert.shape[0], -1, experts)
    queue = (jnp.cumsum(queue, axis=1) - queue).reshape(one.swapaxes(1, 2).shape).swapaxes(1, 2)
    return (queue * one).sum(-1)""",
        checks.check_three_tokens,
    ),
    Bug(
        "the batch is one group",
        "moe_jax.model.moe.queues:queue_positions",
        "before = jnp.cumsum(hits, axis=1) - hits",
        """flat = hits.reshape(-1, experts)
    before = (jnp.cumsum(flat, axis=0) - flat).reshape(hits.shape)""",
        checks.check_rows_are_independent,
    ),
    Bug(
        "top-K by probability",
        "moe_jax.model.moe.router:route",
        "jax.lax.stop_gradient(logits if bias is None else probs + bias)",
        "jax.lax.stop_gradient(probs)",
        checks.check_far_logits,
    ),
    Bug(
        "the single gate is the constant 1",
        "moe_jax.model.moe.router:route",
        "if top_k == 1 else",
        "if False else",
        checks.check_single_gate,
    ),
    Bug(
        "gates are not renormalised",
        "moe_jax.model.moe.router:route",
        "if top_k == 1 else",
        "if True else",
        checks.check_renormalised_gates,
    ),
    Bug(
        "a NaN token takes a slot",
        "moe_jax.model.moe.queues:choice_counts",
        "hits * valid[..., None]",
        "hits",
        checks.check_invalid_token,
    ),
    Bug(
        "a NaN token passes unrouted",
        "moe_jax.model.moe.layer:MoE.__call__",
        "y = jnp.where(routing.valid[..., None], y, jnp.nan)",
        "pass",
        checks.check_invalid_token,
    ),
    Bug(
        "one slot too many",
        "moe_jax.model.moe.dispatch:Capacity.trace",
        "position < self.slots",
        "position <= self.slots",
        checks.check_three_tokens,
    ),
    Bug(
        "tokens of another sequence are dispatched",
        "moe_jax.model.moe.dispatch:_tokens_at",
        "_gather(x, ",
        "_gather(jnp.roll(x, 1, axis=0), ",
        checks.check_layer_with_drops,
    ),
    Bug(
        "rows of another sequence are combined",
        "moe_jax.model.moe.dispatch:_rows_at",
        "_gather(rows, ",
        "_gather(jnp.roll(rows, 1, axis=1), ",
        checks.check_layer_with_drops,
    ),
    Bug(
        "all sequences have the slots of the first",
        "moe_jax.model.moe.dispatch:_plan",
        "jax.vmap(invert)(row.reshape(batch, -1))",
        "jnp.broadcast_to(invert(row[0].reshape(-1)), (batch, groups * rows))",
        checks.check_layer_with_drops,
    ),
    Bug(
        "capacity from the binary factor",
        "moe_jax.config.model:capacity",
        "Fraction(str(capacity_factor))",
        "Fraction(capacity_factor)",
        checks.check_capacity,
    ),
    Bug(
        "keep mask from the gate",
        "moe_jax.model.moe.dispatch:Capacity.trace",
        "& routing.valid[..., None]",
        "& (routing.gate > 0)",
        checks.check_underflown_gate_keeps_its_slot,
    ),
    Bug(
        "gates renormalised after drops",
        "moe_jax.model.moe.dispatch:_sum_of_choices",
        "gate = jnp.where(plan.keep, gate, 0).astype(rows.dtype)",
        """gate = jnp.where(plan.keep, gate, 0).astype(rows.dtype)
        gate = gate / jnp.maximum(gate.sum(-1, keepdims=True), 1e-9)""",
        checks.check_layer_with_drops,
    ),
    Bug(
        "the first expert serves all",
        "moe_jax.model.moe.dispatch:PerToken.apply",
        "routing.expert_index.reshape(-1))",
        "0 * routing.expert_index.reshape(-1))",
        checks.check_cached_decoding,
    ),
    Bug(
        "balance loss divided by K twice",
        "moe_jax.model.moe.balance:expert_load",
        "/ (tokens * top_k)",
        "/ (tokens * top_k * top_k)",
        checks.check_balance_loss,
    ),
    Bug(
        "balance loss over the batch as one group",
        "moe_jax.model.moe.balance:balance_loss",
        "(routing.logits.shape[-1] * (share * mean_prob).sum(-1)).mean()",
        "routing.logits.shape[-1] * (share.mean(0) * mean_prob.mean(0)).sum()",
        checks.check_balance_loss,
    ),
    Bug("z-loss not squared", "moe_jax.model.moe.balance:z_loss", "jnp.square(", "(", checks.check_z_loss),
    Bug(
        "rotary positions one off in decoding",
        "moe_jax.model.attention:Attention.decode",
        "self._project(x, index[None])",
        "self._project(x, index[None] + 1)",
        checks.check_cached_decoding,
    ),
    Bug(
        "a decoded token does not see itself",
        "moe_jax.model.attention:Attention.decode",
        "<= index",
        "< index",
        checks.check_cached_decoding,
    ),
    Bug(
        "prefill drops tokens",
        "moe_jax.inference.decode:prefill",
        "Mode.GENERATE",
        "Mode.TRAIN",
        checks.check_cached_decoding,
    ),
    Bug(
        "dropout not scaled",
        "moe_jax.model.layers:dropout",
        "x / (1 - rate)",
        "x",
        checks.check_dropout_is_scaled,
    ),
    Bug(
        "attention dropout not scaled",
        "moe_jax.model.kernels.causal_attention:causal_attention",
        "masks, 1 - dropout)",
        "masks, 1.0)",
        checks.check_attention_dropout_is_scaled,
    ),
    Bug(
        "top-p leaves out the token that reaches p",
        "moe_jax.inference.sampling:adjusted_logits",
        "jnp.cumsum(descending, axis=-1) - descending, rank",
        "jnp.cumsum(descending, axis=-1), rank",
        checks.check_filters,
    ),
    Bug(
        "filters act before the temperature",
        "moe_jax.inference.sampling:adjusted_logits",
        "probs = jax.nn.softmax(logits, axis=-1)",
        "probs = jax.nn.softmax(logits * jnp.where(greedy, 1.0, settings.temperature), axis=-1)",
        checks.check_filters,
    ),
    Bug(
        "min-p of all rows is that of the first",
        "moe_jax.inference.sampling:adjusted_logits",
        "descending[:, :1]",
        "descending[:1, :1]",
        checks.check_each_row_has_its_own_filters,
    ),
    Bug(
        "all rows penalise the tokens of the first",
        "moe_jax.inference.sampling:adjusted_logits",
        "jnp.where(seen, penalised, logits)",
        "jnp.where(seen[:1], penalised, logits)",
        checks.check_each_row_has_its_own_filters,
    ),
    Bug(
        "all rows have the ranks of the first",
        "moe_jax.inference.sampling:adjusted_logits",
        "jnp.argsort(order, axis=-1)",
        "jnp.argsort(order[:1], axis=-1) + 0 * order",
        checks.check_each_row_has_its_own_filters,
    ),
    Bug(
        "all rows share one draw",
        "moe_jax.inference.sampling:sample",
        "return jax.random.categorical(key, adjusted_logits(logits, settings, seen), axis=-1)",
        """drawn = jax.random.categorical(key, adjusted_logits(logits, settings, seen), axis=-1)
    return jnp.broadcast_to(drawn[:1], len(logits))""",
        checks.check_each_row_draws_for_itself,
    ),
    Bug(
        "noise and jitter share their keys",
        "moe_jax.model.moe.layer:MoE.route",
        "fold_each(keys, 1)",
        "fold_each(keys, 0)",
        checks.check_noise_and_jitter_are_independent,
    ),
    Bug(
        "the second row sees its future",
        "moe_jax.model.kernels.causal_attention:masked_softmax",
        "jnp.where(visible, scores, -jnp.inf)",
        "jnp.where(visible | (jnp.arange(len(scores)) == 1)[:, None, None, None], scores, -jnp.inf)",
        checks.check_causal,
    ),
    Bug(
        "the first row's tokens reach the second",
        "moe_jax.model.attention:Attention.__call__",
        "return self._output(mixed.swapaxes(1, 2))",
        "return self._output(mixed.swapaxes(1, 2).at[1].add(mixed.swapaxes(1, 2)[0] * 1e-2))",
        checks.check_rows_are_independent,
    ),
]

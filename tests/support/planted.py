"""Bugs planted into routing, model, training and generation, each with the check that must catch it."""

from moe_jax.config import model
from moe_jax.inference import sampling, slots
from moe_jax.model import attention, layers
from moe_jax.model.kernels import cached_attention, causal_attention
from moe_jax.model.moe import dispatch, layer, router
from tests.support import checks
from tests.support.planting import Bug

BUGS = [
    Bug("no causal mask", causal_attention.masked_softmax, checks.check_causal).edit(
        " + jnp.where(visible, 0, -jnp.inf).astype(scores.dtype)", ""
    ),
    Bug("choice-major order", router.queue_positions, checks.check_causal).edit(
        "before = jnp.cumsum(hits, axis=1) - hits",
        """one = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
    queue = one.swapaxes(1, 2).reshape(expert.shape[0], -1, experts)
    queue = (jnp.cumsum(queue, axis=1) - queue).reshape(one.swapaxes(1, 2).shape).swapaxes(1, 2)
    return (queue * one).sum(-1)""",
    ),
    Bug("the batch is one group", router.queue_positions, checks.check_causal).edit(
        "before = jnp.cumsum(hits, axis=1) - hits",
        """flat = hits.reshape(-1, experts)
    before = (jnp.cumsum(flat, axis=0) - flat).reshape(hits.shape)""",
    ),
    Bug("top-K by probability", router.route, checks.check_far_logits).edit(
        "jax.lax.stop_gradient(logits if bias is None else probs + bias)", "jax.lax.stop_gradient(probs)"
    ),
    Bug("the single gate is the constant 1", router.route, checks.check_single_gate).edit(
        "if renormalise and top_k > 1:", "if renormalise:"
    ),
    Bug("gates are not renormalised", router.route, checks.check_renormalised_gates).edit(
        "if renormalise and top_k > 1:", "if False:"
    ),
    Bug(
        "gates are renormalised although the policy says not to", layer.MoE.choose, checks.check_layer_with_plain_gates
    ).edit(", self.routing.renormalise_gates)", ")"),
    Bug(
        "decoding gives neighbouring heads different key heads",
        cached_attention.cached_attention,
        checks.check_cached_decoding_of_grouped_heads,
    ).edit(
        "query.reshape(batch, tokens, -1, shared, width).transpose(0, 2, 3, 1, 4)",
        "query.reshape(batch, tokens, shared, -1, width).transpose(0, 3, 2, 1, 4)",
    ),
    Bug("a NaN token takes a slot", router.choice_counts, checks.check_invalid_token).edit(
        "hits * valid[..., None]", "hits"
    ),
    Bug("a NaN token passes unrouted", layer.MoE.__call__, checks.check_invalid_token).edit(
        "y = jnp.where(routing.valid[..., None], y, jnp.nan)", "pass"
    ),
    Bug("one slot too many", dispatch.Capacity.trace, checks.check_three_tokens).edit(
        "position < self.slots", "position <= self.slots"
    ),
    Bug("tokens of another sequence are dispatched", dispatch._tokens_at, checks.check_layer_with_drops).edit(
        "_gather(x, ", "_gather(jnp.roll(x, 1, axis=0), "
    ),
    Bug("rows of another sequence are combined", dispatch._rows_at, checks.check_layer_with_drops).edit(
        "_gather(rows, ", "_gather(jnp.roll(rows, 1, axis=1), "
    ),
    Bug("all sequences have the slots of the first", dispatch.row_plan, checks.check_layer_with_drops).edit(
        "jax.vmap(invert)(row.reshape(batch, -1))",
        "jnp.broadcast_to(invert(row[0].reshape(-1)), (batch, groups * rows))",
    ),
    Bug("capacity from the binary factor", model.capacity, checks.check_capacity).edit(
        "Fraction(str(capacity_factor))", "Fraction(capacity_factor)"
    ),
    Bug("keep mask from the gate", dispatch.Capacity.trace, checks.check_underflown_gate_keeps_its_slot).edit(
        "& routing.valid[..., None]", "& (routing.gate > 0)"
    ),
    Bug("gates renormalised after drops", dispatch.row_gates, checks.check_layer_with_drops).edit(
        "dispatch(gate.reshape(",
        "dispatch((gate / jnp.where(plan.keep, gate, 0).sum(-1, keepdims=True).clip(1e-9)).reshape(",
    ),
    Bug("the first expert serves all", dispatch.PerToken.apply, checks.check_cached_decoding).edit(
        "routing.expert_index.reshape(-1), wanted)", "0 * routing.expert_index.reshape(-1), wanted)"
    ),
    Bug("balance loss divided by K twice", router.expert_load, checks.check_balance_loss).edit(
        "/ (tokens * top_k)", "/ (tokens * top_k * top_k)"
    ),
    Bug("balance loss over the batch as one group", router.balance_loss, checks.check_balance_loss).edit(
        "(routing.logits.shape[-1] * (share * mean_prob).sum(-1)).mean()",
        "routing.logits.shape[-1] * (share.mean(0) * mean_prob.mean(0)).sum()",
    ),
    Bug("z-loss not squared", router.z_loss, checks.check_z_loss).edit("jnp.square(", "("),
    Bug("rotary positions one off in decoding", attention.Attention.decode, checks.check_cached_decoding).edit(
        "self._project(x, positions)", "self._project(x, positions + 1)"
    ),
    Bug("a decoded token does not see itself", cached_attention._one_head_at_a_time, checks.check_cached_decoding).edit(
        "position[:, 0] + 1", "position[:, 0]"
    ),
    Bug("prefill drops tokens", slots.prefill, checks.check_cached_decoding).edit("Mode.GENERATE", "Mode.TRAIN"),
    Bug("dropout not scaled", layers.dropout, checks.check_dropout_is_scaled).edit("x / (1 - rate)", "x"),
    Bug(
        "attention dropout not scaled", causal_attention.causal_attention, checks.check_attention_dropout_is_scaled
    ).edit("masks, 1 - dropout)", "masks, 1.0)"),
    Bug("top-p leaves out the token that reaches p", sampling._filtered, checks.check_filters).edit(
        "jnp.cumsum(descending, axis=-1) - descending", "jnp.cumsum(descending, axis=-1)"
    ),
    Bug("filters act before the temperature", sampling._filtered, checks.check_filters).edit(
        "jax.nn.softmax(logits, axis=-1)", "jax.nn.softmax(logits * settings.temperature, axis=-1)"
    ),
    Bug("min-p of all rows is that of the first", sampling._filtered, checks.check_each_row_has_its_own_filters).edit(
        "descending[:, :1]", "descending[:1, :1]"
    ),
    Bug(
        "all rows penalise the tokens of the first", sampling.adjusted_logits, checks.check_each_row_has_its_own_filters
    ).edit("jnp.where(seen, penalised, logits)", "jnp.where(seen[:1], penalised, logits)"),
    Bug("all rows have the ranks of the first", sampling._filtered, checks.check_each_row_has_its_own_filters).edit(
        "_, token = jax.lax.top_k(logits, count)",
        "token = jax.lax.top_k(logits[:1], count)[1] + jnp.zeros((len(logits), 1), int)",
    ),
    Bug(
        "all tokens are put in order only if the last of a few passes in every row",
        sampling._filtered,
        checks.check_filters_of_many_tokens,
    ).edit("passes[:, -1].any()", "passes[:, -1].all()"),
    Bug("all rows share one draw", sampling.sample, checks.check_each_row_draws_for_itself).edit(
        "jax.random.gumbel(key, adjusted.shape, adjusted.dtype)",
        "jnp.broadcast_to(jax.random.gumbel(key, adjusted[:1].shape, adjusted.dtype), adjusted.shape)",
    ),
    Bug("the first row's tokens reach the second", attention.Attention.__call__, checks.check_causal).edit(
        "return self._output(mixed.swapaxes(1, 2))",
        "return self._output(mixed.swapaxes(1, 2).at[1].add(mixed.swapaxes(1, 2)[0] * 1e-2))",
    ),
]

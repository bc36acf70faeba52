"""Bugs to plant in `foundation`, one at a time and one for each idea, by chapter.

A name's second half is also what `check` says to an answer that has this bug.
"""

import re

from foundation.challenges.planting import Bug

_BUGS = """\
tanh: y stands where its square belongs
    activations.tanh_backward: `y**2` -> `y`
sigmoid: the factor 1 - y is forgotten
    activations.sigmoid_backward: `d_y * y * (1.0 - y)` -> `d_y * y`
relu: the mask is turned around
    activations.relu_backward: `positive, d_y, 0.0` -> `positive, 0.0, d_y`
gelu: x times the density is forgotten, the second term of the product rule
    activations.gelu_exact_backward: `_normal_cdf(x) + x * density` -> `_normal_cdf(x)`
gelu: the slope of x^3 is 3 x^2, and the 3 is forgotten
    activations.gelu_backward: `3.0 * ` -> ``
silu: s is treated as a constant
    activations.silu_backward: `(1.0 + x * (1.0 - s))` -> `1.0`
linear: the kernel is not transposed
    linear.linear_backward: `kernel.T` -> `kernel`
linear: d_kernel is divided by the rows a second time; d_y has that factor
    linear.linear_backward: `rows_x.T @ rows_d` -> `rows_x.T @ rows_d / rows_x.shape[0]`
dropout: the scale 1 / (1 - rate) is forgotten
    dropout.dropout_backward: `d_y / (1.0 - rate)` -> `d_y`
softmax: the cross terms are forgotten: p_i depends on every logit
    softmax.softmax_backward: `(d_p - jnp.sum(p * d_p, axis=-1, keepdims=True))` -> `d_p`
cross-entropy: ignored positions get a gradient
    losses.cross_entropy_backward: `jnp.where(counted, d_loss / count, 0.0)`
    -> `jnp.where(counted, d_loss / count, d_loss / count)`
layernorm: what subtracting the mean takes away is not taken out of d_n
    norms.layernorm_backward: `d_n - mean_d - n` -> `d_n - n`
layernorm: d_y is not multiplied by scale first
    norms.layernorm_backward: `d_y * scale` -> `d_y`
rmsnorm: rrms is treated as a constant, and it depends on the whole row
    norms.rmsnorm_backward: ` - n * jnp.mean(d_n * n, axis=-1, keepdims=True)` -> ``
embedding: the last occurrence of a token wins, and their gradients should add
    embedding.embedding_backward: `.add(d_x)` -> `.set(d_x)`
rope: the gradient is turned the same way, and not back
    positions.rope_backward: `-angles` -> `angles`
rope: neighbours are turned as pairs, and here a pair is (i, i + A/2)
    positions.rope_backward: `_rotate(d_y, -angles)`
    -> `jnp.stack(jnp.split(_rotate(jnp.concatenate([d_y[..., ::2], d_y[..., 1::2]], -1), -angles), 2, -1), -1)
    .reshape(d_y.shape)`
rope: pairs that turn often are slowed
    positions.slowed_pairs: `(turns - low)` -> `(low - turns)`
attention: 1 / sqrt(A) is forgotten
    attention.attention_backward: ` / math.sqrt(q.shape[-1])` -> ``
attention: d_k needs d_S transposed: its rows are keys
    attention.attention_backward: `jnp.swapaxes(d_scores, -1, -2) @ q` -> `d_scores @ q`
attention: no causal mask
    attention.causal_mask: `jnp.tril(` -> `(`, seen in test:test_multi_head_attention_equals_flax
grouped heads: the gradients of a group are added, not averaged
    grouped_heads.share_heads_backward: `jnp.sum(` -> `jnp.mean(`
grouped heads: neighbours read different key heads
    grouped_heads.share_heads_forward: `jnp.repeat(x, heads // shared, axis=1)`
    -> `jnp.tile(x, (1, heads // shared, 1, 1))`, seen in test:test_shared_key_heads_are_equal_columns
router: the sum that divides the gates is treated as a constant
    router.router_backward: `softmax_backward(d_gates, gate_cache)` -> `gate_cache[0] * d_gates`
router: plain gates get no gradient
    router.router_backward: `if not renormalised:` -> `if False:`
router: the gates' gradient is forgotten
    router.router_backward: `d_chosen = softmax_backward(d_gates, gate_cache)` -> `d_chosen = jnp.zeros_like(d_gates)`
router: gates not renormalised
    router.router_forward: `softmax_forward(chosen_logits)` -> `(jnp.take_along_axis(p, experts, axis=-1), (p,))`,
    seen in test:test_gates_of_top_1_are_p_and_of_top_2_sum_to_one
balance: f is not divided by K
    router.choice_share: `jnp.mean(onehot, axis=(1, 2), dtype=dtype)`
    -> `jnp.mean(jnp.sum(onehot, axis=2), axis=1, dtype=dtype)`,
    seen in test:test_balance_loss_is_one_at_perfect_balance
balance: a loss that ignores the routing
    router.router_forward: `jnp.sum(share * jnp.mean(p, axis=1), axis=-1)`
    -> `jnp.sum(jnp.mean(p, axis=1) ** 2, axis=-1)`
experts: of a product each factor gets the other one
    experts.swiglu_experts_backward: `d_hidden * opened` -> `d_hidden * u`
moe: gradient leaks through a dropped choice
    moe._read_slots: `jnp.pad(flat, ((0, 0), (0, 1), (0, 0)))`
    -> `jnp.pad(flat, ((0, 0), (0, 1), (0, 0)), mode="edge")`, seen in dispatch
moe: choices of all first ranks before the second (leaks the future)
    moe.assign_slots: `experts.reshape(batch, tokens * top_k)`
    -> `experts.swapaxes(1, 2).reshape(batch, tokens * top_k)`, seen in test:test_slots_worked_by_hand
moe: capacity in floating point
    moe.capacity: `Fraction(str(capacity_factor))` -> `capacity_factor`, seen in test:test_capacity_table
moe: the router's share of d_x is forgotten
    moe.moe_backward: `d_x_experts + d_x_router` -> `d_x_experts`
block: residual path forgotten
    transformer.block_backward: `d_y + d_a_branch` -> `d_a_branch`
model: auxiliary losses not averaged over layers
    transformer.model_backward: `d_z / layers` -> `d_z`
model: tied table without the head's share
    transformer.model_backward: `grads["embedding"] + d_head.T` -> `grads["embedding"]`
dense model: blocks' gradients in the order in which they come back
    dense_transformer.dense_model_backward: `d_blocks[::-1]` -> `d_blocks`
adam: no bias correction
    optimizers.adam_update: `1.0 - beta2**step` -> `1.0`, seen in adam
adamw: decay rescaled by the gradient
    optimizers.adam_update: `lambda m, g: beta1 * m + (1.0 - beta1) * g, mean, grads)`
    -> `lambda m, g, w: beta1 * m + (1.0 - beta1) * (g + weight_decay * w), mean, grads, params)`, seen in adam
dual norm: the step keeps the gradient's singular values
    steepest.dual_norm_forward: `(u @ vt,)` -> `((u * s) @ vt,)`
width: signs cancel in the sum
    steepest.output_change: `jnp.sum(jnp.abs(x))` -> `jnp.sum(x)`
adafactor: the mean of the rows forgotten
    adafactor.adafactor_update: ` / jnp.mean(row))` -> `)`, seen in adafactor
muon: tall matrices are scaled, not wide ones
    optimizers.muon_update: `w.shape[-1] / w.shape[0]` -> `w.shape[0] / w.shape[-1]`, seen in muon
merge: the old output is not rescaled
    flash_attention.merge_parts: `old[..., None] * o1` -> `o1`
flash: the row sum of undropped weights
    flash_attention.flash_attention_backward: `row_sum = jnp.sum(d_o * o, axis=-1, keepdims=True)`
    -> `row_sum = jnp.sum(d_o * o, axis=-1, keepdims=True) * (1.0 - rate)`
decoding: rotary position one off
    caching.decode_step: `heads, position)` -> `heads, position + 1)`, seen in decode
latent attention: one key is read by all heads, and only the first one answers
    latent_attention.latent_attention_backward: `jnp.sum(d_k[..., width:], axis=1)` -> `d_k[:, 0, :, width:]`
absorbed: the scale of the wider keys
    latent_attention.absorbed: `(width + r.shape[-1])` -> `keys.shape[-1]`
window: a position too many
    caching.window_mask: `s > t - window` -> `s >= t - window`
micro-batches: a mean of means
    micro_batches.accumulated_loss_forward: `shares = count / jnp.maximum(jnp.sum(count), 1)`
    -> `shares = jnp.full(parts, 1.0 / parts)`, seen in accumulated_value
upcycling: every expert gets an equal part of the network
    upcycling.copy_experts_forward: `axis=0) for` -> `axis=0) / experts for`, seen in upcycled_gradient
low rank: the scale is left out on the way back
    low_rank.low_rank_backward: `linear_backward(scale * d_y, wide)` -> `linear_backward(d_y, wide)`
filters: top-p leaves out the token that reaches it
    sampling.filtered_law: `before < top_p` -> `before + p < top_p`
draft: judged as if every token were its surest
    sampling.accepted_mass: `q * jnp.minimum(1.0, ratio)`
    -> `(q == jnp.max(q, axis=-1, keepdims=True)) * jnp.minimum(1.0, ratio)`, seen in speculative_law
bias: it is in the gate, too
    balancing.biased_choice: `jnp.where(chosen, scores, 0.0)` -> `jnp.where(chosen, scores + bias, 0.0)`
bias: a full expert is made more attractive
    balancing.bias_step: `jnp.mean(fraction) - fraction` -> `fraction - jnp.mean(fraction)`, seen in balanced_by_bias
sigmoid router: each score depends on its logit by s (1 - s), and 1 - s is forgotten
    balancing.sigmoid_router_backward: ` * (1.0 - scores)` -> ``
cost: each product has two on its way back, and one is counted
    costs.step_flops: `6 * entries` -> `4 * entries`
traffic: C is only written
    costs.steps_traffic: `n // block * 2` -> `n // block`
nearest: a tie goes away from zero
    rounding.nearest_bits: `bits + 0x7FFF + even` -> `bits + 0x8000`
codes: the scales are left out of d_x
    small_weights.coded_product_backward: `(d_y * scale) @` -> `d_y @`
gptq: rounded to nearest
    small_weights.gptq: `v = v + jnp.outer` -> `v = v + 0.0 * jnp.outer`
all_reduce: R times too large
    collectives.all_reduce_backward: `all_reduce_forward(d_y)[0]` -> `len(d_y) * all_reduce_forward(d_y)[0]`
tensor parallel: f only copies, so the ranks' parts of d_x are not added up
    collectives.tensor_parallel_backward: `copy_to_all_backward(d_copies, None)` -> `d_copies[0]`
sharded: each rank steps with the gradient of its own rows
    collectives.sharded_backward: `all_gather_backward(d_whole.reshape(len(x), -1), None)`
    -> `jnp.stack([d.reshape(len(x), -1)[r] for r, d in enumerate(d_whole)])`
expert parallel: gradients stay at home
    collectives.expert_parallel_backward: `d_answers = all_to_all_backward(d_results, None)` -> `d_answers = d_results`
pairs: an overlapping pair counts once
    byte_pairs.pair_counts: `for pair in pairwise(word):` -> `for pair in set(pairwise(word)):`
encode: what was learned last comes first
    byte_pairs.encode: `min(present)` -> `max(present)`
reward: texts are not weighed by their probability
    preferences.expected_reward_backward: `jnp.exp(log_pi) * (reward` -> `(reward`
kl: k1 as a loss
    preferences.kl_backward_by_k2: `(log_pi - log_ref)` -> `1.0`, seen in kl
dpo: both texts are made likelier
    preferences.dpo_backward: `, -d_chosen` -> `, d_chosen`
clip: the clipped branch has a gradient
    preferences.clipped_backward: `jnp.where(plain <= clipped, plain, 0.0)` -> `plain`
kl: k3 where the forward KL is meant
    preferences.kl_backward_by_k2: `(log_pi - log_ref)` -> `(1.0 - jnp.exp(log_ref - log_pi))`, seen in kl
"""
"""A bug's name; then its place, the old text and the new one, and what fails where that is not the function's own
operation."""


def _bug(lines: str) -> Bug:
    name, *change = map(str.strip, lines.splitlines())
    found = re.fullmatch(r"(\S+): `(.+)` -> `(.*)`(?:, seen in (\S+))?", " ".join(change))
    assert found, lines
    return Bug(name, *found.groups(default=""))


BUGS = [_bug(lines) for lines in re.split(r"\n(?=\S)", _BUGS.strip())]

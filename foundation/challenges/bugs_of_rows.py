"""Bugs for rows of the table that no other bug makes fail, such as an input of one position."""

from foundation.challenges.planting import Bug

BUGS_OF_ROWS = [
    Bug(
        "cross-entropy: the one-hot is subtracted twice",
        "losses.cross_entropy_backward",
        "jnp.where(onehot, d_row",
        "jnp.where(onehot, 2.0 * d_row",
        "cross_entropy",
    ),
    Bug(
        "dropout: scaled without a mask",
        "dropout.dropout_backward",
        "return d_y",
        "return d_y / (1.0 - rate)",
        "dropout",
    ),
    Bug(
        "attention: the values' gradient is scaled as the scores are",
        "attention.attention_backward",
        "-2) @ d_o",
        "-2) @ d_o / math.sqrt(cache.q.shape[-1])",
        "attention",
    ),
    Bug(
        "shared heads: a mean over all heads",
        "grouped_heads.share_heads_backward",
        "axis=2)",
        "axis=2) / d_y.shape[1]",
        "share_heads",
    ),
    Bug(
        "rope: the halves change places",
        "positions.rope_backward",
        "_rotate(d_y, -angles)",
        "jnp.roll(_rotate(d_y, -angles), angles.shape[-1], axis=-1)",
        "rope",
    ),
    Bug(
        "dual norm: the gradient itself, not of length 1",
        "steepest.dual_norm_forward",
        "(gradient / length,)",
        "(gradient,)",
        "dual_norm",
    ),
    Bug(
        "merge: the largest of the new piece", "flash_attention.merge_parts", "jnp.maximum(m1, m2)", "m2", "merge_parts"
    ),
    Bug("slots: one choice too many", "caching.kept_choices", "rank < top_k", "rank <= top_k", "kept_choices"),
    Bug("leaks: no token is an earlier one", "caching.leaks", "content, -1", "content, -tokens", "leaks"),
    Bug("leaks: a token's own choice counts", "caching.leaks", "jnp.tril(content, -1)", "content", "leaks"),
    Bug(
        "micro-batches: 0 / 0 without a target",
        "micro_batches.accumulated_loss_forward",
        "jnp.maximum(jnp.sum(count), 1)",
        "jnp.sum(count)",
        "accumulated_value",
    ),
    Bug(
        "micro-batches: divided by their number again",
        "micro_batches.accumulated_loss_forward",
        "jnp.sum(shares * ",
        "jnp.mean(shares * ",
        "accumulated_value",
    ),
    Bug(
        "filters: temperature 0 takes the unlikeliest token",
        "sampling.filtered_law",
        "return (rank == 0)",
        "return (rank == len(rank) - 1)",
        "filtered_law",
    ),
    Bug(
        "filters: times the temperature", "sampling.filtered_law", " / temperature)", " * temperature)", "filtered_law"
    ),
    Bug("biased choice: one too many", "balancing.biased_choice", "rank < top_k", "rank <= top_k", "biased_choice"),
    Bug("bfloat16: always away from zero", "rounding.nearest_bits", "0x7FFF", "0xFFFF", "nearest_bits"),
    Bug(
        "all_reduce: a mean, not a sum",
        "collectives.all_reduce_forward",
        "jnp.sum(x, axis=0)",
        "jnp.mean(x, axis=0)",
        "all_reduce",
    ),
    Bug(
        "expert parallel: answers without their gates",
        "collectives.expert_parallel_forward",
        "y = gate[..., None] * ",
        "y = ",
        "expert_parallel",
    ),
    Bug(
        "group baseline: as if the mean were of other texts",
        "preferences.group_baseline_forward",
        "(1.0 - 1.0 / group) * value",
        "value",
        "group_baseline",
    ),
]

"""Every operation at every input where it could go wrong: the rows of the table of `python -m foundation`."""

from collections.abc import Callable, Iterator

from foundation.activations import ACTIVATIONS
from foundation.checks.balance import balancing_checks
from foundation.checks.batches import batch_checks, low_rank_checks, upcycling_checks
from foundation.checks.choices import preference_checks
from foundation.checks.costs import cost_checks
from foundation.checks.dense import dense_checks
from foundation.checks.devices import collective_checks
from foundation.checks.drawing import sampling_checks
from foundation.checks.mixture import expert_checks, moe_checks, router_checks
from foundation.checks.model import block_checks, model_checks
from foundation.checks.numbers import rounding_checks
from foundation.checks.parts import (
    activation_checks,
    attention_checks,
    embedding_and_position_checks,
    grouped_head_checks,
    linear_checks,
    multi_head_checks,
    norm_checks,
    softmax_and_loss_checks,
)
from foundation.checks.pieces import byte_pair_checks
from foundation.checks.small import small_weight_checks
from foundation.checks.tiles import cache_checks, tile_checks
from foundation.checks.training import step_checks
from foundation.parity import AnyCheck

GROUPS: dict[Callable[[], Iterator[AnyCheck]], tuple[str, ...]] = {
    activation_checks: tuple(ACTIVATIONS),
    linear_checks: ("linear", "dropout"),
    softmax_and_loss_checks: ("softmax", "logsumexp", "mse", "cross_entropy"),
    norm_checks: ("layernorm", "rmsnorm"),
    embedding_and_position_checks: ("embedding", "tied_head", "learned_positions", "rope", "slowed_pairs"),
    grouped_head_checks: ("share_heads", "normalise_heads"),
    attention_checks: ("attention",),
    multi_head_checks: ("multi_head",),
    dense_checks: ("feed_forward", "dense_block", "dense_model"),
    router_checks: ("router",),
    expert_checks: ("gelu_experts", "swiglu_experts"),
    moe_checks: ("dispatch", "combine", "moe"),
    block_checks: ("block",),
    model_checks: ("model",),
    step_checks: (
        *("dual_norm", "steepest_step", "output_change", "orthogonalize", "divergence"),
        *("rank_one_fit", "adafactor", "adam", "muon"),
    ),
    tile_checks: ("merge_parts", "merged_output", "flash_attention"),
    cache_checks: ("decode", "latent_attention", "absorbed", "window_mask", "kept_choices", "leaks"),
    batch_checks: ("accumulated_loss", "accumulated_value", "grouped_balance", "balance_gap"),
    upcycling_checks: ("upcycled", "upcycled_gradient"),
    low_rank_checks: ("low_rank", "merged"),
    balancing_checks: ("biased_choice", "sigmoid_router", "balanced_by_bias"),
    sampling_checks: ("filtered_law", "accepted_mass", "speculative_law", "speculative_texts", "tokens_per_round"),
    cost_checks: ("step_flops", "steps_traffic", "power_law"),
    rounding_checks: ("nearest_bits", "drawn_bits", "mean_of_draws", "running_sum", "to_float16", "through_scale"),
    small_weight_checks: ("quantize", "coded_product", "output_error", "moved_by_one", "without", "gptq"),
    collective_checks: (
        *("copy_to_all", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"),
        *("ring_all_reduce", "tensor_parallel", "sharded", "expert_parallel"),
    ),
    byte_pair_checks: ("pair_counts", "replaced", "learn", "encode", "spelled"),
    preference_checks: (
        *("text_log_probs", "expected_reward", "group_baseline", "kl"),
        *("reverse_kl", "dpo", "clipped"),
    ),
}
"""Each group of checks, with the operations that it makes checks of."""


def all_checks() -> Iterator[AnyCheck]:
    """The whole catalogue."""
    for group in GROUPS:
        yield from group()


def checks_of(operation: str) -> Iterator[AnyCheck]:
    """The checks of one operation, made one at a time. Raises KeyError where there are none."""
    for group, operations in GROUPS.items():
        if operation in operations:
            return (check for check in group() if check.operation == operation)
    raise KeyError(operation)

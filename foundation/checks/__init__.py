"""Every operation at every input where it could go wrong: the rows of the table of `python -m foundation`."""

from collections.abc import Callable, Iterator

from foundation.activations import ACTIVATIONS
from foundation.checks.dense import dense_checks
from foundation.checks.mixture import expert_checks, moe_checks, router_checks
from foundation.checks.model import block_checks, model_checks
from foundation.checks.parts import (
    activation_checks,
    attention_checks,
    embedding_and_position_checks,
    grouped_head_checks,
    linear_checks,
    norm_checks,
    softmax_and_loss_checks,
)
from foundation.parity import Check

GROUPS: dict[Callable[[], Iterator[Check]], tuple[str, ...]] = {
    activation_checks: tuple(ACTIVATIONS),
    linear_checks: ("linear", "dropout"),
    softmax_and_loss_checks: ("softmax", "logsumexp", "mse", "cross_entropy"),
    norm_checks: ("layernorm", "rmsnorm"),
    embedding_and_position_checks: ("embedding", "tied_head", "learned_positions", "rope"),
    grouped_head_checks: ("share_heads", "normalise_heads"),
    attention_checks: ("attention", "multi_head"),
    dense_checks: ("feed_forward", "dense_block", "dense_model"),
    router_checks: ("router",),
    expert_checks: ("gelu_experts", "swiglu_experts"),
    moe_checks: ("dispatch", "combine", "moe"),
    block_checks: ("block",),
    model_checks: ("model",),
}
"""Each group of checks, with the operations that it makes checks of."""


def all_checks() -> Iterator[Check]:
    """The whole catalogue."""
    for group in GROUPS:
        yield from group()


def checks_of(operation: str) -> Iterator[Check]:
    """The checks of one operation, made one at a time. Raises KeyError where there are none."""
    for group, operations in GROUPS.items():
        if operation in operations:
            return (check for check in group() if check.operation == operation)
    raise KeyError(operation)

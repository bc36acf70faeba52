"""Checks of the transformer without experts: its network, its block, and its whole loss."""

from collections.abc import Iterator
from typing import Any

import jax

from foundation import dense_transformer as dense
from foundation import feed_forward
from foundation.checks.inputs import Draws, filled_with
from foundation.parity import Check


def dense_checks() -> Iterator[Check]:
    """The network on rows and on one row; a block of one and of two heads; the loss of two layers and of one."""
    for case, shape in (("rows", (2, 3, 4)), ("one row", (4,))):
        draws = Draws(f"feed_forward/{case}")
        inputs = (draws.normal(*shape), draws.normal(4, 5), draws.normal(4, 5), draws.normal(5, 4))
        forward, backward = feed_forward.feed_forward_forward, feed_forward.feed_forward_backward
        yield Check("feed_forward", case, forward, backward, inputs)

    for case, heads, layers in (("two heads", 2, 2), ("one head", 1, 1)):
        draws = Draws(f"dense/{case}")
        params: Any = draws.like(lambda n=layers: dense.init_dense_params(jax.random.key(0), 7, 4, n, 3), 0.5)
        block_inputs = (draws.normal(2, 4, 4), params["blocks"][0])
        forward = filled_with(dense.dense_block_forward, heads)
        yield Check("dense_block", case, forward, dense.dense_block_backward, block_inputs)
        tokens, targets = draws.integers(7, 2, 5), draws.integers(7, 2, 5)
        loss = filled_with(dense.dense_loss_forward, tokens, targets, heads)
        yield Check("dense_model", case, loss, dense.dense_loss_backward, (params,))

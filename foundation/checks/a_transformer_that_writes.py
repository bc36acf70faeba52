"""Checks of chapter 7: the transformer without experts."""

from collections.abc import Iterator

from foundation.checks.inputs import Draws, gradient
from foundation.dense_transformer import dense_block_forward, dense_loss_forward, init_dense_params
from foundation.feed_forward import feed_forward_forward
from foundation.parity import Check


def checks() -> Iterator[Check]:
    """The network on rows and on one row; a block of one and of two heads; the loss of two layers and of one."""
    for case, shape in (("rows", (2, 3, 4)), ("one row", (4,))):
        draws = Draws(f"feed_forward/{case}")
        inputs = (draws.normal(*shape), draws.normal(4, 5), draws.normal(4, 5), draws.normal(5, 4))
        yield gradient(feed_forward_forward, case, inputs)

    for case, heads, layers in (("two heads", 2, 2), ("one head", 1, 1)):
        draws = Draws(f"dense/{case}")
        params = draws.like(lambda key, n=layers: init_dense_params(key, 7, 4, n, 3))
        yield gradient(dense_block_forward, case, (draws.normal(2, 4, 4), params["blocks"][0]), heads)
        texts = draws.integers(7, 2, 5), draws.integers(7, 2, 5)
        yield gradient(dense_loss_forward, case, (params,), *texts, heads, operation="dense_model")

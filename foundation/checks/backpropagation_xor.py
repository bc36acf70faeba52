"""Checks of chapter 2: the affine map, and the squared error."""

from collections.abc import Iterator

from foundation import linear, losses
from foundation.checks.inputs import Draws, gradient
from foundation.parity import Check


def checks() -> Iterator[Check]:
    """The affine map with and without bias, at odd shapes; a mean of many squares and of one."""
    for case, shape, outputs, bias in (
        ("matrix", (4, 3), 5, True),
        ("no bias", (4, 3), 5, False),
        ("square", (3, 3), 3, True),  # where a forgotten transpose still has the right shape
        ("leading axes", (2, 3, 4), 5, True),
        ("one row", (1, 3), 2, True),
        ("vector", (3,), 2, True),
    ):
        draws = Draws(f"linear/{case}")
        x, kernel = draws.normal(*shape), draws.normal(shape[-1], outputs)
        yield gradient(linear.linear_forward, case, (x, kernel, draws.normal(outputs) if bias else None))
    draws = Draws("mse")
    for case, shape in (("matrix", (4, 3)), ("one entry", (1,))):
        yield gradient(losses.mse_forward, case, (draws.normal(*shape), draws.normal(*shape)))

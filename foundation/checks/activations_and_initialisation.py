"""Checks of chapter 3: the nonlinearities."""

from collections.abc import Iterator

import numpy as np

from foundation.activations import ACTIVATIONS, relu_forward
from foundation.checks.inputs import Draws, gradient
from foundation.parity import Check


def checks() -> Iterator[Check]:
    """Each nonlinearity at ordinary and at saturated inputs; ReLU's kink."""
    for name, (forward, _) in ACTIVATIONS.items():
        for case, shape, std in (("matrix", (5, 7), 1.0), ("saturated", (4, 6), 12.0)):
            x = Draws(f"{name}/{case}").normal(*shape, std=std)
            x = x + np.sign(x) * 0.05  # off ReLU's kink
            yield gradient(forward, case, (x,), margin=np.min(np.abs(x)))
    yield gradient(relu_forward, "kink", (np.zeros(3),), at_tie=True)

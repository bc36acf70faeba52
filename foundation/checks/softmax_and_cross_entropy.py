"""Checks of chapter 4: softmax, logsumexp and cross-entropy."""

from collections.abc import Iterator

import numpy as np

from foundation.checks.inputs import Draws, gradient
from foundation.losses import IGNORE, cross_entropy_forward
from foundation.parity import Check
from foundation.softmax import logsumexp_forward, softmax_forward


def checks() -> Iterator[Check]:
    """Softmax with masks, logsumexp, cross-entropy with ignored positions."""
    draws = Draws("softmax and losses")
    rows, mask = draws.normal(4, 6), draws.keep(4, 6)
    mask[0], mask[1] = False, True
    for case, logits, seen in (
        ("rows", rows, None),
        ("masked, one row whole", rows, mask),
        ("saturated", 40.0 * rows, None),
        ("one entry", draws.normal(3, 1), None),
        ("equal logits", np.ones((2, 5)), None),
    ):
        yield gradient(softmax_forward, case, (logits,), seen)
    for case, logits in (("rows", rows), ("saturated", 300.0 * rows)):
        yield gradient(logsumexp_forward, case, (logits,))
    targets = draws.integers(6, 2, 4)
    some = targets.copy()
    some[0, 1:3] = IGNORE
    for case, scale, wanted in (
        ("batch", 1.0, targets),
        ("ignored positions", 1.0, some),
        ("all ignored", 1.0, np.full((2, 4), IGNORE)),
        ("confident and wrong", 50.0, targets),
    ):
        yield gradient(cross_entropy_forward, case, (draws.normal(2, 4, 6, std=scale),), wanted)

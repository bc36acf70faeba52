"""Change one token at a time, and count the outputs that change.

Every call changes one position in all sequences of a batch but one. The earlier outputs of the changed sequences, and
all outputs of the sequence that stays the same, are compared bit by bit with those of the unchanged batch. Every
position is changed in turn. Where that takes too many operations, some positions are left out (`chosen_positions`).

A token is replaced by a random one or by the token before it. A leak shows only where a queue is nearly full, and only
if the change adds a token to this queue or takes one away. A copy of the token before joins the queues of its
neighbour. So copies find leaks between neighbours more often.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MOST_SEQUENCES = 6
SOME_FLOPS = 3e11
"""The number of sequences, from 2 to MOST_SEQUENCES, is chosen so that a test takes about as many operations."""
MOST_FLOPS = 2e12
"""If changing every position in 2 sequences takes more operations, some positions are left out. At 200 GFLOP/s these
are ten seconds."""


class PerturbationResult(NamedTuple):
    """What changed when single tokens were changed, summed over all changes."""

    changes: int
    """Tokens that were changed, one at a time in a sequence."""
    sequences: int
    positions: int
    """Positions that were changed in turn."""
    tokens: int
    """T, positions of a sequence."""
    earlier: int
    """Outputs before the changed token that changed."""
    other_row: int
    """Outputs of the unchanged sequence that changed."""
    later: int
    """Changed outputs at the changed token and after it. If this is 0, the test changed nothing."""
    dropped: float
    """Largest share of (token, choice) pairs that got no slot, over the layers."""

    def __str__(self) -> str:
        where = "each" if self.positions == self.tokens else f"{self.positions:,}"
        return (
            f"{self.changes:,} changes of one token, at {where} of {self.tokens:,} positions, in {self.sequences} "
            f"sequences: {self.earlier:,} earlier outputs changed, and {self.other_row:,} of the sequence that was "
            f"left alone; {self.dropped:.0%} of the choices dropped"
        )

    @property
    def causal(self) -> bool:
        """Whether a later output changed, and no earlier one, and none of the sequence that was left alone."""
        return self.earlier == 0 and self.other_row == 0 and self.later > 0


def sequences_for(flops: float, tokens: int) -> int:
    """Sequences of the batch, if a pass over one sequence of `tokens` tokens takes `flops` operations."""
    return int(np.clip(SOME_FLOPS / (flops * tokens), 2, MOST_SEQUENCES))


def chosen_positions(flops: float, sequences: int, tokens: int, crowded: Callable[[], np.ndarray]) -> np.ndarray:
    """The positions to change, sorted: all of them, or if these take more than MOST_FLOPS operations, evenly spaced
    ones and `crowded()`, the positions that must not be left out."""
    allowed = int(MOST_FLOPS / (flops * sequences))
    if allowed >= tokens:
        return np.arange(tokens)
    evenly = np.linspace(0, tokens - 1, max(allowed, 2)).round().astype(int)
    return np.union1d(evenly, crowded())


def crowded_positions(place: np.ndarray, slots: int) -> np.ndarray:
    """Positions of the tokens that take the last slot of a queue or are the first to find it full, and the positions
    before and after them. `place [*L, B, T, K]` has the place of each pair in its queue, from 0."""
    tokens = place.shape[-2]
    near = np.argwhere((place == slots - 1) | (place == slots))[:, -2]
    around = np.concatenate([near - 1, near, near + 1])
    return np.unique(around[(around >= 0) & (around < tokens)])


def count_changes(
    run: Callable[[Any], tuple[Any, Any]], before: np.ndarray, other: np.ndarray, positions: np.ndarray | None = None
) -> PerturbationResult:
    """Compare `run(before)` with runs in which one position is changed in all sequences but one.

    `run` returns outputs [B, T, ...] and the share of pairs dropped. Half of the new tokens are taken from `other`, the
    others are copies of the token before. All positions are changed unless some are given. B must be at least 2.
    """
    rows, tokens = before.shape[:2]
    positions = np.arange(tokens) if positions is None else positions
    rng = np.random.default_rng(1)
    unchanged, dropped = (np.asarray(a) for a in run(before))
    changes = 0
    counts = np.zeros(3, int)
    for t in positions.tolist():
        alone = int(rng.integers(rows))
        after = before.copy()
        after[:, t] = _replaced(before, other, t, rng.random(rows) < 0.5)
        after[alone] = before[alone]
        changes += int((after != before).reshape(rows, -1).any(-1).sum())
        differs = _bits_differ(np.asarray(run(after)[0]), unchanged)
        counts[1] += differs[alone].sum()
        differs[alone] = False
        counts += differs[:, :t].sum(), 0, differs[:, t:].sum()
    earlier, other_row, later = (int(n) for n in counts)
    return PerturbationResult(
        changes, rows, len(positions), tokens, earlier, other_row, later, float(dropped.max(initial=0))
    )


def _replaced(before: np.ndarray, other: np.ndarray, t: int, copied: np.ndarray) -> np.ndarray:
    """The new tokens at position t: a copy of the token before where `copied` and where that is another token, else the
    token of `other`."""
    old, previous = before[:, t], before[:, max(t - 1, 0)]
    differs = (previous != old).reshape(len(old), -1).any(-1)
    chosen = (copied & differs).reshape(-1, *[1] * (old.ndim - 1))
    return np.where(chosen, previous, other[:, t])


def _bits_differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where any bit of an output differs, [B, T]. Zeros of different sign differ, and equal NaNs do not."""
    bits = f"u{a.dtype.itemsize}"
    differs = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
    return differs.reshape(*a.shape[:2], -1).any(-1)

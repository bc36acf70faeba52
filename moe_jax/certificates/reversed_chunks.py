"""A leak between neighbours, to test that the causality test finds it. No run can choose it.

Slots are given to chunks of tokens in their order, but within a chunk to the later token first. So a token can lose its
slot to a token at most `chunk` - 1 positions later. The known rules of `model/moe/variants.py` act over any distance,
so they are much easier to find.
"""

from dataclasses import dataclass

import numpy as np

from moe_jax.model.moe.dispatch import Capacity, Dispatch, QueuedPairs
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.queues import queue_positions
from moe_jax.model.moe.router import Routing


@dataclass(frozen=True)
class ReversedChunks(Capacity):
    """Every expert has `slots` slots for each sequence, and the later tokens of a chunk get them first."""

    chunk: int = 2

    def trace(self, routing: Routing) -> QueuedPairs:
        # Reversing the chunks twice gives the old order back.
        order = reversed_order(routing.valid.shape[1], self.chunk)
        experts = routing.logits.shape[-1]
        position = queue_positions(routing.expert_index[:, order], routing.valid[:, order], experts)[:, order]
        return QueuedPairs(position, (position < self.slots) & routing.valid[..., None])


def reversed_order(tokens: int, chunk: int) -> np.ndarray:
    """The positions 0 to `tokens` - 1, reversed within each chunk. The last chunk may be shorter."""
    return np.concatenate([np.arange(first, min(first + chunk, tokens))[::-1] for first in range(0, tokens, chunk)])


class ReversedPairsMoE(MoE):
    """An MoE layer that trains by `ReversedChunks` of 2 tokens."""

    chunk = 2

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        chosen = super().dispatch_for(mode, batch, tokens)
        return ReversedChunks(chosen.slots, self.chunk) if isinstance(chosen, Capacity) else chosen


class ReversedFoursMoE(ReversedPairsMoE):
    """The same for chunks of 4 tokens."""

    chunk = 4

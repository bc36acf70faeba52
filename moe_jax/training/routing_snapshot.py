"""Record the routing of the same validation tokens at each evaluation. The report shows how the experts develop.

`runs/records.py` describes the fields of a snapshot, and reads them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig, UserError
from moe_jax.inference.traced_pass import (
    ShardMapWrapper,
    check_routed,
    choice_totals,
    make_traced_pass,
    router_entropy,
)
from moe_jax.model.transformer import Params

TRACED_TOKENS = 2_048
"""First tokens of the stream that are routed, at most."""
SHOWN_TOKENS = 512
"""First tokens whose experts are kept one by one, at most."""

type Tracer = Callable[[Params], dict[str, Any]]


def make_tracer(
    config: ModelConfig, graphdef: nnx.GraphDef, tokens: np.ndarray, spread: ShardMapWrapper = lambda function: function
) -> Tracer | None:
    """A function of the parameters that routes the first tokens of a stream and returns a snapshot.

    It routes whole windows of T tokens, up to TRACED_TOKENS tokens (at least one window), with the dispatch of
    training, in one jitted call. None for a model without routers. `spread` makes it a program
    of several devices (`traced_pass.ShardMapWrapper`).
    """
    try:
        check_routed(config)
    except UserError:
        return None
    width = config.seq_len
    windows = max(min(len(tokens), TRACED_TOKENS) // width, 1)
    stream = np.resize(np.asarray(tokens[: windows * width], np.int32), (windows, width))
    step = make_traced_pass(graphdef, spread=spread)

    def trace(params: Params) -> dict[str, Any]:
        decisions = step(params, stream).decisions
        probs, expert, keep = (np.asarray(getattr(decisions, name)) for name in ("probs", "expert_index", "keep"))
        choices = expert.reshape(len(expert), -1)
        shown = stream.reshape(-1)[:SHOWN_TOKENS]
        return {
            "tokens": shown.tolist(),
            "expert": choices[:, : len(shown) * config.routing.top_k].tolist(),
            "load": np.round(choice_totals(expert, config.experts) / choices.shape[1], 4).tolist(),
            "entropy": np.round(router_entropy(probs), 4).tolist(),
            "drop": np.round(1 - keep.mean((1, 2, 3)), 4).tolist(),
        }

    return trace

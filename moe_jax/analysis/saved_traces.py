"""What a run saves of its routing while it trains: the decisions of its routers on the same validation tokens, at each
evaluation. The report shows from them how the experts came to be.

`RUN/traces/step_00000200.json` holds

    step, tokens            the step, and the ids of the first SHOWN_TOKENS tokens
    expert                  for each layer the choices of these tokens, a flat list of n*K
    load, entropy, drop     [L][E], [L], [L], over TRACED_TOKENS tokens: as in `report_corpus.CorpusRouting`
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.analysis.routing_trace import check_routed, choice_totals, make_decision_step, router_entropy
from moe_jax.config import ModelConfig, UserError
from moe_jax.model.transformer import Params

TRACED_TOKENS = 2_048
SHOWN_TOKENS = 512

type Tracer = Callable[[Params], dict[str, Any]]


def make_tracer(config: ModelConfig, graphdef: nnx.GraphDef, tokens: np.ndarray) -> Tracer | None:
    """The function that routes the beginning of a stream under the training capacity, in whole windows of T, in one
    jitted call. None for a model without a router whose tokens choose."""
    try:
        check_routed(config)
    except UserError:
        return None
    width = config.seq_len
    windows = max(min(len(tokens), TRACED_TOKENS) // width, 1)
    stream = np.resize(np.asarray(tokens[: windows * width], np.int32), (windows, width))
    step = make_decision_step(graphdef)

    def trace(params: Params) -> dict[str, Any]:
        decisions = step(params, stream)
        probs, expert, keep = (np.asarray(getattr(decisions, name)) for name in ("probs", "expert", "keep"))
        choices = expert.reshape(len(expert), -1)
        shown = stream.reshape(-1)[:SHOWN_TOKENS]
        return {
            "tokens": shown.tolist(),
            "expert": choices[:, : len(shown) * config.top_k].tolist(),
            "load": np.round(choice_totals(expert, config.experts) / choices.shape[1], 4).tolist(),
            "entropy": np.round(router_entropy(probs), 4).tolist(),
            "drop": np.round(1 - keep.mean((1, 2, 3)), 4).tolist(),
        }

    return trace


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """The saved traces of a run, earliest first; a damaged one is left out."""
    found = []
    for path in sorted((folder / "traces").glob("step_*.json")):
        try:
            trace = json.loads(path.read_text(encoding="utf-8"))
            found.append({name: trace[name] for name in ("step", "tokens", "expert", "load", "entropy", "drop")})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda trace: trace["step"])

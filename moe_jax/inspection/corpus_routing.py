"""What the routers of a trained model do on its validation text: load, drops, co-activation, flow.

The model reads at most CORPUS_TOKENS tokens once, with the dispatch of training and its capacity, if it has one. The
decisions are counted on the host. Choices are counted before drops, so the counts show what the router prefers. Only
`dropped` counts drops.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig, capacity
from moe_jax.inference.traced_pass import choice_mask, make_traced_pass, router_entropy, tokens_at_once
from moe_jax.model.costs import count_parameters, totals
from moe_jax.runs.load import LoadedRun
from moe_jax.system.terminal import progress_bar

CORPUS_TOKENS = 16_384
MOST_FLOPS = 6e12
"""Forward operations that the counts may take. A large model reads fewer tokens, but at least one window."""
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""Capacity factors for which drops are computed. The run's own factor is added if the run has a capacity."""
STARVED = 0.1
"""An expert with less than this share of its fair load is called starved. An expert that no token chose is dead."""


@dataclass(frozen=True)
class CorpusRouting:
    """Counts over W windows of T tokens, N = W*T tokens in all."""

    config: ModelConfig
    tokens: int
    """N."""
    by_token: np.ndarray
    """int [L, E, V]: how often each token of the vocabulary chose each expert."""
    token_counts: np.ndarray
    """int [V]: occurrences."""
    by_window: np.ndarray
    """int [L, W, E]: choices of each expert in each window."""
    together: np.ndarray
    """int [L, E, E]: tokens that chose both experts. The diagonal counts the tokens that chose the expert."""
    flow: np.ndarray
    """int [L-1, E, E]: entry [l, i, j] counts the tokens whose first choice is i in layer l and j in layer l + 1."""
    entropy: np.ndarray
    """float [L]: entropy of the router, 0 to 1; see `router_entropy`."""
    dropped: np.ndarray
    """float [L]: share of the choices that found no slot."""

    @property
    def load(self) -> np.ndarray:
        """float [L, E]: share of the choices."""
        return self.by_window.sum(1) / (self.tokens * self.config.routing.top_k)

    def drop_fraction(self, factor: float) -> np.ndarray:
        """float [L]: share of these choices that a capacity factor would drop.

        In each window an expert keeps C choices, so the count is exact for the routing as it is. It ignores that other
        drops in one layer would change the inputs, and so the routing, of later layers.
        """
        c = self.config
        slots = capacity(c.seq_len, c.experts, c.routing.top_k, factor)
        return np.maximum(self.by_window - slots, 0).sum((1, 2)) / (self.tokens * c.routing.top_k)


def corpus_routing(run: LoadedRun, tokens: np.ndarray) -> CorpusRouting:
    """Route at most CORPUS_TOKENS tokens of a stream in windows of T. A stream below T is repeated to T tokens."""
    c = run.config.model
    width = c.seq_len
    most = min(len(tokens), CORPUS_TOKENS, int(MOST_FLOPS / (2 * totals(count_parameters(c)).multiplied)))
    windows = max(most // width, 1)
    stream = np.resize(np.asarray(tokens[: windows * width], np.int32), (windows, width))
    batch = min(max(tokens_at_once(c) // width, 1), windows)
    step = make_traced_pass(run.graphdef)
    parts: list[dict[str, np.ndarray]] = []
    with progress_bar("routing the validation text", -(-windows // batch)) as advance:
        for first in range(0, windows, batch):
            group = stream[first : first + batch]
            trace = step(run.params, np.resize(group, (batch, width))).decisions
            parts.append(
                {name: np.asarray(getattr(trace, name))[:, : len(group)] for name in ("probs", "expert_index", "keep")}
            )
            advance(1)
    probs, expert, keep = (
        np.concatenate([p[name] for p in parts], axis=1) for name in ("probs", "expert_index", "keep")
    )
    return count_routing(c, stream, probs, expert, keep)


def count_routing(
    config: ModelConfig, stream: np.ndarray, probs: np.ndarray, expert: np.ndarray, keep: np.ndarray
) -> CorpusRouting:
    """Count the decisions: stream int [W, T], probs float [L, W, T, E], expert int and keep bool [L, W, T, K]."""
    layers, experts, vocabulary = len(expert), config.experts, config.vocab_size
    hits = choice_mask(expert, experts)
    flat = stream.reshape(-1)
    by_token = np.zeros((layers, experts, vocabulary), np.int32)
    together = np.zeros((layers, experts, experts), np.int64)
    flow = np.zeros((layers - 1, experts, experts), np.int64)
    for layer in range(layers):
        chosen = hits[layer].reshape(-1, experts)
        together[layer] = chosen.T.astype(np.int64) @ chosen
        for e in range(experts):
            by_token[layer, e] = np.bincount(flat[chosen[:, e]], minlength=vocabulary)
        if layer:
            first = expert[layer - 1 : layer + 1, ..., 0].reshape(2, -1)
            np.add.at(flow[layer - 1], (first[0], first[1]), 1)
    return CorpusRouting(
        config=config,
        tokens=stream.size,
        by_token=by_token,
        token_counts=np.bincount(flat, minlength=vocabulary),
        by_window=hits.sum(2),
        together=together,
        flow=flow,
        entropy=router_entropy(probs),
        dropped=1 - keep.mean((1, 2, 3)),
    )


def dead_experts(corpus: CorpusRouting) -> list[dict[str, Any]]:
    """The starved and the dead experts: `{"layer", "expert", "load", "dead"}`. `load` is divided by the fair load."""
    relative = corpus.load * corpus.config.experts
    return [
        {"layer": int(layer), "expert": int(e), "load": round(float(relative[layer, e]), 4), "dead": bool(load == 0)}
        for (layer, e), load in np.ndenumerate(relative)
        if load < STARVED
    ]


def corpus_data(corpus: CorpusRouting) -> dict[str, Any]:
    """What the report shows of the counts, ready for JSON.

    `drops` is the share that was really dropped in this pass, by layer. It is 0 in a run without a capacity; the
    run's capacity factor is then left out of `drops_by_factor`.
    """
    own = set() if corpus.config.dropless else {corpus.config.routing.capacity_factor}
    factors = sorted({*FACTORS, *own})
    rounded = lambda array: np.round(array, 4).tolist()  # noqa: E731
    return {
        "tokens": corpus.tokens,
        "windows": corpus.by_window.shape[1],
        "load": rounded(corpus.load),
        "entropy": rounded(corpus.entropy),
        "together": corpus.together.tolist(),
        "flow": corpus.flow.tolist(),
        "drops": rounded(corpus.dropped),
        "drops_by_factor": {"factor": factors, "drop": [rounded(corpus.drop_fraction(f)) for f in factors]},
        "dead": dead_experts(corpus),
    }

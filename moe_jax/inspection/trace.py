"""Where every token of a text went: the routing decisions of the training pass, returned as values.

`routing_trace` runs the forward pass of training, with its capacity, but without dropout and router noise. The model is
called with the static argument `trace`. A text is cut into windows of T tokens, as in training. The last window is
padded on the right. The model is causal, so the padding changes nothing before it, and it is cut off again.

In a notebook:

    run = moe_jax.load_run("runs/nano")
    trace = run.trace("Once upon a time there was a dragon.")
    trace.expert_index[0]    # [N, K]: the experts that layer 0 chose
    trace                    # shows the text, coloured by expert
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig, UserError
from moe_jax.data.tokenizers import token_pieces
from moe_jax.inference.traced_pass import TracedStep, check_routed, choice_totals, make_traced_pass, tokens_at_once
from moe_jax.runs.load import LoadedRun

DECISIONS = ("probs", "expert_index", "gate", "slot", "keep")
"""Fields of a trace with axes [L, N, ...]."""
WINDOWS = 8
"""Most windows of one call of the compiled program."""
LONGEST = 16_384
"""Most tokens of a traced text. A page with more tokens would open slowly."""
ATTENTION_TOKENS = 1_024
"""Attention weights are kept only for windows that begin before this token: each layer and head has T x T of them in
one window."""
MOST_ATTENTION = 2**29
"""Most bytes of the attention weights of one window, in float32."""
ATTENTION_ENTRIES = 200_000
"""Most attention weights of a page. Each token, head and layer keeps a few of them, fewer in a long text."""
MOST_PER_TOKEN = 8
LEAST_PERCENT = 2


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of one text of N tokens, on the host. The first token is the separator before the text."""

    config: ModelConfig
    tokens: np.ndarray
    """int [N]: token ids."""
    pieces: list[str]
    """The text of each token. Bytes that are not a whole character are written in hexadecimal: <F0 9F>."""
    probs: np.ndarray
    """float32 [L, N, E]: the router's softmax."""
    expert_index: np.ndarray
    """int [L, N, K]: the chosen experts, best first."""
    gate: np.ndarray
    """float32 [L, N, K]: the gates of these experts."""
    slot: np.ndarray
    """int [L, N, K]: position in the expert's queue of this window, from 0."""
    keep: np.ndarray
    """bool [L, N, K]: whether the choice got a slot."""
    loss: np.ndarray
    """float32 [N]: cross-entropy of the token *after* this one, in nats; NaN for the last token."""
    next_token: np.ndarray
    """int [N, n]: the n = 5 likeliest tokens after each token, best first."""
    next_prob: np.ndarray
    """float32 [N, n]: their probabilities."""
    attention: list[np.ndarray]
    """float32 [L, H, n, n] for each of the first windows (see ATTENTION_TOKENS): axis 2 the query, axis 3 the key."""

    @property
    def capacity(self) -> int:
        """C, slots of an expert in one window."""
        return self.config.capacity

    @property
    def drop_fraction(self) -> np.ndarray:
        """float [L]: share of the choices that got no slot."""
        return 1 - self.keep.mean((1, 2))

    def load(self) -> np.ndarray:
        """int [L, E]: how often each expert was chosen, before drops."""
        return choice_totals(self.expert_index, self.config.experts)

    def __repr__(self) -> str:
        return f"RoutingTrace({len(self.tokens)} tokens, {len(self.probs)} layers, {self.config.experts} experts)"

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows: the colour of each expert, and for each layer the text coloured by the first
        choices."""
        hues = [f"hsl({360 * e // self.config.experts} 70% 50% / .3)" for e in range(self.config.experts)]
        key = (f'<span style="background:{hue};padding:0 .5em">{e}</span>' for e, hue in enumerate(hues))
        rows = [f"<p>Experts: {' '.join(key)}</p>"]
        for layer, experts in enumerate(self.expert_index[..., 0]):
            spans = (
                f'<span title="expert {e}" style="background:{hues[e]}">{html.escape(piece)}</span>'
                for piece, e in zip(self.pieces, experts, strict=True)
            )
            rows.append(f"<p style='white-space:pre-wrap'><b>Layer {layer}</b><br>{''.join(spans)}</p>")
        return "".join(rows)


def routing_trace(run: LoadedRun, text: str, step: TracedStep | None = None) -> RoutingTrace:
    """The routing of a text by a trained model. `step` may be given to use a compiled program again.

    Raises UserError for a dense baseline, and for a text with more than LONGEST tokens.
    """
    check_routed(run.config.model)
    tokens = np.array([run.tokenizer.separator_id, *run.tokenizer.encode(text)], np.int32)
    if len(tokens) > LONGEST:
        raise UserError(f"--text: {len(tokens):,} tokens, at most {LONGEST:,} can be shown; give a part of the text")
    return trace_tokens(run, tokens, step)


def make_trace_step(graphdef: nnx.GraphDef) -> TracedStep:
    """The compiled pass of a trace: the dispatch of training, with predictions and attention weights."""
    return make_traced_pass(graphdef, predict=True, attention=True)


def trace_tokens(run: LoadedRun, tokens: np.ndarray, step: TracedStep | None = None) -> RoutingTrace:
    """The routing of token ids int [N], N >= 1, in windows of T. Raises UserError if a router gives NaN."""
    step = step or make_trace_step(run.graphdef)
    width = window_width(run.config.model, len(tokens), attention=True)
    texts = list(windows(tokens, width))
    predicted: list[dict[str, np.ndarray]] = []
    decided: list[dict[str, np.ndarray]] = []
    attention: list[np.ndarray] = []
    size = min(WINDOWS, len(texts), max(tokens_at_once(run.config.model) // width, 1))
    for first in range(0, len(texts), size):
        group = texts[first : first + size]
        padded = np.stack([w for w, _ in group] + [group[0][0]] * (size - len(group)))
        decisions, predictions = jax.tree.map(np.asarray, step(run.params, padded))
        next_prob = np.exp(predictions.logprob)
        for b, (_, n) in enumerate(group):
            rows = {"loss": predictions.loss, "next_token": predictions.likeliest, "next_prob": next_prob}
            predicted.append({name: array[b, :n] for name, array in rows.items()})
            decided.append({name: getattr(decisions, name)[:, b, :n] for name in DECISIONS})
            if (first + b) * width < ATTENTION_TOKENS:
                attention.append(decisions.attention[:, b, :, :n, :n])
    layered = {name: np.concatenate([p[name] for p in decided], axis=1) for name in DECISIONS}
    if not np.isfinite(layered["probs"]).all():
        raise UserError(f"the routers of step {run.checkpoint.step} give NaN; load an earlier checkpoint with --step")
    joined = {name: np.concatenate([p[name] for p in predicted]) for name in predicted[0]}
    joined["loss"][-1] = np.nan
    pieces = token_pieces(run.tokenizer, tokens)
    return RoutingTrace(run.config.model, tokens, pieces, attention=attention, **joined, **layered)


def attention_data(trace: RoutingTrace) -> dict[str, Any]:
    """The largest attention weights of each token and head, in whole percent, and not below LEAST_PERCENT."""
    heads, layers = trace.config.heads, trace.config.layers
    shown = sum(window.shape[2] for window in trace.attention)
    most = max(1, min(MOST_PER_TOKEN, ATTENTION_ENTRIES // (shown * heads * layers)))
    weights: list[list[list[list[int]]]] = [[[] for _ in range(heads)] for _ in range(layers)]
    for window in trace.attention:
        percent = np.rint(100 * window).astype(int)
        order = np.argsort(-percent, axis=-1, kind="stable")[..., :most]
        top = np.take_along_axis(percent, order, axis=-1)
        back = np.arange(window.shape[2])[:, None] - order
        for layer, head, i in np.ndindex(order.shape[:3]):
            chosen = top[layer, head, i] >= LEAST_PERCENT
            pairs = np.stack([back[layer, head, i][chosen], top[layer, head, i][chosen]], axis=1)
            weights[layer][head].append(pairs.reshape(-1).tolist())
    return {"heads": heads, "tokens": shown, "weights": weights}


def window_width(config: ModelConfig, tokens: int, attention: bool = False) -> int:
    """T; or for a model that drops nothing, less for a short text: a multiple of 64 of at least so many tokens, and no
    more than MOST_ATTENTION allows if attention is kept. The slots of a capacity are those of T tokens."""
    if not config.dropless:
        return config.seq_len
    most = 64 * max(int((MOST_ATTENTION / (4 * config.layers * config.heads)) ** 0.5) // 64, 1)
    return min(config.seq_len, -(-tokens // 64) * 64, most if attention else config.seq_len)


def windows(tokens: np.ndarray, seq_len: int) -> Iterator[tuple[np.ndarray, int]]:
    """Each window with the token that follows it, int [T+1], padded with 0; and how many of its T tokens are text."""
    for first in range(0, len(tokens), seq_len):
        part = tokens[first : first + seq_len + 1]
        yield np.pad(part, (0, seq_len + 1 - len(part))), min(len(part), len(tokens) - first, seq_len)

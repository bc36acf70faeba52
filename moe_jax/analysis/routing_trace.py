"""Where every token of a text went: the decisions of the training pass itself, returned as values.

`routing_trace` runs the forward pass that the training step differentiates, with its capacity, under the static
flag `trace` of the model. A text is cut into windows of T tokens, as in training; the last is padded on the right,
which causality makes harmless, and the padding is cut off again.

In a notebook:

    run = moe_jax.load_run("runs/nano")
    trace = routing_trace(run, "Once upon a time there was a dragon.")
    trace.expert[0]          # [N, K]: the experts that layer 0 chose
    trace                    # shows the text, coloured by expert
    trace.figures()          # the same pictures as in the report folder of a run
"""

import html
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from moe_jax.config import ModelConfig, UserError, capacity
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.moe import LayerTrace, Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.training.loss import blocked_token_losses
from moe_jax.training.run import Run

WINDOWS = 8
"""Windows that one call of the traced program takes."""
LONGEST = 16_384
"""Most tokens of a traced text: a page of more would be slow to open."""
ATTENTION_TOKENS = 1_024
"""Attention weights, T for each token, head and layer, are kept for windows that begin within these first tokens."""

type TraceStep = Callable[[Params, ArrayLike], tuple[LayerTrace, jax.Array]]


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of one text of N tokens, on the host. The first token is the separator that starts a story."""

    config: ModelConfig
    tokens: np.ndarray
    """int [N]: token ids."""
    pieces: list[str]
    """The text of each token; bytes that are no whole character are spelled in hexadecimal, as <F0 9F>."""
    probs: np.ndarray
    """float32 [L, N, E]: the router's softmax."""
    expert: np.ndarray
    """int [L, N, K]: the chosen experts, best first."""
    gate: np.ndarray
    """float32 [L, N, K]: their weights."""
    slot: np.ndarray
    """int [L, N, K]: place in the expert's queue within the window, from 0."""
    keep: np.ndarray
    """bool [L, N, K]: whether the choice found a slot."""
    loss: np.ndarray
    """float32 [N]: nats of surprise at the token *after* this one; NaN for the last."""
    attention: list[np.ndarray]
    """For each window float32 [L, H, n, n]: the last axis is looked at, the one before it looks. The first windows."""

    @property
    def capacity(self) -> int:
        """C, slots of an expert in one window."""
        c = self.config
        return capacity(c.seq_len, c.experts, c.top_k, c.capacity_factor)

    @property
    def drop_fraction(self) -> np.ndarray:
        """float [L]: share of the choices that found no slot."""
        return 1 - self.keep.mean((1, 2))

    def load(self) -> np.ndarray:
        """int [L, E]: how often each expert was chosen, before drops."""
        return choice_totals(self.expert, self.config.experts)

    def figures(self) -> dict[str, Any]:
        """Matplotlib figures by name, which a notebook shows inline (extra `plots`)."""
        from moe_jax.analysis.plots import trace_figures

        return trace_figures(self)

    def _repr_html_(self) -> str:
        """The text coloured by the first choice, a paragraph a layer: what a notebook shows."""
        hues = [f"hsl({360 * e // self.config.experts} 70% 50% / .3)" for e in range(self.config.experts)]
        rows = []
        for layer, experts in enumerate(self.expert[..., 0]):
            spans = (
                f'<span title="expert {e}" style="background:{hues[e]}">{html.escape(piece)}</span>'
                for piece, e in zip(self.pieces, experts, strict=True)
            )
            rows.append(f"<p style='white-space:pre-wrap'><b>Layer {layer}</b><br>{''.join(spans)}</p>")
        return "".join(rows)


def choice_totals(expert: np.ndarray, experts: int) -> np.ndarray:
    """int [L, E]: choices of each expert, from the choices [L, N, K]."""
    return np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in expert])


def router_entropy(probs: np.ndarray) -> np.ndarray:
    """float [L]: mean entropy of the router's softmax [L, ..., E] over ln E: 0 is certain, 1 knows nothing."""
    nats = -(probs * np.log(np.maximum(probs, np.finfo(np.float32).tiny))).sum(-1)
    return nats.reshape(len(probs), -1).mean(1) / math.log(max(probs.shape[-1], 2))


def make_trace_step(graphdef: nnx.GraphDef) -> TraceStep:
    """The jitted (params, tokens int [B, T+1]) -> (decisions, nats [B, T]): the training pass, forward only."""

    def step(params: Params, tokens: jax.Array) -> tuple[LayerTrace, jax.Array]:
        model = merge(graphdef, params)
        hidden, stats, _ = model(tokens[:, :-1], Mode.TRAIN, trace=True)
        targets = tokens[:, 1:].reshape(-1)
        losses = blocked_token_losses(hidden.reshape(-1, hidden.shape[-1]), model.head_matrix(), targets)
        assert stats is not None and stats.trace is not None  # noqa: PT018, a dense twin is refused before
        return stats.trace, losses.reshape(tokens.shape[0], -1)

    return jax.jit(step)


def make_decision_step(graphdef: nnx.GraphDef) -> Callable[[Params, ArrayLike], LayerTrace]:
    """The jitted (params, tokens int [B, T]) -> decisions alone, without attention weights and vocabulary head."""

    def step(params: Params, tokens: jax.Array) -> LayerTrace:
        _, stats, _ = merge(graphdef, params)(tokens, Mode.TRAIN, trace=True)
        assert stats is not None and stats.trace is not None  # noqa: PT018, a dense twin is refused before
        return stats.trace._replace(attention=None)

    return jax.jit(step)


def routing_trace(run: Run, text: str) -> RoutingTrace:
    """The routing of a text by a trained model. Raises UserError for a dense twin and for a text too long to show."""
    check_routed(run.config.model)
    tokens = np.array([run.tokenizer.separator_id, *run.tokenizer.encode(text)], np.int32)
    if len(tokens) > LONGEST:
        raise UserError(f"--text: {len(tokens):,} tokens, at most {LONGEST:,} can be shown; give a part of the text")
    return trace_tokens(run, tokens)


def check_routed(config: ModelConfig) -> None:
    """Raises UserError where there is no router to look at, or none whose tokens choose."""
    if config.dense != "none":
        raise UserError(f"--model.dense {config.dense}: a dense twin has no router to look into; name an MoE run")
    if config.priority == "leaky-expert-choice":
        raise UserError(
            f"--model.priority {config.priority}: experts choose tokens there; name a run of another priority"
        )


def trace_tokens(run: Run, tokens: np.ndarray) -> RoutingTrace:
    """The routing of token ids [N], N >= 1, cut into windows of T. Raises UserError where a router gives NaN."""
    step = make_trace_step(run.graphdef)
    windows = list(_windows(tokens, run.config.model.seq_len))
    parts: list[dict[str, np.ndarray]] = []
    attention: list[np.ndarray] = []
    rows = min(WINDOWS, len(windows))
    for first in range(0, len(windows), rows):
        group = windows[first : first + rows]
        padded = np.stack([w for w, _ in group] + [group[0][0]] * (rows - len(group)))
        trace, losses = jax.tree.map(np.asarray, step(run.params, jnp.asarray(padded)))
        for b, (_, n) in enumerate(group):
            names = ("probs", "expert", "gate", "slot", "keep")
            parts.append({name: getattr(trace, name)[:, b, :n] for name in names} | {"loss": losses[b, :n]})
            if (first + b) * run.config.model.seq_len < ATTENTION_TOKENS:
                attention.append(trace.attention[:, b, :, :n, :n])
    loss = np.concatenate([p["loss"] for p in parts])
    loss[-1] = np.nan
    layered = {k: np.concatenate([p[k] for p in parts], axis=1) for k in ("probs", "expert", "gate", "slot", "keep")}
    if not np.isfinite(layered["probs"]).all():
        raise UserError(f"the routers of step {run.checkpoint.step} give NaN; load an earlier checkpoint with --step")
    pieces = token_pieces(run.tokenizer, tokens)
    return RoutingTrace(run.config.model, tokens, pieces, loss=loss, attention=attention, **layered)


def _windows(tokens: np.ndarray, seq_len: int) -> Iterator[tuple[np.ndarray, int]]:
    """Each window as int [T+1], with the token that follows it, padded with 0; and how many of its T are text."""
    for first in range(0, len(tokens), seq_len):
        part = tokens[first : first + seq_len + 1]
        yield np.pad(part, (0, seq_len + 1 - len(part))), min(len(part), len(tokens) - first, seq_len)


def token_pieces(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """The text of each token alone; where its bytes are no whole characters, the bytes in hexadecimal."""

    def piece(token: int) -> str:
        raw = tokenizer.decode_bytes([token])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"<{raw.hex(' ').upper()}>"

    return [piece(int(t)) for t in tokens]

"""What is measured between training steps: loss and bits per byte of a token stream, and a snapshot of the routing.

Every token after the first is predicted exactly once (`data/batches.py`), and nothing is dropped. A snapshot routes the
same validation tokens at each evaluation, and the report shows from them how the experts develop. `runs/records.py`
describes the fields of a snapshot, and reads them.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig
from moe_jax.data.batches import evaluation_windows, text_bytes
from moe_jax.data.tokenizers import Stream
from moe_jax.inference.traced_pass import ShardMapWrapper, choice_totals, make_traced_pass, router_entropy
from moe_jax.model.kernels.cross_entropy import blocked_token_losses
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.parallel.layout import AXES, Layout
from moe_jax.parallel.processes import place
from moe_jax.runs.load import LoadedRun
from moe_jax.system.errors import is_out_of_memory
from moe_jax.system.terminal import progress_bar

EVALUATION_ROWS, EVALUATION_TOKENS = 16, 8_192
"""Most rows and tokens of one evaluation batch. A context of more tokens than that has a batch of its own."""
TRACED_TOKENS = 2_048
"""First tokens of the stream that a snapshot routes, at most."""
SHOWN_TOKENS = 512
"""First tokens whose experts are kept one by one, at most."""


@dataclass(frozen=True)
class Evaluation:
    """The score of a model on a stream."""

    loss: float
    """Mean cross-entropy, nats per predicted token (separators included)."""
    bits_per_byte: float
    """Nats of all predicted tokens / ln 2 / UTF-8 bytes of the stripped documents."""
    drop_fraction: float
    """Share of (token, choice) pairs without a slot, mean over the scored rows. 0, as nothing is dropped."""
    tokens: int
    """Predicted tokens. Of conversations, those of the answers only."""
    bytes: int
    """UTF-8 bytes of the documents. Of conversations, those of the answers only."""


def evaluation_rows(seq_len: int) -> int:
    """Rows of one evaluation batch."""
    return max(min(EVALUATION_ROWS, EVALUATION_TOKENS // seq_len), 1)


type EvaluationStep = Callable[[Params, ArrayLike, ArrayLike, ArrayLike, ArrayLike], tuple[Array, Array]]


def make_evaluation_step(graphdef: nnx.GraphDef, layout: Layout | None = None) -> EvaluationStep:
    """The jitted (params, inputs, targets, start, weights) -> (sum of cross-entropies in nats, sum of drop fractions).
    Only targets and rows with a weight count. `EvaluationBatch` describes the arguments.

    With a `layout`, each device of its mesh scores some of the rows, with the whole model: it gathers the parameters,
    which may lie anywhere, and needs memory for all of them.
    """

    def step(
        params: Params, inputs: Array, targets: Array, start: Array, weights: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        model = merge(graphdef, params)
        hidden, stats, _ = model(inputs, Mode.EVALUATE)
        # Only the scored part of each row goes through the head, which is most of the arithmetic.
        span = jax.vmap(lambda h, s: jax.lax.dynamic_slice_in_dim(h, s, targets.shape[1]))(hidden, start)
        losses = blocked_token_losses(span.reshape(-1, span.shape[-1]), model.head_matrix(), targets.reshape(-1))
        dropped = jnp.zeros(len(inputs)) if stats is None else stats.drop_fraction.mean(0)
        return (losses * weights.reshape(-1)).sum(), jnp.where(weights.any(1), dropped, 0).sum()

    return jax.jit(step) if layout is None else _on_mesh(layout, step)


def _on_mesh(layout: Layout, local: Callable[..., tuple[Array, Array]]) -> EvaluationStep:
    """The evaluation step on a mesh. A batch is filled up with rows that do not count, so that every device has as
    many."""
    replicated, rows = PartitionSpec(), PartitionSpec(AXES)

    def on_device(params: Params, *batch: Array) -> tuple[Array, Array]:
        return jax.lax.psum(local(params, *batch), AXES)

    places = (replicated, rows, rows, rows, rows)
    shared = jax.shard_map(on_device, mesh=layout.mesh, in_specs=places, out_specs=replicated, check_vma=False)
    step = jax.jit(shared)

    def evaluation(params: Params, *batch: ArrayLike) -> tuple[Array, Array]:
        arrays = [np.asarray(x) for x in batch]
        missing = -len(arrays[0]) % layout.devices
        filled = [np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) for x in arrays]
        whole = jax.tree.map(lambda x: place(x, layout.sharding(replicated)), params)
        return step(whole, *(place(x, layout.sharding(rows)) for x in filled))

    return evaluation


def evaluate(
    step: EvaluationStep,
    params: Params,
    tokens: np.ndarray,
    *,
    seq_len: int,
    token_bytes: np.ndarray,
    answers: np.ndarray | None = None,
    what: str = "",
    rows: int = 0,
) -> Evaluation:
    """Score a stream `separator, document, separator, ..., separator`, window by window (`evaluation_windows`).

    With `answers`, bool [N], only the tokens that are true there are scored. The loss is 0 if there is none.

    `what` names the work in a progress line; without it there is none. A batch has `rows` rows (0: `evaluation_rows`);
    where the device lacks memory for them, one at a time.
    """
    size = rows or evaluation_rows(seq_len)
    batches = list(evaluation_windows(tokens, seq_len=seq_len, batch_size=size, answers=answers))
    results = []
    try:
        with progress_bar(what, len(batches)) if what else nullcontext() as advance:
            for batch in batches:
                results.append(step(params, batch.inputs, batch.targets, batch.start, batch.weights))
                if advance:
                    jax.block_until_ready(results[-1])
                    advance(1)
        nats = math.fsum(float(n) for n, _ in results)
    except RuntimeError as error:
        if size == 1 or not is_out_of_memory(error):
            raise
        kwargs = {"seq_len": seq_len, "token_bytes": token_bytes, "answers": answers, "what": what}
        return evaluate(step, params, tokens, rows=1, **kwargs)
    size = text_bytes(tokens, token_bytes, answers)
    count = len(tokens) - 1 if answers is None else int(answers[1:].sum())
    scored = sum(int(batch.weights.any(1).sum()) for batch in batches)
    dropped = math.fsum(float(d) for _, d in results) / max(scored, 1)
    return Evaluation(nats / max(count, 1), nats / math.log(2) / max(size, 1), dropped, count, size)


def evaluate_run(
    run: LoadedRun, stream: Stream, what: str = "", params: Params | None = None, step: EvaluationStep | None = None
) -> Evaluation:
    """Score a stream by a trained model; by other `params` of the same definition if they are given (`evaluate`)."""
    return evaluate(
        step or make_evaluation_step(run.graphdef),
        run.params if params is None else params,
        stream.tokens,
        seq_len=run.config.model.seq_len,
        token_bytes=run.tokenizer.token_bytes(),
        answers=stream.answers,
        what=what,
    )


# Snapshots of the routing


type Tracer = Callable[[Params], dict[str, Any]]


def make_tracer(
    config: ModelConfig, graphdef: nnx.GraphDef, tokens: np.ndarray, spread: ShardMapWrapper = lambda function: function
) -> Tracer | None:
    """A function of the parameters that routes the first tokens of a stream and returns a snapshot.

    It routes whole windows of T tokens, up to TRACED_TOKENS tokens (at least one window), with the dispatch of
    training, in one jitted call. None for a model without routers. `spread` makes it a program of several devices.
    """
    if config.dense != "none":
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

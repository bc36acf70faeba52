"""What can be proved of a model by running and compiling it, for `python -m moe_jax certify`.

causality      change one token; every earlier output, and every output of the other sequence, keeps its bits, while
               experts are over capacity. The routing rules that leak must be caught leaking, or the check is blind.
arithmetic     the matrix products of the compiled program against the bound of its form of dispatch (the slots of all
               experts, or the rows of a plan of blocks) and the all-experts form
memory         no result in the layer is as large as all experts' rows of all tokens
compilations   step, evaluation, prefill and decoding are compiled once, whatever they are called with

Each certificate says what it found beside what it asks for, and whether that will do.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.analysis.accounting import bound_flops, layer_flops, multiplied_rows
from moe_jax.analysis.bench.layer import with_gradients
from moe_jax.analysis.bench.training import Trainer, compile_step
from moe_jax.analysis.compiled import Program, read_program
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.moe import Mode, MoE
from moe_jax.model.transformer import Params, create, merge, split
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.run import abstract_model

BATCH = 2
TIGHT = 0.5
"""Share of the configured capacity factor at which causality is tried, so that many pairs are dropped."""
FORWARD_BOUND, GRADIENT_BOUND = 1.02, 1.03


_LAYER = ("router", "dispatch", "experts", "combine", "shared")
"""Named scopes of an MoE layer."""


class Certificate(NamedTuple):
    """One claim, tried."""

    name: str
    passed: bool
    found: str
    asked: str


VARIANTS: dict[str, dict[str, Any]] = {  # of a layer by `gather`, with the priority of tokens
    "token priority, gather": {},
    "token priority, einsum": {"dispatch": "einsum"},
    "noisy router": {"router_noise": 0.5},
    "jittered router": {"router_jitter": 0.3},
    "balance by bias": {"balancing": "bias"},
    "shared expert": {"shared_experts": 1},
    "blocks (dropless)": {"dispatch": "blocks"},
    "choice-major priority": {"priority": "leaky-choice-major"},
    "batch priority": {"priority": "leaky-batch-priority"},
    "expert choice": {"priority": "leaky-expert-choice"},
}


class Perturbed(NamedTuple):
    """What changing single tokens did, summed over the places that were tried."""

    earlier: int
    """Outputs before the changed token that changed."""
    other_row: int
    """Outputs of the other sequence that changed."""
    later: int
    """Outputs from the changed token on that changed: more than none, or nothing was tried."""
    dropped: float
    """Largest share of pairs that had no slot."""


def perturb(run: Callable[[Any], tuple[Any, Any]], before: np.ndarray, other: np.ndarray) -> Perturbed:
    """Compare `run(before)` with runs in which one place of one row is taken from `other`. `run` returns outputs
    `[2, T, ...]` and the share of pairs dropped."""
    tokens = before.shape[1]
    y, dropped = (np.asarray(a) for a in run(before))
    counts = np.zeros(3, int)
    for t in sorted({tokens // 4, tokens // 2, 3 * tokens // 4, tokens - 1}):
        for row in range(2):
            after = before.copy()
            after[row, t] = other[row, t]
            changed = (np.asarray(run(after)[0]) != y).reshape(2, tokens, -1).any(-1)
            counts += changed[row, :t].sum(), changed[1 - row].sum(), changed[row, t:].sum()
    return Perturbed(int(counts[0]), int(counts[1]), int(counts[2]), float(dropped.max()))


def layer_causality(config: ModelConfig, ffn: dict[str, Any] | None) -> Iterator[Certificate]:
    """Each routing variant, in one layer of the model's shape, with the given router and experts where they fit. All
    but the blocks have a capacity, whatever the model trains by."""
    factor = config.capacity_factor * TIGHT
    tight = dataclasses.replace(config, capacity_factor=factor, dispatch="gather", priority="token")
    rng = np.random.default_rng(0)
    before, other = rng.normal(size=(2, BATCH, config.seq_len, config.width)).astype(np.float32)
    for name, changes in VARIANTS.items():
        variant = dataclasses.replace(tight, **changes)
        layer = MoE(variant, 1.0, nnx.Rngs(params=jax.random.key(1)))
        if ffn is not None:
            nnx.update(layer, nnx.State({"router": ffn["router"], "experts": ffn["experts"]}))
        graphdef, state = nnx.split(layer)
        key = jax.random.key(2)

        def run(x: Any, graphdef: nnx.GraphDef = graphdef, state: Any = state, key: Any = key) -> tuple[Any, Any]:
            y, stats = nnx.merge(graphdef, state)(x, Mode.TRAIN, key)
            return y, stats.drop_fraction

        found = perturb(jax.jit(run), before, other)
        leaky = variant.priority != "token"
        drops = found.dropped > 0 or variant.dispatch == "blocks"
        ok = (found.earlier > 0) == leaky and found.other_row == 0 and found.later > 0 and drops
        yield Certificate(
            f"causality: {name}",
            ok,
            f"{found.earlier} earlier outputs changed, {found.other_row} of the other row, {found.dropped:.0%} dropped",
            _asked(variant) if not leaky else "leaks, and is seen to",
        )


def model_causality(config: RunConfig, params: Params) -> Certificate:
    """The whole model as it trains, dropout aside, at `TIGHT` of its capacity."""
    model = dataclasses.replace(config.model, capacity_factor=config.model.capacity_factor * TIGHT)
    graphdef, _ = abstract_model(dataclasses.replace(config, model=model), "float32")

    @jax.jit
    def run(tokens: Any) -> tuple[Any, Any]:
        hidden, stats, _ = merge(graphdef, params)(tokens, Mode.TRAIN)
        return hidden, jnp.zeros(()) if stats is None else stats.drop_fraction

    rng = np.random.default_rng(0)
    before, other = rng.integers(0, model.vocab_size, (2, BATCH, model.seq_len)).astype(np.int32)
    found = perturb(run, before, other)
    leaky = model.priority != "token"
    ok = (found.earlier > 0) == leaky and found.other_row == 0 and found.later > 0
    ok &= found.dropped > 0 or model.dropless
    return Certificate(
        "causality: the whole model",
        ok,
        f"{found.earlier} earlier outputs changed, {found.other_row} of the other row, {found.dropped:.0%} dropped",
        _asked(model) if not leaky else "leaks, as asked for",
    )


def _asked(model: ModelConfig) -> str:
    return "0 and 0; nothing is dropped" if model.dropless else "0 and 0, under drops"


def initial_params(config: RunConfig) -> Params:
    """Parameters to certify a configuration with that has not been trained. No branch starts at zero: through such
    ones no token can be seen to change another."""
    model = dataclasses.replace(config.model, quiet_branches=False)
    return split(create(model, jax.random.key(config.train.seed)))[1]


def certify(config: RunConfig, params: Params, batch_size: int) -> Iterator[Certificate]:
    """Every certificate of a model, as it is found. `config.model.vocab_size` must be known."""
    if config.model.dense == "none":
        yield from layer_causality(config.model, params["blocks"][0]["ffn"])
    yield model_causality(config, params)
    if config.model.dense == "none":
        yield from layer_arithmetic(config.model)
        yield from step_arithmetic(config, batch_size)
    yield compilations(config, params, batch_size)


def _layer_program(config: ModelConfig, batch: int, gradients: bool) -> Program:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoE(config, 1.0, nnx.Rngs(params=jax.random.key(0)))), nnx.Param)
    x = jax.ShapeDtypeStruct((batch, config.seq_len, config.width), jnp.float32)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("ffn"):
            return nnx.merge(graphdef, params)(x, Mode.TRAIN)[0]

    lowered = jax.jit(with_gradients(forward)).lower(state, x, x) if gradients else jax.jit(forward).lower(state, x)
    return read_program(lowered.compile().as_text())


def layer_arithmetic(config: ModelConfig) -> Iterator[Certificate]:
    """The compiled layer against its capacity bound and the all-experts form, and its largest results."""
    # More tokens than twice the width: no gradient of a weight is then mistaken for hidden rows.
    batch = 2 * config.width // config.seq_len + 1
    bound, what_bounds = _bound(config, batch)
    for what, gradients, factor, limit in (
        ("forward", False, 1, FORWARD_BOUND),
        ("with gradients", True, 3, GRADIENT_BOUND),
    ):
        ours = _layer_program(config, batch, gradients)
        dense = _layer_program(_all_experts(config), batch, gradients)
        ratio = ours.flops / (factor * bound)
        yield Certificate(
            f"arithmetic: one layer, {what}",
            ratio <= limit,
            f"{ours.flops / 1e9:.3f} GFLOP, {ratio:.3f} x {what_bounds}; all experts {dense.flops / ours.flops:.2f} x",
            f"at most {limit} x",
        )
        rows = config.experts * batch * config.seq_len * max(config.width, config.expert_hidden)
        biggest, of_dense = ours.largest(1)[0], dense.largest(1)[0]
        yield Certificate(
            f"memory: one layer, {what}",
            biggest.elements < rows <= of_dense.elements,
            f"largest result {list(biggest.shape)}; of the all-experts form {list(of_dense.shape)}",
            f"below E x B x T x max(D, F) = {rows:,} numbers, which the all-experts form reaches",
        )


def _bound(config: ModelConfig, batch: int) -> tuple[int, str]:
    """Forward operations that a layer may cost, and what they are: of `blocks` those of its plan, else the slots'."""
    if config.dispatch != "blocks":
        return bound_flops(config, batch), "the capacity bound"
    rows = multiplied_rows(config, batch) / (batch * config.seq_len * config.top_k)
    return layer_flops(config, batch), f"the block plan ({rows:.2f} rows for each pair)"


def _all_experts(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, dispatch="dense", priority="token")


def step_arithmetic(config: RunConfig, batch_size: int) -> Iterator[Certificate]:
    """The compiled training step, product by product, against what its parts should cost."""
    model = config.model
    ours = read_program(compile_step(config, batch_size).as_text())
    other = dataclasses.replace(config, model=_all_experts(model))
    dense = read_program(compile_step(other, batch_size).as_text())
    bound, what_bounds = _bound(model, batch_size)
    experts = ours.flops_of(*_LAYER)
    recomputed = 4 / 3 if config.train.remat else 1
    ratio = experts / (3 * model.layers * bound * recomputed)
    yield Certificate(
        "arithmetic: expert layers within the step",
        ratio <= GRADIENT_BOUND,
        f"{experts / 1e9:.2f} GFLOP, {ratio:.3f} x {what_bounds}; all experts "
        f"{dense.flops_of(*_LAYER) / experts:.2f} x",
        f"at most {GRADIENT_BOUND} x",
    )
    parts = {part: ours.flops_of(part) for part in ("attention", "ffn", "head")}
    rest = ours.flops - sum(parts.values())
    yield Certificate(
        "arithmetic: the whole step",
        ours.flops < dense.flops,
        ", ".join(f"{part} {flops / 1e9:.2f}" for part, flops in parts.items())
        + f", optimizer {rest / 1e9:.2f}, in all {ours.flops / 1e9:.2f} GFLOP; all experts "
        f"{dense.flops / ours.flops:.2f} x",
        "less than the all-experts form",
    )


def compilations(config: RunConfig, params: Params, batch_size: int) -> Certificate:
    """Run step, evaluation, prefill and decoding on several inputs, and count the programs behind each."""
    graphdef, _ = abstract_model(config, "float32")
    length, vocabulary = config.model.seq_len, config.model.vocab_size
    rng = np.random.default_rng(0)
    evaluation = make_evaluation_step(graphdef)
    decoder = Decoder(graphdef, length, vocabulary)
    for n in (1, length // 2):
        stream = rng.integers(0, vocabulary, length + n).astype(np.int32)
        evaluate(evaluation, params, stream, seq_len=length, token_bytes=np.ones(vocabulary, np.int64))
        prompt = [int(t) for t in rng.integers(0, vocabulary, n)]
        list(decoder.stream(params, prompt, settings=Sampling(), key=jax.random.key(n), stop=-1, limit=3))
    trainer = Trainer.of(config, batch_size)
    for _ in range(2):
        jax.block_until_ready(trainer())
    programs = {
        "step": trainer.step,
        "evaluation": evaluation,
        "prefill": decoder.prefill,
        "decoding": decoder.advance,
    }
    counts = {name: program._cache_size() for name, program in programs.items()}  # pyright: ignore
    return Certificate(
        "compilations",
        set(counts.values()) == {1},
        ", ".join(f"{name} {count}" for name, count in counts.items()),
        "1 each",
    )

"""The arithmetic of the compiled programs, in whole numbers: equal to its formulas, not close to them.

A compiled layer has the matrix products that the rows of its dispatch need: the slots of all experts for `capacity`,
the rows of the block plan for `blocks` (`formulas.multiplied_rows`, which computes the slots by itself).

The products of a compiled step are divided by their named scopes: attention, expert layers, head, and the rest, which
are those of the optimizer. Each part has exactly the products of its formula (`formulas.step_products`), with what the
backward pass computes again and with the padding of the head's blocks.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.certify import Certificate
from moe_jax.certify.formulas import layer_flops, multiplied_rows, router_flops, step_products
from moe_jax.certify.hlo import Program, read_program, scopes
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.transformer import Params, build_layer
from moe_jax.training.programs import Programs

PARTS = {"attention": "attention", "ffn": "the expert layers", "head": "the head"}
"""Named scopes of a training step whose products are counted, and what people call them."""


def layer_arithmetic(config: ModelConfig) -> Certificate:
    """The products of one layer, compiled with gradients for one sequence in float32."""
    layer, params = layer_function(config)
    x = jax.ShapeDtypeStruct((1, config.seq_len, config.width), jnp.float32)
    text = jax.jit(with_gradients(layer)).lower(params, x, x).compile().as_text()
    rows, needed = multiplied_rows(config, 1), 3 * layer_flops(config, 1)
    computed = read_program(text).flops
    return Certificate(
        "arithmetic: one layer, with gradients",
        computed == needed,
        f"{computed:,} operations for {config.seq_len:,} tokens, {computed / needed:.6f} x the formula",
        f"exactly {needed:,}, what {rows:,} rows of all experts need",
        title="operations of one layer, with gradients",
    )


def step_arithmetic(config: RunConfig, batch_size: int) -> Iterator[Certificate]:
    """The matrix products of the compiled training step, part by part, compared with their formulas, and the precision
    of the router's.

    A run with adapters (`train.lora_rank`) is tested by the step that trains all weights.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, lora_rank=0, train_router=False))
    programs = Programs.of(config)
    ours = read_program(programs.compiled_step(batch_size).as_text())
    needed, unnamed = part_products(programs, batch_size), ours.unnamed
    parts = {part: ours.flops_of(part) for part in PARTS}
    missing = {part: needed[part] - flops for part, flops in parts.items()}
    for part, what in PARTS.items():
        found = f"{parts[part]:,} operations, {parts[part] / needed[part]:.6f} x the formula"
        if missing[part] and unnamed:
            found += f"; {unnamed:,} of the step have no name"
        yield Certificate(
            f"arithmetic: {'expert layers' if part == 'ffn' else part} within the step",
            0 <= missing[part] <= unnamed,
            found,
            f"exactly {needed[part]:,}" + (", without those that have no name" if unnamed else ""),
            title=f"operations of {what} in a training step",
        )
    rest = ours.flops - sum(parts.values())
    yield Certificate(
        "arithmetic: the whole step",
        ours.flops == sum(needed.values()) and sum(missing.values()) <= unnamed,
        f"{ours.flops:,} operations, {rest:,} of them outside of attention, expert layers and head",
        f"exactly {sum(needed.values()):,}, {needed['rest']:,} of them for the optimizer ({config.train.optimizer})",
        title="operations of the whole training step",
    )
    yield router_precision(
        ours, 3 * config.model.layers * router_flops(config.model, batch_size * config.model.seq_len)
    )


def router_precision(step: Program, needed: int) -> Certificate:
    """The router's products in a training step: all `needed` operations have operands of at least float32, and ask for
    the highest precision. Otherwise a card would round them to TF32."""
    dots = [dot for dot in step.dots if "router" in scopes(dot.op_name)]
    kinds = sorted({(dot.operand_dtype, dot.precision) for dot in dots})
    return Certificate(
        "arithmetic: precision of the router",
        sum(dot.total for dot in dots) == needed and {*kinds} <= {("f32", "highest"), ("f64", "highest")},
        f"{len(dots)} products, " + ", ".join(f"{dtype} at {precision} precision" for dtype, precision in kinds),
        f"{needed:,} operations, all in float32 or float64 at the highest precision",
        title="the router multiplies in float32 or more",
    )


def router_values(config: ModelConfig, params: Params, compute: str) -> Certificate:
    """The probabilities and gates of every router on random inputs, beside the same in float64 by NumPy. The layer gets
    its input in the dtype `compute`, so nothing may be rounded further between the input and the gates.

    The bound is 64 x 2^-24, and as much of the largest sum of magnitudes in the product. Probabilities below 1e-30,
    which float32 may not hold, are compared by their difference.
    """
    x = jax.random.normal(jax.random.key(2), (1, config.seq_len, config.width)).astype(compute)
    layer = build_layer(config, nnx.Rngs(params=jax.random.key(0)))
    graphdef = nnx.split(layer)[0]

    @jax.jit
    def decisions(ffn: Params) -> tuple[jax.Array, ...]:
        routing = nnx.merge(graphdef, nnx.State(ffn)).route(x)
        return routing.probs, routing.gate, routing.expert_index

    worst = 0.0
    for block in params["blocks"].values():
        probs, gate, expert = (np.asarray(a) for a in decisions(block["ffn"]))
        wide, matrix = np.asarray(x, np.float64), np.asarray(block["ffn"]["router"], np.float64)
        logits = wide @ matrix
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        expected = powers / powers.sum(-1, keepdims=True)
        gates = np.take_along_axis(expected, expert, -1)
        if config.routing.renormalise_gates and config.routing.top_k > 1:
            gates /= gates.sum(-1, keepdims=True)
        allowed = 64 * 2.0**-24 * (1 + (np.abs(wide) @ np.abs(matrix)).max())
        pairs = (probs, expected), (gate, gates)
        off = max((np.abs(found - right) / np.maximum(right, 1e-30)).max() for found, right in pairs)
        worst = max(worst, float(off / allowed))
    return Certificate(
        "arithmetic: values of the router",
        worst <= 1,
        f"probabilities and gates differ from float64 by {worst:.2g} x the bound, at most, in {config.layers} layers",
        "at most the error of sums in float32 (64 x 2^-24 of their magnitudes)",
        title="no router rounds its input, its logits or its gates",
    )


def part_products(programs: Programs, batch: int) -> dict[str, int]:
    """`step_products`, with the form of attention of the programs and the padding of this platform."""
    cudnn = programs.attention.implementation == "cudnn"
    return step_products(programs.config, batch, cudnn=cudnn, on_card=jax.default_backend() != "cpu")


# A layer as a plain function of its parameters


type LayerFunction = Callable[[dict[str, Any], jax.Array], jax.Array]
"""(parameters, x [B, T, D]) -> y [B, T, D], in training mode."""


def layer_function(config: ModelConfig, moe: type[MoE] = MoE) -> tuple[LayerFunction, dict[str, Any]]:
    """The layer as a function, and its initial parameters."""
    graphdef, state = nnx.split(build_layer(config, nnx.Rngs(params=jax.random.key(0)), moe), nnx.Param)

    def moe_layer(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, nnx.State(jax.tree.map(lambda p: p, params)))(x, Mode.TRAIN)[0]

    return moe_layer, nnx.to_pure_dict(state)


def with_gradients(forward: LayerFunction) -> Callable[..., Any]:
    """(params, x, cotangent) -> (y, the gradients of parameters and x): what a training step needs of a layer."""

    def run(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, pull(cotangent)

    return run

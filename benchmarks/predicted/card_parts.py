"""The parts of a step that `predict_card.py` compares with a card: small programs that test the assumptions of the
roofline, the parts of a layer, and what runs between the steps."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import Dispatch, ModelConfig, RunConfig
from moe_jax.inference.slots import PromptState, advance
from moe_jax.model.attention import Attention
from moe_jax.model.kernels.causal_attention import Implementation
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy
from moe_jax.model.kernels.library_attention import choose_attention
from moe_jax.model.moe.layer import layer_shapes, with_gradients
from moe_jax.model.precision import Card
from moe_jax.model.transformer import Params
from moe_jax.system.machine import LARGE_SIZE, SIZE
from moe_jax.training.programs import Programs

CHAIN = 8
"""Products one after another, so that a launch is a small share of their time."""
COPIED = 64 * 2**20
"""Numbers of float32 that are read and written once."""
LAUNCHES = 200

type Group = Literal["the card", "one layer, forward and backward", "between the steps"]


class Part(NamedTuple):
    """Something that a card computes."""

    group: Group
    name: str
    program: Any
    """A jitted function."""
    shapes: tuple[Any, ...]
    """Its arguments, as `jax.ShapeDtypeStruct`."""
    start: Callable[[], Any] | None = None
    """Makes the first argument of a program that takes a state and returns the next one, in the same memory."""

    def call(self) -> Callable[[], Any]:
        """A call to time, with arguments of its own: small random numbers, and token 0."""
        if self.start is None:
            arguments = jax.tree.map(_filled, self.shapes)
            return lambda: self.program(*arguments)
        state, rest = self.start(), jax.tree.map(_filled, self.shapes[1:])

        def step() -> Any:
            nonlocal state
            state, told = self.program(state, *rest)
            return told

        return step


def parts(config: RunConfig, device: Any) -> Iterator[Part]:
    """All parts for a device. A layer has the tokens of a micro-batch."""
    programs = Programs.of(config, device)
    yield from _constants(Card.of(device))
    undropped = dataclasses.replace(config.model, attention_dropout=0.0)  # without keys there is no dropout anyway
    library = choose_attention(undropped, config.execution, programs.policy.compute, Card.of(device), True)
    yield from _layer(config.model, config.train.batch_size, programs.policy.compute, library.implementation)
    yield from _between(programs)


def _filled(shape: Any) -> Any:
    """An array of this shape: small random numbers, or zeros if they are whole numbers."""
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.zeros(shape.shape, shape.dtype)
    values = np.random.default_rng(0).standard_normal(shape.shape, np.float32)
    return jnp.asarray(0.02 * values, shape.dtype)


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _constants(card: Card) -> Iterator[Part]:
    """What `roofline.Rates` assumes: matrix products, memory, launches."""
    kinds: list[tuple[str, Any, str]] = [("float32", jnp.float32, "highest")]
    if card.bfloat16_units:
        kinds += [("TF32", jnp.float32, "default"), ("bfloat16", jnp.bfloat16, "default")]
    if card.tensor_cores:
        kinds += [("float16", jnp.float16, "default")]
    for name, dtype, precision in kinds:

        def chained(x: jax.Array, w: jax.Array, precision: str = precision) -> jax.Array:
            for _ in range(CHAIN):
                x = jnp.matmul(x, w, precision=precision)
            return x

        size = SIZE if card.platform == "cpu" else LARGE_SIZE
        matrix = _shape(size, size, dtype=dtype)
        yield Part("the card", f"{CHAIN} products of {size:,}, {name}", jax.jit(chained), (matrix, matrix))
    copied = f"read and write {COPIED * 4 // 2**20} MiB"
    yield Part("the card", copied, jax.jit(lambda x: x + 1), (_shape(COPIED),))

    def launched(x: jax.Array) -> jax.Array:
        for _ in range(LAUNCHES):
            x = jax.lax.optimization_barrier(jnp.roll(x, 1) * 0.5)
        return x

    yield Part("the card", f"{LAUNCHES} small kernels", jax.jit(launched), (_shape(1024),))


def _layer(config: ModelConfig, rows: int, compute: str, library: Implementation | None) -> Iterator[Part]:
    """Head and loss, attention in both forms, and the experts in both dispatches, on the tokens of a micro-batch."""
    group: Group = "one layer, forward and backward"
    dtype = jnp.dtype(compute)
    hidden = _shape(rows, config.seq_len, config.width, dtype=dtype)
    head, targets = _shape(config.width, config.vocab_size), _shape(rows * config.seq_len, dtype=jnp.int32)
    loss = jax.value_and_grad(lambda hidden, head, targets: mean_cross_entropy(hidden, head, targets), (0, 1))
    flat = _shape(rows * config.seq_len, config.width, dtype=dtype)
    yield Part(group, "head and loss", jax.jit(loss), (flat, head, targets))

    for form in [None] if library is None else [None, library]:
        module = nnx.eval_shape(lambda form=form: Attention(config, 1.0, nnx.Rngs(0), form))
        graphdef, state = nnx.split(module, nnx.Param)

        def attention(params: Any, x: jax.Array, graphdef: nnx.GraphDef = graphdef) -> jax.Array:
            return nnx.merge(graphdef, nnx.State(params))(x)[0]

        name = "attention" if form is None else "attention, by cuDNN"
        yield Part(group, name, jax.jit(with_gradients(attention)), (nnx.to_pure_dict(state), hidden, hidden))
    if config.dense != "none":
        return
    dispatches: tuple[tuple[Dispatch, str], ...] = (("capacity", "by capacity"), ("blocks", "in blocks, no drops"))
    for dispatch, how in dispatches:
        routed = dataclasses.replace(config, routing=dataclasses.replace(config.routing, dispatch=dispatch))
        layer, params = layer_shapes(routed)
        yield Part(group, f"experts, {how}", jax.jit(with_gradients(layer)), (params, hidden, hidden))


def _between(programs: Programs) -> Iterator[Part]:
    """A prompt, and a token."""
    group: Group = "between the steps"
    decoder, params = programs.decoder(), programs.param_shapes
    read = (params, _shape(1, decoder.seq_len, dtype=jnp.int32), _shape(dtype=jnp.int32))
    yield Part(group, f"a prompt of {decoder.seq_len} tokens", decoder.prefill, read)

    def one_token(state: PromptState, params: Params, token: jax.Array) -> tuple[PromptState, jax.Array]:
        half = state._replace(position=jnp.int32(decoder.seq_len // 2))
        after = advance(programs.writer, params, half, token)
        return after, after.logits  # the position stays: more tokens may be timed than the context has places

    def begin() -> PromptState:
        return decoder.prefill(*jax.tree.map(_filled, read))

    shapes = (jax.eval_shape(decoder.prefill, *read), params, _shape(1, dtype=jnp.int32))
    yield Part(group, "a token, batch 1", jax.jit(one_token, donate_argnums=0), shapes, begin)

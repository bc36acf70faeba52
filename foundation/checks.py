"""Every operation at every input where it could go wrong: the rows of the table of `python -m foundation`."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundation import (
    activations,
    attention,
    block,
    dropout,
    embedding,
    experts,
    linear,
    losses,
    moe,
    norms,
    positions,
    router,
    softmax,
    transformer,
)
from foundation.block import ModelConfig
from foundation.parity import MARGIN, Check


class Draws:
    """Random inputs of one check, seeded by its name, so that a new check changes no other."""

    def __init__(self, name: str, attempt: int = 0) -> None:
        self.generator = np.random.default_rng([zlib.crc32(name.encode()), attempt])

    def normal(self, *shape: int, std: float = 1.0) -> jax.Array:
        """Normal entries."""
        return jnp.asarray(std * self.generator.standard_normal(shape))

    def integers(self, high: int, *shape: int) -> jax.Array:
        """Integers in [0, high)."""
        return jnp.asarray(self.generator.integers(0, high, shape))

    def keep(self, *shape: int) -> jax.Array:
        """A dropout mask of rate 1/4."""
        return jnp.asarray(self.generator.random(shape) > 0.25)

    def like(self, tree: Any, std: float) -> Any:
        """The tree with normal noise added to every leaf, so that no scale is 1 and no bias 0."""
        return jax.tree.map(lambda leaf: leaf + self.normal(*leaf.shape, std=std), tree)


def all_checks() -> Iterator[Check]:
    """The whole catalogue."""
    for group in GROUPS:
        yield from group()


def checks_of(operation: str) -> Iterator[Check]:
    """The checks of one operation, made one at a time. Raises KeyError where there are none."""
    for group, operations in GROUPS.items():
        if operation in operations:
            return (check for check in group() if check.operation == operation)
    raise KeyError(operation)


def activation_checks() -> Iterator[Check]:
    """Each nonlinearity at ordinary and at saturated inputs."""
    for name, (forward, backward) in activations.ACTIVATIONS.items():
        for case, shape, std in (("matrix", (5, 7), 1.0), ("saturated", (4, 6), 12.0)):
            x = Draws(f"{name}/{case}").normal(*shape, std=std)
            x = x + jnp.sign(x) * 0.05  # off ReLU's kink
            yield Check(name, case, forward, backward, (x,), margin=float(jnp.min(jnp.abs(x))))
    zero = jnp.zeros((3,))
    yield Check("relu", "kink", activations.relu_forward, activations.relu_backward, (zero,), 0.0, at_tie=True)


def linear_checks() -> Iterator[Check]:
    """The affine map with and without bias, at odd shapes; dropout with a given mask."""
    for case, shape, outputs, bias in (
        ("matrix", (4, 3), 5, True),
        ("no bias", (4, 3), 5, False),
        ("square", (3, 3), 3, True),  # where a forgotten transpose still has the right shape
        ("leading axes", (2, 3, 4), 5, True),
        ("one row", (1, 3), 2, True),
        ("vector", (3,), 2, True),
    ):
        draws = Draws(f"linear/{case}")
        inputs = (
            draws.normal(*shape),
            draws.normal(shape[-1], outputs),
            draws.normal(outputs) if bias else None,
        )
        yield Check("linear", case, linear.linear_forward, linear.linear_backward, inputs)
    draws = Draws("dropout")
    for case, keep in (
        ("mask", draws.keep(4, 5)),
        ("all dropped", jnp.zeros((4, 5), bool)),
        ("no mask", None),
    ):
        yield Check(
            "dropout",
            case,
            _with(dropout.dropout_forward, keep, 0.25),
            dropout.dropout_backward,
            (draws.normal(4, 5),),
        )


def softmax_and_loss_checks() -> Iterator[Check]:
    """Softmax with masks, logsumexp, squared error, cross-entropy with ignored positions."""
    draws = Draws("softmax and losses")
    rows, mask = draws.normal(4, 6), draws.keep(4, 6).at[0].set(False).at[1].set(True)
    for case, logits, seen in (
        ("rows", rows, None),
        ("masked, one row whole", rows, mask),
        ("saturated", 40.0 * rows, None),
        ("one entry", draws.normal(3, 1), None),
        ("equal logits", jnp.ones((2, 5)), None),
    ):
        yield Check("softmax", case, _with(softmax.softmax_forward, seen), softmax.softmax_backward, (logits,))
    for case, logits in (("rows", rows), ("saturated", 300.0 * rows)):
        yield Check("logsumexp", case, softmax.logsumexp_forward, softmax.logsumexp_backward, (logits,))
    for case, shape in (("matrix", (4, 3)), ("one entry", (1,))):
        pair = (draws.normal(*shape), draws.normal(*shape))
        yield Check("mse", case, losses.mse_forward, losses.mse_backward, pair)
    targets = draws.integers(6, 2, 4)
    for case, scale, wanted in (
        ("batch", 1.0, targets),
        ("ignored positions", 1.0, targets.at[0, 1:3].set(losses.IGNORE)),
        ("all ignored", 1.0, jnp.full((2, 4), losses.IGNORE)),
        ("confident and wrong", 50.0, targets),
    ):
        forward = _with(losses.cross_entropy_forward, wanted)
        logits = draws.normal(2, 4, 6, std=scale)
        yield Check("cross_entropy", case, forward, losses.cross_entropy_backward, (logits,))


def norm_checks() -> Iterator[Check]:
    """LayerNorm with and without bias, RMSNorm; rows whose variance is as small as eps."""
    for case, shape, std in (
        ("rows", (2, 3, 5), 1.0),
        ("one row", (4,), 1.0),
        ("variance near eps", (3, 5), 3e-3),
    ):
        draws = Draws(f"norms/{case}")
        x, scale, bias = draws.normal(*shape, std=std), draws.normal(shape[-1]), draws.normal(shape[-1])
        yield Check("layernorm", case, norms.layernorm_forward, norms.layernorm_backward, (x, scale, bias))
        yield Check("rmsnorm", case, norms.rmsnorm_forward, norms.rmsnorm_backward, (x, scale))
    draws = Draws("norms/no bias")
    inputs = (draws.normal(3, 5) + 4.0, draws.normal(5), None)
    yield Check("layernorm", "no bias, mean of 4", norms.layernorm_forward, norms.layernorm_backward, inputs)


def embedding_and_position_checks() -> Iterator[Check]:
    """Lookup with repeated and with unused rows, the tied head, learned positions, RoPE."""
    draws = Draws("embedding and positions")
    table = draws.normal(7, 4)
    for case, tokens in (
        ("repeated and unused rows", jnp.array([[1, 1, 4], [1, 0, 6]])),
        ("one token", jnp.array([[2]])),
    ):
        forward = _with(embedding.embedding_forward, tokens)
        yield Check("embedding", case, forward, embedding.embedding_backward, (table,))
    head = (draws.normal(2, 3, 4), table)
    yield Check("tied_head", "batch", embedding.tied_head_forward, embedding.tied_head_backward, head)
    for case, length in (("shorter than the table", 3), ("as long as the table", 5)):
        forward, backward = positions.learned_positions_forward, positions.learned_positions_backward
        yield Check("learned_positions", case, forward, backward, (draws.normal(2, length, 4), draws.normal(5, 4)))
    for case, shape in (("heads", (2, 2, 5, 4)), ("one position", (1, 6)), ("one pair", (7, 2))):
        yield Check("rope", case, positions.rope_forward, positions.rope_backward, (draws.normal(*shape),))


def attention_checks() -> Iterator[Check]:
    """One head under masks, and multi-head attention with every option."""
    draws = Draws("attention")
    padding = jnp.ones((2, 4, 4), bool).at[0, 2].set(False).at[1, :, 0].set(False)
    for case, shape, mask, scale in (
        ("no mask", (2, 4, 3), None, 1.0),
        ("causal", (2, 4, 3), attention.causal_mask(4), 1.0),
        ("a row sees nothing", (2, 4, 3), padding, 1.0),
        ("one position", (1, 3), attention.causal_mask(1), 1.0),
        ("saturated", (2, 4, 3), attention.causal_mask(4), 6.0),
    ):
        q, k, v = (draws.normal(*shape, std=scale) for _ in range(3))
        yield Check(
            "attention",
            case,
            _with(attention.attention_forward, mask),
            attention.attention_backward,
            (q, k, v),
        )
    cross = (draws.normal(2, 3, 4), draws.normal(2, 5, 4), draws.normal(2, 5, 4))
    yield Check(
        "attention",
        "fewer queries than keys",
        attention.attention_forward,
        attention.attention_backward,
        cross,
    )
    keep = draws.keep(2, 4, 4)
    qkv = tuple(draws.normal(2, 4, 3) for _ in range(3))
    forward = _with(attention.attention_forward, attention.causal_mask(4), keep, 0.25)
    yield Check("attention", "dropout of the weights", forward, attention.attention_backward, qkv)

    for case, heads, bias, rotary, length in (
        ("plain", 2, False, False, 4),
        ("biases", 2, True, False, 4),
        ("rotary", 2, True, True, 4),
        ("one head", 1, False, True, 3),
        ("one position", 2, True, True, 1),
    ):
        params = attention_params(draws, 8, bias)
        forward = _with(attention.multi_head_forward, heads, rotary)
        inputs = (draws.normal(2, length, 8), params)
        yield Check("multi_head", case, forward, attention.multi_head_backward, inputs)
    forward = _with(attention.multi_head_forward, 2, False, draws.keep(2, 2, 3, 3), 0.25)
    inputs = (draws.normal(2, 3, 8), attention_params(draws, 8, bias=True))
    yield Check("multi_head", "dropout of the weights", forward, attention.multi_head_backward, inputs)


def attention_params(draws: Draws, width: int, bias: bool) -> dict:
    """Projections of one attention layer, of standard deviation 1/2."""
    qkv: dict = {"kernel": draws.normal(width, 3 * width, std=0.5)}
    out: dict = {"kernel": draws.normal(width, width, std=0.5)}
    if bias:
        qkv["bias"], out["bias"] = draws.normal(3 * width), draws.normal(width)
    return {"qkv": qkv, "out": out}


def router_checks() -> Iterator[Check]:
    """Gates and both losses at once, for every kind of K; and ties, against autodiff only."""
    for case, width, experts_total, top_k, shape in (
        ("top 2 of 4", 5, 4, 2, (2, 6)),
        ("top 1 of 4", 5, 4, 1, (2, 6)),
        ("K = E", 5, 3, 3, (2, 4)),
        ("one expert", 3, 1, 1, (1, 4)),
        ("one token", 4, 4, 2, (1, 1)),
    ):

        def draw(draws: Draws, w: int = width, e: int = experts_total, s: tuple = shape) -> tuple:
            return draws.normal(*s, w), draws.normal(w, e)

        inputs, margin = _clear_choice(f"router/{case}", draw, lambda x, kernel, k=top_k: _margin(x, kernel, k))
        yield Check("router", case, _router_outputs(top_k), _router_gradients, inputs, margin)
    # Columns 1 and 2 are one and the same: every token that wants either has a tie.
    draws = Draws("router/tied columns")
    kernel = draws.normal(4, 3)
    kernel = kernel.at[:, 2].set(kernel[:, 1])
    for case, top_k in (("tied columns, top 1", 1), ("tied columns, top 2", 2)):
        inputs = (draws.normal(2, 5, 4), kernel)
        yield Check("router", case, _router_outputs(top_k), _router_gradients, inputs, 0.0, at_tie=True)


def _router_outputs(top_k: int) -> Callable:
    def forward(x: jax.Array, kernel: jax.Array) -> tuple[Any, Any]:
        routing, cache = router.router_forward(x, kernel, top_k)
        return (routing.gates, routing.balance, routing.z), cache

    return forward


def _router_gradients(d_out: tuple, cache: Any) -> Any:
    d_gates, d_balance, d_z = d_out
    return router.router_backward(d_gates, d_balance, d_z, cache)


def expert_checks() -> Iterator[Check]:
    """Both kinds of expert; an empty slot; one expert."""
    draws = Draws("experts")
    for case, batch, total, places in (("four experts", 2, 4, 3), ("one expert", 1, 1, 2)):
        u = draws.normal(batch, total, places, 3).at[0, 0, -1].set(0.0)  # an empty slot
        w_gate, w_in, w_out = draws.normal(total, 3, 5), draws.normal(total, 3, 5), draws.normal(total, 5, 3)
        yield Check(
            "gelu_experts",
            case,
            experts.gelu_experts_forward,
            experts.gelu_experts_backward,
            (u, w_in, w_out),
        )
        inputs = (u, w_gate, w_in, w_out)
        yield Check("swiglu_experts", case, experts.swiglu_experts_forward, experts.swiglu_experts_backward, inputs)


def moe_checks() -> Iterator[Check]:
    """Dispatch and combine alone, with drops; then the layer, from roomy to nearly everything dropped."""
    draws = Draws("dispatch and combine")
    chosen = jnp.array([[[0, 2], [2, 1], [2, 0], [2, 0]], [[1, 0], [0, 1], [2, 1], [1, 2]]])
    for case, slot in (
        ("nothing dropped", moe.assign_slots(chosen, 3, 4)[0]),
        ("some dropped", moe.assign_slots(chosen, 3, 2)[0]),
        ("everything dropped", jnp.full_like(chosen, 3 * 2)),
    ):
        places = 4 if case == "nothing dropped" else 2
        x, h, gates = draws.normal(2, 4, 3), draws.normal(2, 3, places, 3), draws.normal(2, 4, 2)
        yield Check("dispatch", case, _with(moe.dispatch_forward, slot, 3, places), moe.dispatch_backward, (x,))
        yield Check("combine", case, _with(moe.combine_forward, slot), moe.combine_backward, (h, gates))

    for case, total, top_k, factor, shape, swiglu in (
        ("roomy, GELU", 4, 2, 4.0, (2, 6), False),
        ("drops, GELU", 4, 2, 0.6, (2, 6), False),
        ("drops, SwiGLU", 4, 2, 0.6, (2, 6), True),
        ("top 1, drops", 4, 1, 0.7, (2, 6), True),
        ("K = E", 3, 3, 1.0, (2, 4), True),
        ("one expert", 1, 1, 1.0, (2, 4), False),
        ("one place each", 4, 2, 0.01, (2, 6), True),
        ("one token", 4, 2, 1.0, (1, 1), True),
    ):

        def draw(draws: Draws, e: int = total, s: tuple = shape, gated: bool = swiglu) -> tuple:
            return draws.normal(*s, 4), moe_params(draws, 4, e, 3, gated)

        inputs, margin = _clear_choice(f"moe/{case}", draw, lambda x, p, k=top_k: _margin(x, p["router"], k))
        yield Check("moe", case, _moe_outputs(top_k, factor), _moe_gradients, inputs, margin)

    # All tokens lie on one side of expert 0's column: it is everybody's first choice, and its places run out.
    draws = Draws("moe/everything to one expert")
    params = moe_params(draws, 4, 4, 3, gated=True)
    params["router"] = params["router"].at[:, 0].set(jnp.array([6.0, 0.0, 0.0, 0.0]))
    x = draws.normal(2, 6, 4).at[..., 0].set(3.0)
    inputs = (x, params)
    margin = float(_margin(x, params["router"], 1))
    yield Check("moe", "everything to one expert", _moe_outputs(1, 1.0), _moe_gradients, inputs, margin)


def moe_params(draws: Draws, width: int, total: int, hidden: int, gated: bool) -> dict:
    """Router and experts of one layer."""
    params = {
        "router": draws.normal(width, total),
        "w_in": draws.normal(total, width, hidden),
        "w_out": draws.normal(total, hidden, width),
    }
    return {**params, "w_gate": draws.normal(total, width, hidden)} if gated else params


def _moe_outputs(top_k: int, factor: float) -> Callable:
    def forward(x: jax.Array, params: dict) -> tuple[Any, Any]:
        output, cache = moe.moe_forward(x, params, top_k, factor)
        return (output.y, output.balance, output.z), cache

    return forward


def _moe_gradients(d_out: tuple, cache: Any) -> Any:
    d_y, d_balance, d_z = d_out
    return moe.moe_backward(d_y, d_balance, d_z, cache)


def block_checks() -> Iterator[Check]:
    """The residual block with each normalisation, and with every dropout mask."""
    for case, config, masked in (
        ("rmsnorm, rotary", ModelConfig(capacity_factor=0.75), False),
        ("layernorm, biases", ModelConfig(norm="layernorm", rotary=False), False),
        ("dropout", ModelConfig(dropout=0.25, rotary=False), True),
    ):
        size = transformer.ModelSize(5, 4, 1, 3, 3, bias=config.norm == "layernorm", swiglu=not masked)
        masks = None
        if masked:
            draws = Draws("block/masks")
            masks = {
                "weights": draws.keep(2, 2, 4, 4),
                "attention": draws.keep(2, 4, 4),
                "moe": draws.keep(2, 4, 4),
            }

        def draw(draws: Draws, size: Any = size, config: ModelConfig = config) -> tuple:
            params = transformer.init_params(jax.random.key(0), size, config, 0.3)["blocks"][0]
            return draws.normal(2, 4, 4), draws.like(params, 0.4)

        def forward(x: jax.Array, params: dict, config: ModelConfig = config, masks: Any = masks) -> tuple[Any, Any]:
            output, cache = block.block_forward(x, params, config, masks)
            return (output.y, output.balance, output.z), cache

        def backward(d_out: tuple, cache: Any, config: ModelConfig = config) -> Any:
            d_y, d_balance, d_z = d_out
            return block.block_backward(d_y, d_balance, d_z, cache, config)

        def margin_of(*inputs: Any, forward: Callable = forward, top_k: int = config.top_k) -> jax.Array:
            return _router_margin(forward(*inputs)[1].moe.router, top_k)

        inputs, margin = _clear_choice(f"block/{case}", draw, margin_of)
        yield Check("block", case, forward, backward, inputs, margin)


MODEL_CASES: dict[str, tuple[ModelConfig, dict]] = {
    "tied, rotary, SwiGLU": (ModelConfig(capacity_factor=0.75), {}),
    "untied, learned positions, GELU, biases": (
        ModelConfig(norm="layernorm", rotary=False),
        {"tied": False, "longest": 5, "swiglu": False, "bias": True},
    ),
    "tied, learned positions": (ModelConfig(rotary=False), {"longest": 6}),
    "top 1, strong auxiliary losses": (
        ModelConfig(top_k=1, capacity_factor=1.0, balance_coef=1.0, z_coef=0.5),
        {"tied": False},
    ),
    "dropout": (ModelConfig(dropout=0.25), {"layers": 1}),
    "one layer, one expert": (ModelConfig(top_k=1, rotary=False), {"layers": 1, "experts": 1}),
}


def model_checks() -> Iterator[Check]:
    """The gradient of the whole training loss, in every parameter."""
    for case, (config, options) in MODEL_CASES.items():
        size = transformer.ModelSize(**{"vocabulary": 7, "width": 4, "layers": 2, "experts": 3, "hidden": 3, **options})
        tokens = Draws("model/tokens").integers(7, 2, 5)
        targets = Draws("model/targets").integers(7, 2, 5).at[0, -1].set(losses.IGNORE)
        masks = None
        if config.dropout > 0.0:
            masks = transformer.dropout_masks(jax.random.key(1), config, size.layers, (2, 5, 4))

        def draw(draws: Draws, size: Any = size, config: ModelConfig = config) -> tuple:
            return (draws.like(transformer.init_params(jax.random.key(0), size, config, 0.3), 0.4),)

        def forward(
            params: dict,
            tokens: Any = tokens,
            targets: Any = targets,
            config: ModelConfig = config,
            masks: Any = masks,
        ) -> tuple[Any, Any]:
            return transformer.loss_forward(params, tokens, targets, config, masks)

        def backward(d_loss: jax.Array, cache: Any, config: ModelConfig = config) -> Any:
            return transformer.loss_backward(d_loss, cache, config)

        def margin_of(params: dict, forward: Callable = forward, top_k: int = config.top_k) -> jax.Array:
            _, cache = forward(params)
            layers = cache.model.blocks
            return jnp.min(jnp.stack([_router_margin(b.moe.router, top_k) for b in layers]))

        inputs, margin = _clear_choice(f"model/{case}", draw, margin_of)
        yield Check("model", case, forward, backward, inputs, margin)


def _margin(x: jax.Array, kernel: jax.Array, top_k: int) -> jax.Array:
    return router.top_k_margin(x @ kernel, top_k)


def _router_margin(cache: router.RouterCache, top_k: int) -> jax.Array:
    x, kernel, _ = cache.linear
    return _margin(x, kernel, top_k)


def _clear_choice(
    name: str, draw: Callable[[Draws], tuple], margin_of: Callable[..., jax.Array]
) -> tuple[tuple, float]:
    """The first draw whose top-K choices are all clear of a change by twice the required margin."""
    compiled = jax.jit(margin_of)
    for attempt in range(100):
        inputs = draw(Draws(name, attempt))
        margin = float(compiled(*inputs))
        if margin > 2.0 * MARGIN:
            return inputs, margin
    raise ValueError(f"{name}: no draw with clear choices in 100")


def _with(forward: Callable, *constants: Any) -> Callable:
    """`forward` with the arguments after the differentiated ones filled in."""

    def filled(*inputs: Any) -> tuple[Any, Any]:
        return forward(*inputs, *constants)

    return filled


GROUPS: dict[Callable[[], Iterator[Check]], tuple[str, ...]] = {
    activation_checks: tuple(activations.ACTIVATIONS),
    linear_checks: ("linear", "dropout"),
    softmax_and_loss_checks: ("softmax", "logsumexp", "mse", "cross_entropy"),
    norm_checks: ("layernorm", "rmsnorm"),
    embedding_and_position_checks: ("embedding", "tied_head", "learned_positions", "rope"),
    attention_checks: ("attention", "multi_head"),
    router_checks: ("router",),
    expert_checks: ("gelu_experts", "swiglu_experts"),
    moe_checks: ("dispatch", "combine", "moe"),
    block_checks: ("block",),
    model_checks: ("model",),
}
"""Each group of checks, with the operations that it makes checks of."""

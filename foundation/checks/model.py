"""Checks of the residual block, and of the training loss of the whole language model."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from foundation import block, losses, transformer
from foundation.block import ModelConfig
from foundation.checks.inputs import Draws, router_margin
from foundation.parity import Check, as_jax


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
            shapes = {"weights": (2, 2, 4, 4), "attention": (2, 4, 4), "moe": (2, 4, 4)}
            masks = as_jax({name: draws.keep(*shape) for name, shape in shapes.items()})

        def init(size: Any = size, config: ModelConfig = config) -> dict:
            return transformer.init_params(jax.random.key(0), size, config)["blocks"][0]

        def forward(x: jax.Array, params: dict, config: ModelConfig = config, masks: Any = masks) -> tuple[Any, Any]:
            output, cache = block.block_forward(x, params, config, masks)
            return (output.y, output.balance, output.z), cache

        def backward(d_out: tuple, cache: Any, config: ModelConfig = config) -> Any:
            d_y, d_balance, d_z = d_out
            return block.block_backward(d_y, d_balance, d_z, cache, config)

        def margin(cache: Any, top_k: int = config.top_k) -> jax.Array:
            return router_margin(cache.moe.router, top_k)

        draws = Draws(f"block/{case}")
        yield Check("block", case, forward, backward, (draws.normal(2, 4, 4), draws.like(init, 0.5)), margin)


MODEL_CASES: dict[str, tuple[ModelConfig, dict]] = {
    "tied, rotary, SwiGLU": (ModelConfig(capacity_factor=0.75), {}),
    "untied, learned, GELU, biases": (
        ModelConfig(norm="layernorm", rotary=False),
        {"tied": False, "longest": 5, "swiglu": False, "bias": True},
    ),
    "tied, learned positions": (ModelConfig(rotary=False), {"longest": 6}),
    "top 1, strong auxiliary losses": (
        ModelConfig(top_k=1, capacity_factor=1.0, balance_coef=1.0, z_coef=0.5),
        {"tied": False},
    ),
    "dropout": (ModelConfig(dropout=0.25), {"layers": 1}),
    "grouped keys, one norm, plain gates": (
        ModelConfig(heads=4, norm_eps=0.1, rope_base=50.0, renormalise_gates=False),
        {"layers": 1, "kv_heads": 2, "head_width": 2, "qk_norm": "full"},
    ),
    "one layer, one expert": (ModelConfig(top_k=1, rotary=False), {"layers": 1, "experts": 1}),
}


def model_checks() -> Iterator[Check]:
    """The gradient of the whole training loss, in every parameter."""
    for case, (config, options) in MODEL_CASES.items():
        size = transformer.ModelSize(**{"vocabulary": 7, "width": 4, "layers": 2, "experts": 3, "hidden": 3, **options})
        tokens, targets = Draws("model/tokens").integers(7, 2, 5), Draws("model/targets").integers(7, 2, 5)
        targets[0, -1] = losses.IGNORE
        tokens, targets = as_jax((tokens, targets))
        masks = None
        if config.dropout > 0.0:
            masks = model_masks(config, size.layers)

        def init(size: Any = size, config: ModelConfig = config) -> dict:
            return transformer.init_params(jax.random.key(0), size, config)

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

        def margin(cache: Any, top_k: int = config.top_k) -> jax.Array:
            return jnp.min(jnp.stack([router_margin(b.moe.router, top_k) for b in cache.model.blocks]))

        yield Check("model", case, forward, backward, (Draws(f"model/{case}").like(init, 0.5),), margin)


def model_masks(config: ModelConfig, layers: int) -> Any:
    """Dropout masks for two sequences of five positions."""
    draws, stream = Draws("model/masks"), (2, 5, 4)
    shapes = {"weights": (2, config.heads, 5, 5), "attention": stream, "moe": stream}
    blocks = [{name: draws.keep(*shape) for name, shape in shapes.items()} for _ in range(layers)]
    return as_jax({"embedding": draws.keep(*stream), "blocks": blocks})

"""Checks of chapter 9: the residual block, and the training loss of the whole language model."""

from collections.abc import Iterator
from typing import Any

from foundation.block import ModelConfig, block_forward
from foundation.checks.inputs import Draws, gradient, router_margin
from foundation.losses import IGNORE
from foundation.parity import Check
from foundation.transformer import ModelSize, init_params, loss_forward

SMALL = {"vocabulary": 7, "width": 4, "layers": 2, "experts": 3, "hidden": 3}
MODELS: dict[str, tuple[ModelConfig, dict]] = {
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


def checks() -> Iterator[Check]:
    """The block with each normalisation, and with every dropout mask; the loss's gradient in every parameter."""
    for case, config, options in (
        ("rmsnorm, rotary", ModelConfig(capacity_factor=0.75), {}),
        ("layernorm, biases", ModelConfig(norm="layernorm", rotary=False), {"bias": True}),
        ("dropout", ModelConfig(dropout=0.25, rotary=False), {"swiglu": False}),
    ):
        draws = Draws(f"block/{case}")
        masks = block_masks(draws, config, 4) if config.dropout else None
        size = ModelSize(**{**SMALL, "layers": 1, **options})
        inputs = (draws.normal(2, 4, 4), draws.like(init_params, size, config)["blocks"][0])
        yield gradient(
            block_forward,
            case,
            inputs,
            config,
            masks,
            outputs=("y", "balance", "z"),
            after_cache=(config,),
            margin=router_margin(config.top_k),
        )
    for case, (config, options) in MODELS.items():
        tokens, targets = Draws("model/tokens").integers(7, 2, 5), Draws("model/targets").integers(7, 2, 5)
        targets[0, -1] = IGNORE
        size = ModelSize(**{**SMALL, **options})
        yield gradient(
            loss_forward,
            case,
            (Draws(f"model/{case}").like(init_params, size, config),),
            *(tokens, targets, config, model_masks(config, size.layers) if config.dropout else None),
            operation="model",
            after_cache=(config,),
            margin=router_margin(config.top_k),
        )


def block_masks(draws: Draws, config: ModelConfig, positions: int) -> dict:
    """Dropout masks of a block, for two sequences."""
    stream = (2, positions, 4)
    shapes = {"weights": (2, config.heads, positions, positions), "attention": stream, "moe": stream}
    return {name: draws.keep(*shape) for name, shape in shapes.items()}


def model_masks(config: ModelConfig, layers: int) -> Any:
    """Dropout masks of a model, for two sequences of five positions."""
    draws = Draws("model/masks")
    blocks = [block_masks(draws, config, 5) for _ in range(layers)]
    return {"embedding": draws.keep(2, 5, 4), "blocks": blocks}

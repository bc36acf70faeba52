"""Checks of chapter 9: the residual block, and the training loss of the whole language model."""

from collections.abc import Iterator
from typing import Any

from foundation.checks.inputs import Draws, gradient, projection, router_margin
from foundation.checks.router_and_its_gradient import moe_params
from foundation.losses import IGNORE
from foundation.parity import Check
from foundation.transformer import ModelConfig, block_forward, loss_forward

MODELS: dict[str, tuple[ModelConfig, dict]] = {
    "tied, rotary, SwiGLU": (ModelConfig(capacity_factor=0.75), {}),
    "untied, learned, GELU, biases": (
        ModelConfig(norm="layernorm", rotary=False),
        {"tied": False, "longest": 5, "swiglu": False, "bias": True, "layers": 1},
    ),
    "tied, learned positions": (ModelConfig(rotary=False), {"longest": 6, "layers": 1}),
    "top 1, strong auxiliary losses": (
        ModelConfig(top_k=1, capacity_factor=1.0, balance_coef=1.0, z_coef=0.5),
        {"tied": False},
    ),
    "dropout": (ModelConfig(dropout=0.25), {"layers": 1}),
    "grouped keys, one norm, plain gates": (
        ModelConfig(heads=4, norm_eps=0.1, rope_base=50.0, renormalise_gates=False),
        {"layers": 1, "grouped": True},
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
        inputs = (draws.normal(2, 4, 4), block_params(draws, **options))
        options = {"after_cache": (config,), "margin": router_margin(config.top_k)}
        yield gradient(block_forward, case, inputs, config, masks, outputs=("y", "balance", "z"), **options)
    for case, (config, options) in MODELS.items():
        tokens, targets = Draws("model/tokens").integers(7, 2, 5), Draws("model/targets").integers(7, 2, 5)
        targets[0, -1] = IGNORE
        params, layers = model_params(Draws(f"model/{case}"), **options), options.get("layers", 2)
        masks = model_masks(config, layers) if config.dropout else None
        options = {"after_cache": (config,), "margin": router_margin(config.top_k)}
        constants = (tokens, targets, config, masks)
        yield gradient(loss_forward, case, (params,), *constants, operation="model", **options)


def norm_params(draws: Draws, width: int = 4, bias: bool = False) -> dict:
    """Around 1, and a bias of LayerNorm."""
    scale = {"scale": 1.0 + draws.normal(width, std=0.5)}
    return scale | {"bias": draws.normal(width, std=0.5)} if bias else scale


def block_params(
    draws: Draws, experts: int = 3, swiglu: bool = True, bias: bool = False, grouped: bool = False
) -> dict:
    """One block of width 4; if it is grouped, with two normalised key heads for four heads of width 2."""
    queries = 8 if grouped else 4
    attention = {"qkv": projection(draws, 4, queries + 8, bias), "out": projection(draws, queries, 4, bias)}
    if grouped:
        attention |= {"query_norm": norm_params(draws, 8), "key_norm": norm_params(draws, 4)}
    norms = {name: norm_params(draws, bias=bias) for name in ("norm1", "norm2")}
    return {**norms, "attention": attention, "moe": moe_params(draws, experts, 3, swiglu)}


def model_params(draws: Draws, layers: int = 2, tied: bool = True, longest: int = 0, **options: Any) -> dict:
    """A model of width 4 and a vocabulary of 7, with these options of its blocks."""
    params: dict = {"embedding": draws.normal(7, 4, std=0.5), "norm": norm_params(draws, bias="bias" in options)}
    params["blocks"] = [block_params(draws, **options) for _ in range(layers)]
    if longest:
        params["positions"] = draws.normal(longest, 4, std=0.5)
    if not tied:
        params["head"] = draws.normal(4, 7, std=0.5)
    return params


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

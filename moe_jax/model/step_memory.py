"""The least memory that a training step needs, by formula. It needs no jax, so it is known before anything starts."""

from moe_jax.config import RunConfig
from moe_jax.config.presets import with_vocabulary
from moe_jax.config.train import STATE_BYTES
from moe_jax.model.costs import adapter_parameters, count_parameters, totals
from moe_jax.model.kernels.query_blocks import LONGEST_KEPT, kept_scores


def least_step_bytes(config: RunConfig) -> int:
    """Bytes that are in memory at once in a training step, whatever the compiler does.

    Parameters, and gradients and optimizer state of what is trained; the residual stream of each layer; and the
    attention weights. All gradients are there at once, because clipping needs the norm of all before the first update.
    The compiler may keep them in the precision of the products that they come from. Up to 1,024 positions the backward
    pass keeps the attention weights of each layer, or with remat those of one layer: batch x heads x T^2 / 2. For
    longer sequences it computes them again, a block at a time: batch x heads x 128 x T.
    """
    config = with_vocabulary(config)
    model, train = config.model, config.train
    weight = 2 if train.param_dtype == "bfloat16" else 4
    whole, state = totals(count_parameters(model)).total, STATE_BYTES[train.optimizer]
    gradient = least_gradient_bytes(config, config.execution.compute_dtype)
    if train.lora_rank:  # the model's own weights have neither gradient nor state; adapters are float32
        parameters = whole * weight + adapter_parameters(config).total * (4 + gradient + state)
    else:
        parameters = whole * (weight + gradient + state)
    return int(parameters) + least_activation_bytes(config, config.execution.compute_dtype)


def least_gradient_bytes(config: RunConfig, compute: str) -> int:
    """Least bytes of the gradient of a parameter that is trained: it may be kept as its product was computed."""
    stored = 2 if config.train.param_dtype == "bfloat16" and not config.train.lora_rank else 4
    return min(stored, _number_bytes(compute))


def least_activation_bytes(config: RunConfig, compute: str) -> int:
    """Bytes of the residual streams and of the attention weights that the backward pass keeps."""
    model, train, number = config.model, config.train, _number_bytes(compute)
    residual = model.layers * train.batch_size * model.seq_len * model.width * number
    layers = 1 if config.execution.remat or model.seq_len > LONGEST_KEPT else model.layers
    return residual + int(layers * train.batch_size * model.heads * kept_scores(model.seq_len) * number)


def _number_bytes(compute: str) -> int:
    """Bytes of a number in the precision of the products. `auto` may become a precision of two bytes."""
    return 4 if compute == "float32" else 2

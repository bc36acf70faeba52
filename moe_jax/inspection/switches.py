"""Experts that are switched off: a layer whose program has switches, and a run whose switches are set."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_jax.config import RunConfig, UserError
from moe_jax.inference.traced_pass import check_routed
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.router import Routing
from moe_jax.model.precision import writing_policy
from moe_jax.model.transformer import Forms, abstract_model
from moe_jax.runs.load import LoadedRun

SWITCHES = "off"
"""The name of the switches among the parameters of a layer."""


class SwitchableMoE(MoE):
    """`MoE` with switches: True where an expert is off.

    An expert that is switched off cannot be chosen. The router decides as if the expert did not exist: its logit is
    -inf, so it has the probability 0, the next-best expert takes its place, and the gates are renormalised over the K
    experts that are chosen instead. Where fewer than K experts are left, the gates of those that are left add up to 1.
    Without `renormalise_gates` a gate is the probability among the experts that are left.

    The switches are an argument of the program, beside the parameters. So one compiled program serves every choice of
    experts. Each sequence of a batch has switches of its own, so one call can answer "and without expert 3?" for many
    experts.

    They are kept as a parameter `[1, E]` or `[B, E]`, because parameters are what a compiled program is called with.
    """

    def __init__(self, width: int, hidden: int, experts: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(width, hidden, experts, *arguments, **settings)
        self.off = nnx.Param(jnp.zeros((1, experts), bool))

    def choose(self, logits: Float[Array, "B T E"]) -> Routing:
        return super().choose(jnp.where(self.off[...][:, None, :], -jnp.inf, logits))

    def selection_bias(self) -> Float[Array, "*batch E"] | None:
        bias = super().selection_bias()  # it could lift an expert of probability 0 above the others
        return None if bias is None else jnp.where(self.off[...][:, None, :], -jnp.inf, bias)


def with_switches(params: dict[str, Any], off: Bool[Array, "L B E"]) -> dict[str, Any]:
    """The parameters of a model with the switches of each layer. B is 1, or the number of sequences of the batch."""
    blocks = {n: {**block, "ffn": {**block["ffn"], SWITCHES: off[n]}} for n, block in params["blocks"].items()}
    return {**params, "blocks": blocks}


def switchable_graphdef(config: RunConfig, compute: str) -> nnx.GraphDef:
    """The static definition of a run's model whose experts can be switched off. `compute` is its compute precision."""
    return abstract_model(config.model, Forms(compute, config.execution.remat, SwitchableMoE))[0]


def switchable_writer(run: LoadedRun) -> nnx.GraphDef:
    """The definition for texts that are written token by token."""
    return switchable_graphdef(run.config, writing_policy(run.config.execution.compute_dtype).compute)


def switched_off(run: LoadedRun, off: np.ndarray) -> dict[str, Any]:
    """The fields of a run that change where experts are switched off, by bool [L, E].

    Raises UserError for a model without routers, and where a layer would have no expert left.
    """
    check_routed(run.config.model)
    for layer in np.flatnonzero(off.all(1)):
        raise UserError(f"layer {layer}: all its experts are switched off; leave one")
    return {
        "graphdef": switchable_graphdef(run.config, run.policy.compute),
        "writer": switchable_writer(run),
        "params": with_switches(run.params, jnp.asarray(off)[:, None]),
    }


def switches_of(run: LoadedRun) -> np.ndarray:
    """bool [L, E]: the experts of a run that are off."""
    config = run.config.model
    layers = [run.params["blocks"][n]["ffn"].get(SWITCHES) for n in range(config.layers)]
    return np.array([np.zeros(config.experts, bool) if off is None else np.asarray(off)[0] for off in layers])


def with_more_off(run: LoadedRun, layer: int, experts: Sequence[int]) -> np.ndarray:
    """bool [L, E]: the switches of a run, with these experts of a layer off too.

    Raises UserError for a layer or an expert that the model does not have.
    """
    config = run.config.model
    check_routed(config)
    for name, value, count in (("layer", layer, config.layers), *(("expert", e, config.experts) for e in experts)):
        if not 0 <= value < count:
            raise UserError(f"{name} {value}: must be between 0 and {count - 1}")
    off = switches_of(run)
    off[layer, list(experts)] = True
    return off

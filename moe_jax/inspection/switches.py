"""A layer whose experts can be switched off while its program runs."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.router import Routing

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

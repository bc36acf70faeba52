"""The arrays of a training step in bytes, for the dry run and for the lines before training: one count for both."""

import dataclasses
import math
from typing import Any, NamedTuple, Self

import jax
import optax

from moe_jax.config import RunConfig
from moe_jax.model.precision import Policy
from moe_jax.model.step_memory import gradient_bytes, least_activation_bytes
from moe_jax.training.optimizers.factory import state_bytes


class StepBytes(NamedTuple):
    """Bytes of the arrays of a training step. The step needs at least their sum."""

    weights: int
    gradients: int
    """At least. The compiler may keep a gradient in the precision of its product."""
    state: int
    activations: int
    """At least: residual streams and attention weights, which the backward pass reads (`model/step_memory.py`)."""
    trained: int
    """Parameters that have a gradient and a state."""

    @classmethod
    def of(
        cls, config: RunConfig, policy: Policy, params: Any, trained: Any, optimizer: optax.GradientTransformation
    ) -> Self:
        """`params` are the weights of the model and `trained` those that have a gradient, as arrays or as shapes."""
        execution = dataclasses.replace(config.execution, compute_dtype=policy.compute)
        config = dataclasses.replace(config, execution=execution)
        count = sum(math.prod(p.shape) for p in jax.tree.leaves(trained))
        return cls(
            sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves((params, _adapters(params, trained)))),
            gradient_bytes(config) * count,
            round(state_bytes(optimizer, trained) * count),
            least_activation_bytes(config),
            count,
        )

    @property
    def arrays(self) -> int:
        """Weights, gradients and state."""
        return self.weights + self.gradients + self.state

    @property
    def least(self) -> int:
        """What a training step needs, at least."""
        return self.arrays + self.activations


def _adapters(params: Any, trained: Any) -> Any:
    """What is trained beside the weights. Without adapters the weights themselves are trained."""
    return None if jax.tree.structure(params) == jax.tree.structure(trained) else trained

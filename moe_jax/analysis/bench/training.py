"""The whole training step: its rate against the machine's matmul rate, and its memory with and without a plain loss."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.accounting import count_parameters, totals
from moe_jax.analysis.gpu_plan import Programs
from moe_jax.config import RunConfig
from moe_jax.training import loss
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import TrainState, initial_params, initial_state
from moe_jax.training.step import Step


@dataclasses.dataclass
class Trainer:
    """A training step on random tokens, called without arguments; it hands its state from call to call."""

    config: RunConfig
    step: Step
    state: TrainState
    batch: np.ndarray

    @classmethod
    def of(cls, config: RunConfig, batch_size: int, micro_batches: int = 1) -> "Trainer":
        programs = Programs.of(config)
        params = initial_params(config, jax.random.key(0))
        state = initial_state(params, make_optimizer(config.train), programs.policy.loss_scaling)
        shape = (micro_batches, batch_size, config.model.seq_len + 1)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
        return cls(config, programs.step, state, tokens)

    def __call__(self) -> Any:
        self.state, report = self.step(self.state, self.batch)
        return report

    @property
    def active_flops(self) -> float:
        """6 x active matmul parameters x tokens of one call."""
        tokens = math.prod(self.batch.shape[:2]) * self.config.model.seq_len
        return 6.0 * totals(count_parameters(self.config.model)).multiplied * tokens


def compile_step(config: RunConfig, batch_size: int) -> Any:
    """The step, compiled for one micro-batch of `batch_size` sequences."""
    programs = Programs.of(config)
    batch = jax.ShapeDtypeStruct((1, batch_size, config.model.seq_len + 1), jnp.int32)
    lower: Callable[..., Any] = programs.step.lower  # pyright: ignore[reportFunctionMemberAccess]
    return lower(programs.state, batch).compile()


@contextlib.contextmanager
def plain_loss() -> Iterator[None]:
    """Steps that are traced within compute all logits at once, and jax differentiates them."""

    def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return loss.token_losses(logits, targets).mean()

    with mock.patch.object(loss, "mean_cross_entropy", plain):
        yield


def temporary_bytes(config: RunConfig, batch_size: int) -> dict[str, int]:
    """Peak temporary memory of the compiled step, by the compiler's account, and of the step with the plain loss."""
    ours = compile_step(config, batch_size).memory_analysis().temp_size_in_bytes
    with plain_loss():
        plain = compile_step(config, batch_size).memory_analysis().temp_size_in_bytes
    return {"temp_bytes": ours, "temp_bytes_plain_loss": plain}

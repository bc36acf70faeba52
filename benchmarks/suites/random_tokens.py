"""A training step on random tokens, for measurements in which the text does not matter."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from moe_jax.config import RunConfig
from moe_jax.model.costs import count_parameters, totals
from moe_jax.training.programs import Programs
from moe_jax.training.state import TrainState, initial_params
from moe_jax.training.step import Step


@dataclass
class RandomTokenTrainer:
    """A training step on random tokens, for benchmarks in which the text does not matter.

    It is called without arguments. Each call continues from the state of the last.
    """

    config: RunConfig
    step: Step
    state: TrainState
    batch: np.ndarray

    @classmethod
    def of(cls, config: RunConfig, batch_size: int, micro_batches: int = 1) -> "RandomTokenTrainer":
        programs = Programs.of(config)
        state = programs.state(initial_params(config, jax.random.key(0)))
        shape = (micro_batches, batch_size, config.model.seq_len + 1)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
        return cls(config, programs.step, state, tokens)

    def __call__(self) -> Any:
        self.state, report = self.step(self.state, self.batch)
        return report

    @property
    def active_flops(self) -> float:
        """Floating-point operations of one call: 6 x active matmul parameters x tokens."""
        tokens = math.prod(self.batch.shape[:2]) * self.config.model.seq_len
        return 6.0 * totals(count_parameters(self.config.model)).multiplied * tokens

"""The step on random tokens: each call goes on, and its operations are counted for all of its tokens."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.config import RunConfig
from moe_jax.model.costs import count_parameters, totals
from moe_jax.training import random_tokens
from moe_jax.training.random_tokens import RandomTokenTrainer
from tests.support import tiny


def test_each_call_goes_on_with_the_same_batch() -> None:
    seen: list[Any] = []
    start: Any = 0

    def step(state: Any, batch: np.ndarray) -> tuple[Any, str]:
        seen.append((state, batch is trainer.batch))
        return state + 1, f"report {state}"

    batch = np.zeros((2, 3, tiny.T + 1), np.int32)
    trainer = RandomTokenTrainer(RunConfig(model=tiny.config()), step, start, batch)
    assert [trainer(), trainer()] == ["report 0", "report 1"]
    assert seen == [(0, True), (1, True)]
    # 2 x 3 sequences of T tokens, forward and backward.
    multiplied = totals(count_parameters(tiny.config())).multiplied
    assert trainer.active_flops == 6 * multiplied * 2 * 3 * tiny.T


def test_a_batch_has_the_shape_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = SimpleNamespace(state=lambda params: params, step=None)
    monkeypatch.setattr(random_tokens.Programs, "of", lambda *_, **__: programs)
    monkeypatch.setattr(random_tokens, "initial_params", lambda *_: None)
    trainer = RandomTokenTrainer.of(RunConfig(model=tiny.config()), 3, micro_batches=2)
    assert (trainer.batch.shape, trainer.batch.dtype) == ((2, 3, tiny.T + 1), np.int32)
    assert (trainer.batch.min(), trainer.batch.max()) == (0, tiny.V - 1)

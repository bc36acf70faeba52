"""Runs of an experiment without training: a tiny recipe, and summaries whose scores a test chooses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparison.study_runs import BITS

from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.model.costs import count_parameters, totals, training_flops


def recipe(source: str, hidden: int = 8, **train: Any) -> RunConfig:
    """One layer of four experts, two of them active, T = 16, width 16; a step has 2 * 4 * 16 tokens."""
    model = ModelConfig(
        seq_len=16,
        layers=1,
        width=16,
        heads=2,
        experts=4,
        expert_hidden=hidden,
        vocab_size=257,
        routing=RoutingConfig(capacity_factor=0.75),
    )
    values = {"batch_size": 4, "grad_accum": 2, "log_every": 3}
    data = DataConfig(source=source, tokenizer="byte", eval_tokens=200)
    execution = ExecutionConfig(compute_dtype="float32")
    return RunConfig(model=model, data=data, train=TrainConfig(**(values | train)), execution=execution)


def summary_of(config: RunConfig, bits: float) -> dict[str, Any]:
    """The summary of a finished run, as far as an experiment reads it."""
    parameters, train = totals(count_parameters(config.model)), config.train
    return {
        BITS: bits,
        "steps": train.steps,
        "tokens_seen": train.steps * train.batch_size * train.grad_accum * config.model.seq_len,
        "training_flops": training_flops(config, train.steps),
        "params_total": parameters.total,
        "params_active": parameters.active,
        "wall_seconds": 1.0,
        "val_drop_fraction": 0.0,
        "train_drop_fraction": 0.0 if config.model.dense != "none" else 0.01,
    }


class Trainer:
    """Stands for `train_run`: writes down the runs that it is asked for, and scores them by a rule."""

    def __init__(self, score: Callable[[RunConfig], float]) -> None:
        self.score = score
        self.asked: list[RunConfig] = []

    def __call__(self, config: RunConfig) -> dict[str, Any]:
        self.asked.append(config)
        return summary_of(config, self.score(config))

    @property
    def folders(self) -> list[str]:
        return [Path(config.out).name for config in self.asked]

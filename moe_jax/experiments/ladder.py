"""The budgets of a scaling measurement, and their runs.

Each budget is trained by a run of its own, whose learning rate reaches its final value there. The mixture and the dense
baseline of the same active parameters get the same operations. So the model with the cheaper step takes more steps.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_jax.config import Dense, RunConfig
from moe_jax.config.baselines import DENSE_BASELINES, dense_baseline
from moe_jax.experiments.study_runs import StudyRun, run_config
from moe_jax.model.costs import training_flops

BUDGETS = 5
SIDES: tuple[Dense, ...] = ("none", "active")


class Budget(NamedTuple):
    """A budget of training operations, and the steps that each model takes for it."""

    flops: float
    steps: dict[Dense, int]


def budgets(base: RunConfig, lowest: float, largest: float) -> list[Budget]:
    """BUDGETS budgets from `lowest` to `largest`, each the same factor above the one before. Steps are rounded down."""
    factor = (largest / lowest) ** (1 / (BUDGETS - 1))
    one = {dense: training_flops(dense_baseline(base, dense), 1) for dense in SIDES}
    found = [lowest * factor**i for i in range(BUDGETS - 1)] + [largest]
    return [Budget(c, {dense: max(1, math.floor(c / one[dense])) for dense in SIDES}) for c in found]


def runs(base: RunConfig, ladder: Sequence[Budget], seeds: int, out: Path) -> list[StudyRun]:
    """Every run: seed by seed, within a seed budget by budget, at each budget the mixture first."""
    found = []
    for seed in range(seeds):
        for budget in ladder:
            for dense in SIDES:
                name = DENSE_BASELINES[dense]
                config = run_config(dense_baseline(base, dense), name, budget.steps[dense], seed, out)
                found.append(StudyRun(f"{name} for {budget.flops:.3g} operations, seed {seed}", config))
    return found

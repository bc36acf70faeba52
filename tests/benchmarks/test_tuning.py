"""The search for the learning rate and the depth of each side: equal costs, by hand, and what it chooses. No run is
trained."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from comparison import tuning
from comparison.baselines import Plan
from comparison.tuning import Candidate, Tuning, hidden_at_depth, search

from moe_jax.config import Dense, RunConfig
from moe_jax.config.presets import DENSE_BASELINES
from moe_jax.model.costs import training_flops
from tests.benchmarks.invented_runs import Trainer, recipe

BASE = recipe("stories", hidden=100, lr=1e-3, muon_lr=0.02)
FLOPS = 1000 * training_flops(BASE, 1)


def test_the_hidden_width_at_another_depth_by_hand() -> None:
    """A layer multiplies a token with 4*16*16 = 1,024 entries of attention, 64 of the router and 2*3*16 F of experts.
    One layer of F = 100 has 10,688. Two layers have 2 (1,088 + 96 F), which is nearest at F = 44: 10,624."""
    assert hidden_at_depth(BASE, 2) == 44
    assert hidden_at_depth(BASE, 1) == 100
    assert hidden_at_depth(BASE, 0) is None
    back = Candidate(1.0, 2, 44).apply(BASE)
    assert training_flops(back, 1) - training_flops(BASE, 1) == 6 * 128 * (10_624 - 10_688)


BEST = {"none": 2.0, "active": 0.5, "total": 1.0}


def score(config: RunConfig) -> float:
    """Each side has its own best rate, which is lower by 5^-0.32 in whole runs: they are five times as long. Two layers
    are better for the mixture only."""
    dense, layers = config.model.dense, config.model.layers
    best = BEST[dense] * (1 if config.train.seed == tuning.SEED else 5**-0.32)
    wrong_rate = abs(config.train.lr / 1e-3 - best)
    return 1.0 + wrong_rate + (layers - 1) * (-0.25 if dense == "none" else 0.25)


def found(trainer: Trainer, base: RunConfig = BASE, models: Sequence[Dense] = tuple(DENSE_BASELINES)) -> Tuning:
    return search(base, FLOPS, Path("out"), models, lambda runs: [trainer(run.config) for run in runs])


def test_each_side_gets_its_own_best() -> None:
    trainer = Trainer(score)
    chosen = found(trainer)
    assert chosen.best("none").candidate == Candidate(2.0, 2, 44)
    assert chosen.best("active").candidate == Candidate(0.5, 1, 100)
    assert chosen.best("total").candidate == Candidate(1.0, 1, 100)
    assert [len(chosen.of(dense)) for dense in DENSE_BASELINES] == [6, 6, 6]  # no depth of 0 layers
    assert {config.train.seed for config in trainer.asked} == {tuning.SEED} == {1000}
    assert len(set(trainer.folders)) == 18
    tried = [(t.candidate.rate, t.candidate.layers) for t in chosen.of("active")]
    # A quarter is tried because a half was the best here, and four because two was the best of the mixture.
    assert tried == [(0.5, 1), (1.0, 1), (2.0, 1), (0.25, 1), (4.0, 1), (0.5, 2)]  # the other depth with the best rate
    for config in trainer.asked:
        assert config.train.muon_lr / 0.02 == pytest.approx(config.train.lr / 1e-3)


def test_a_plan_takes_the_choices_and_keeps_them(tmp_path: Path) -> None:
    plan = Plan(BASE, FLOPS, {"none": 1.0, "active": 1.0, "total": 1.0}, found(Trainer(score)))
    mixture, dense = plan.settings("none"), plan.settings("active")
    # Whole runs are five times as long: the best rate is lower by 5^-0.32 = exp(-0.32 * 1.6094) = 0.5975.
    assert mixture.train.lr == pytest.approx(0.5975 * 2e-3, rel=1e-4)
    assert mixture.train.muon_lr == pytest.approx(0.5975 * 0.04, rel=1e-4)
    assert dense.train.lr == pytest.approx(0.5975 * 5e-4, rel=1e-4)
    assert (mixture.model.layers, mixture.model.expert_hidden) == (2, 44)
    assert (dense.model.layers, dense.model.dense) == (1, "active")
    assert plan.arms()[0].steps == FLOPS // training_flops(mixture, 1) > 1000
    plan.save(tmp_path / "plan.json", {})
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads(json.dumps(plan.tuning.to_json()))["chosen"]["moe"]["layers"] == 2

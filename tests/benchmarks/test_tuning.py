"""The search for the settings of each side: what is tried by hand, what it chooses, and on which text. No run is
trained."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from comparison import tuning
from comparison.baselines import Plan
from comparison.tuning import MIXTURE, Candidate, Side, Tuning, hidden_at_depth, search, sides, text_to_choose_on
from suites.dense_baselines import DENSE_BASELINES

from moe_jax.config import Dense, RunConfig
from moe_jax.model.costs import training_flops
from tests.benchmarks.invented_runs import Trainer, recipe

BASE = recipe("stories", hidden=100, lr=1e-3, muon_lr=0.02)
FLOPS = 1000 * training_flops(BASE, 1)
TOKENS, TIME = Side("active", "tokens"), Side("active", "wall")


def test_the_hidden_width_at_another_depth_by_hand() -> None:
    """A layer multiplies a token with 4*16*16 = 1,024 entries of attention, 64 of the router and 2*3*16 F of experts.
    One layer of F = 100 has 10,688. Two layers have 2 (1,088 + 96 F), which is nearest at F = 44: 10,624."""
    assert hidden_at_depth(BASE, 2) == 44
    assert hidden_at_depth(BASE, 1) == 100
    assert hidden_at_depth(BASE, 0) is None
    back = Candidate(1.0, 2, 2, 44).apply(BASE)
    assert training_flops(back, 1) - training_flops(BASE, 1) == 6 * 128 * (10_624 - 10_688)


BEST = {"none": 2.0, "active": 0.5, "total": 1.0}


def score(config: RunConfig) -> float:
    """Each model has its own best rate, which is lower by 5^-0.32 in whole runs: they are five times as long. Three
    layers are the best for the mixture, one for the others, and four heads for the baseline of the same parameters."""
    dense, layers = config.model.dense, config.model.layers
    best = BEST[dense] * (1 if config.train.seed == tuning.SEED else 5**-0.32)
    wrong_rate = abs(config.train.lr / 1e-3 - best)
    wrong_heads = abs(config.model.heads - (4 if dense == "active" else 2)) / 8
    return 1.0 + wrong_rate + wrong_heads + 0.25 * abs(layers - (3 if dense == "none" else 1))


def ratio(first: RunConfig, second: RunConfig) -> float:
    """A layer of a dense network takes a quarter of the time of a layer of the mixture."""
    assert first.train == second.train == BASE.train, "a rate changes no time, so no rate is measured"
    return first.model.layers / second.model.layers * (0.25 if first.model.dense != "none" else 1)


def found(trainer: Trainer, base: RunConfig = BASE, models: Sequence[Dense] = tuple(DENSE_BASELINES)) -> Tuning:
    return search(base, FLOPS, Path("out"), models, lambda runs: [trainer(run.config) for run in runs], ratio)


def test_each_side_goes_on_until_it_gets_worse() -> None:
    trainer = Trainer(score)
    chosen = found(trainer)
    assert chosen.best(MIXTURE).candidate == Candidate(2.0, 3, 2, hidden_at_depth(BASE, 3) or 0)
    assert chosen.best(TOKENS).candidate == Candidate(0.5, 1, 4, 100)
    assert chosen.best(Side("total", "tokens")).candidate == Candidate(1.0, 1, 2, 100)
    assert [(t.candidate.rate, t.candidate.layers, t.candidate.heads) for t in chosen.of(MIXTURE)] == [
        *((1.0, 1, 2), (0.5, 1, 2), (2.0, 1, 2), (4.0, 1, 2)),  # half is worse, two is better, four is worse
        *((2.0, 2, 2), (2.0, 3, 2)),  # no depth of 0 layers, and with four no hidden width has as many operations
        *((2.0, 3, 1), (2.0, 3, 4)),  # both worse
    ]
    assert {config.train.seed for config in trainer.asked} == {tuning.SEED} == {1000}
    for config in trainer.asked:
        assert config.train.muon_lr / 0.02 == pytest.approx(config.train.lr / 1e-3)
        assert config.train.eval_every == config.train.steps, "a short run is scored once, at its end"


def test_a_dense_side_has_the_tokens_or_the_time_of_the_mixtures_best_run() -> None:
    """It has three layers. A dense network of one layer takes a twelfth of its time, one of two layers a sixth."""
    chosen = found(Trainer(score))
    steps = chosen.best(MIXTURE).steps
    by_layers = {(t.candidate.layers, t.steps) for t in chosen.of(TIME)}
    assert by_layers == {(1, 12 * steps), (2, 6 * steps)}
    assert {t.steps for t in chosen.of(TOKENS)} == {steps} == {199}


def test_the_mixture_for_the_same_time_may_be_another_one() -> None:
    """Three layers are the best for the same tokens. In their time one layer takes three times the steps, and wins."""
    chosen = found(Trainer(lambda c: 0.1 * abs(c.model.layers - 3) + 300 / c.train.steps), models=["none"])
    mixture, in_time = chosen.best(MIXTURE), chosen.best(Side("none", "wall"))
    assert (mixture.candidate.layers, mixture.steps) == (3, 199)
    assert (in_time.candidate.layers, in_time.steps) == (1, 3 * 199)


def test_choices_are_made_on_a_part_of_the_training_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a")
    base = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, source=str(tmp_path)))
    assert text_to_choose_on(base) == base  # without a validation file the folder is that text already
    (tmp_path / "valid.txt").write_text("b")
    assert text_to_choose_on(base).data.source == str(tmp_path / "train.txt")
    assert text_to_choose_on(BASE) == BASE


def test_a_plan_takes_the_choices_and_keeps_them(tmp_path: Path) -> None:
    names = [side.name for side in sides(list(DENSE_BASELINES))]
    plan = Plan(BASE, FLOPS, dict.fromkeys(names, 1.0), found(Trainer(score)))
    mixture, dense = plan.settings(MIXTURE), plan.settings(TOKENS)
    # Whole runs are five times as long: the best rate is lower by 5^-0.32 = exp(-0.32 * 1.6094) = 0.5975.
    assert mixture.train.lr == pytest.approx(0.5975 * 2e-3, rel=1e-4)
    assert mixture.train.muon_lr == pytest.approx(0.5975 * 0.04, rel=1e-4)
    assert dense.train.lr == pytest.approx(0.5975 * 5e-4, rel=1e-4)
    assert (mixture.model.layers, dense.model.layers, dense.model.heads) == (3, 1, 4)
    arms = plan.arms()
    assert [arm.name for arm in arms] == names
    assert arms[0].steps == FLOPS // training_flops(mixture, 1)
    whole = plan.config(arms[1], 0, Path("out"))
    assert whole.train.eval_every == whole.train.steps, "a second look at the text would choose a checkpoint"
    plan.save(tmp_path / "plan.json", {})
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.tuning is not None
    assert json.loads(json.dumps(plan.tuning.to_json()))["chosen"]["moe"]["layers"] == 3

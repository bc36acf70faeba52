"""The search for the learning rate and the depth of each side: equal costs, by hand, and what it chooses. No run is
trained."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.cli import origin
from moe_jax.cli.compare import Compare
from moe_jax.config import ConfigError, Dense, RunConfig
from moe_jax.config.baselines import DENSE_BASELINES, dense_baseline
from moe_jax.experiments import comparison, study_runs, tuning
from moe_jax.experiments.comparison import Plan
from moe_jax.experiments.comparison_result import report
from moe_jax.experiments.tuning import Candidate, Trial, Tuning, hidden_at_depth, search
from moe_jax.model.costs import training_flops
from moe_jax.system.timing import Times
from tests.experiments.invented import Trainer, recipe, summary_of

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


def test_a_dense_baseline_is_widened_through_the_experts_that_it_stands_for() -> None:
    """Its hidden width is round(2 F + 4/3): 201 at F = 100, so a layer has 1,024 + 48 * 201 = 10,672. Two layers have
    2 (1,024 + 48 * 89) = 10,592 at F = 44 and 10,784 at F = 45."""
    assert hidden_at_depth(dense_baseline(BASE, "active"), 2) == 44


def test_a_depth_without_equal_operations_is_none() -> None:
    """At F = 8 a layer has 1,856 entries, and two layers have at least 2 (1,088 + 96) = 2,368."""
    assert hidden_at_depth(recipe("stories"), 2) is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dense", list(DENSE_BASELINES))
@pytest.mark.parametrize("layers", [2, 4])
def test_a_step_costs_the_same_at_another_depth(optimizer: Any, dense: Any, layers: int) -> None:
    """To within LARGEST_MISMATCH; with Muon the products of the optimizer count too."""
    model = dataclasses.replace(BASE.model, layers=3, width=32)
    side = dense_baseline(
        dataclasses.replace(BASE, model=model, train=dataclasses.replace(BASE.train, optimizer=optimizer)), dense
    )
    hidden = hidden_at_depth(side, layers)
    assert hidden is not None
    there = training_flops(Candidate(1.0, layers, hidden).apply(side), 1)
    assert there == pytest.approx(training_flops(side, 1), rel=tuning.LARGEST_MISMATCH)
    for other in (hidden - 1, hidden + 1):
        further = training_flops(Candidate(1.0, layers, other).apply(side), 1)
        assert abs(further - training_flops(side, 1)) >= abs(there - training_flops(side, 1))


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


def test_a_side_that_is_left_out_costs_nothing() -> None:
    trainer = Trainer(score)
    chosen = found(trainer, models=("none", "active"))
    assert chosen.models == ["none", "active"]
    assert {config.model.dense for config in trainer.asked} == {"none", "active"}
    assert list(chosen.to_json()["chosen"]) == ["moe", "dense-active"]
    assert chosen.sentences()[0].startswith("the search: 6 short runs for each of 2 sides")


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


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        ({"none": 1.0, "active": 1.0}, [0.5, 1, 2]),
        ({"none": 1.0, "active": 2.0}, [0.5, 1, 2, 4]),
        ({"none": 0.5, "active": 4.0}, [0.25, 0.5, 1, 2, 4, 8]),
        ({"none": 100.0, "active": 1.0}, [0.5, 1, 2, 4, 8]),
        ({"none": 0.001, "active": 1.0}, [0.125, 0.25, 0.5, 1, 2]),
    ],
)
def test_rates_are_tried_until_the_best_of_each_side_is_none_of_the_ends(
    best: dict[str, float], tried: list[float]
) -> None:
    """Within LOWEST_RATE and HIGHEST_RATE. Both sides try the same rates."""
    trainer = Trainer(lambda config: abs(config.train.lr / 1e-3 - best[config.model.dense]))
    chosen = found(trainer, models=("none", "active"))
    assert chosen.rates == chosen.to_json()["rates"] == tried
    for dense in ("none", "active"):
        assert sorted(t.candidate.rate for t in chosen.of(dense) if t.candidate.layers == 1) == tried
        nearest = min(tried, key=lambda rate: abs(rate - best[dense]))
        assert chosen.best(dense).candidate == Candidate(nearest, 1, 100)
        assert ("no rate beyond" in chosen.sentences()[1 + (dense == "active")]) == (nearest in (tried[0], tried[-1]))


def test_every_short_run_has_a_fifth_of_the_budget() -> None:
    """The budget is 1,000 steps of the mixture. The step of the baseline with the same total costs more, so it takes
    fewer."""
    trainer = Trainer(score)
    found(trainer)
    assert trainer.asked[0].train.steps == 200
    for config in trainer.asked:
        spent = training_flops(config, config.train.steps)
        assert FLOPS / 5 - training_flops(config, 1) < spent <= FLOPS / 5
    total = next(config for config in trainer.asked if config.model.dense == "total")
    assert total.train.steps < 200


def test_a_depth_that_one_side_cannot_have_is_tried_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    width = tuning.hidden_at_depth
    monkeypatch.setattr(
        tuning, "hidden_at_depth", lambda side, layers: None if side.model.dense == "total" else width(side, layers)
    )
    trainer = Trainer(score)
    assert {trial.candidate.layers for trial in found(trainer).trials} == {1}
    assert len(trainer.asked) == 15


def trial(dense: Any, rate: float, bits: float) -> Trial:
    return Trial(dense, Candidate(rate, 1, 100), 10, 2e9, bits)


TUNING = Tuning(
    tuple(
        trial(dense, rate, bits)
        for dense, scores in {"none": (1.2, 1.1, 1.3), "active": (1.1, 1.2, 1.3), "total": (1.0, 1.0, 1.0)}.items()
        for rate, bits in zip(tuning.RATES, scores, strict=True)
    )
)


def test_the_words_name_the_cost_and_a_rate_at_the_end() -> None:
    cost, mixture, active, total = TUNING.sentences()
    assert "3 short runs for each of 3 sides, seed 1000, each of 20% of the budget; 1.8e+10 operations in all" in cost
    assert mixture.startswith("moe: learning rate 1 x the preset's, 1 layers, hidden width of an expert 100; 1.1000 ")
    assert "in whole runs the learning rate is 0.597 x the preset's" in mixture
    assert "no rate beyond" not in mixture
    assert "learning rate 0.5 x" in active
    assert "no rate beyond this one was tried" in active
    assert "learning rate 0.5 x" in total  # of equal scores the first


def test_a_search_comes_back_as_it_was_saved() -> None:
    document = json.loads(json.dumps(TUNING.to_json()))
    assert Tuning.from_json(document) == TUNING
    del document["rate_factor_for_whole_runs"]  # an earlier version had none
    assert Tuning.from_json(document).chosen("none") == Tuning.from_json(document).best("none").candidate
    assert document["chosen"]["dense-active"] == TUNING.best("active").to_json()
    assert [t["val_bits_per_byte"] for t in document["trials"]] == [1.2, 1.1, 1.3, 1.1, 1.2, 1.3, 1.0, 1.0, 1.0]
    assert document["training_flops"] == 9 * 2e9


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
    results = comparison_results(plan)
    assert report(plan, results, dict).record["tuning"] == plan.tuning.to_json()
    assert report(plan, results, dict).sentences[:4] == plan.tuning.sentences()


def comparison_results(plan: Plan) -> Any:
    from moe_jax.experiments.comparison_result import collect

    summaries: dict[Any, list[Any]] = {}
    for arm, _, config in comparison.runs(plan, 2, Path("out")):
        summaries.setdefault(arm, []).append(summary_of(config, 1.5))
    return collect(plan, summaries)


# The command


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"A cat met a dog, {i} times." for i in range(200)))
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(origin, "preset", lambda name: recipe(str(text), hidden=100, lr=1e-3))
    monkeypatch.setattr(comparison, "RandomTokenTrainer", SimpleNamespace(of=lambda *_: None))
    monkeypatch.setattr(comparison, "alternate", lambda models, rounds: {name: Times((0.5,)) for name in models})
    return Compare(out=str(tmp_path / "out"), seeds=2, flops=FLOPS, tune=True)


def test_a_tuned_comparison_searches_once(
    asked: Compare, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is there before the first run, so another one is refused from then on. The second call searches no
    more."""
    trainer = Trainer(score)
    out = Path(asked.out)

    def train(config: RunConfig, signals: Any) -> dict[str, Any]:
        assert json.loads((out / "plan.json").read_text())["asked"]["study"] == "tuned"
        return trainer(config)

    monkeypatch.setattr(study_runs, "train_run", train)
    assert asked.execute() == 0
    printed = capsys.readouterr().out
    assert "search, dense-total, 0.5 x the learning rate, 1 layers" in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["tuning"]["chosen"]["moe"]["layers"] == 2
    scores = [bits for arm in result["arms"] for bits in arm["val_bits_per_byte"]]
    assert scores == pytest.approx([0.75] * 2 + [1.0] * 8)
    plan, written = Plan.load(out / "plan.json"), (out / "comparison.md").read_text()
    assert all(sentence in written for sentence in plan.tuning.sentences())
    assert len(trainer.asked) == 18 + 2 * 5
    assert asked.execute() == 0
    assert len(trainer.asked) == 18 + 2 * 5 + 2 * 5
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    with pytest.raises(ConfigError, match=r"--out .*begun with other settings"):
        dataclasses.replace(asked, tune=False)._check(out)

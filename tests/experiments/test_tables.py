"""The numbers and words of a comparison and of a page of samples, worked by hand. Nothing is trained."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.config import RunConfig
from moe_jax.experiments import comparison, comparison_plots, samples, study_runs
from moe_jax.experiments.comparison import Arm, Plan
from moe_jax.experiments.comparison_result import HEADINGS, Difference, report
from moe_jax.experiments.intervals import Interval, apart
from moe_jax.experiments.samples import Measure, prompted
from moe_jax.experiments.samples import to_markdown as page
from moe_jax.experiments.text_statistics import matched_draws
from moe_jax.inference.sampling import Sampling
from tests.experiments.test_comparison import arm_result
from tests.support import tiny

MOE, ACTIVE, WALL = Arm("none", "tokens", 4), Arm("active", "tokens", 4), Arm("active", "wall", 6)
NAN = math.nan


def test_intervals_that_touch_are_not_apart() -> None:
    assert apart(Interval(1, 0.5, 1.5), Interval(2, 1.5, 2.5)) is False
    assert apart(Interval(2, 1.5, 2.5), Interval(1, 0.5, 1.5)) is False
    for a, b in ((Interval(1, NAN, NAN), Interval(2, 1, 3)), (Interval(2, 1, 3), Interval(1, NAN, NAN))):
        assert apart(a, b) is None
    assert Interval(1, 0.5, 1.5).to_json() == {"mean": 1, "interval": [0.5, 1.5]}


@pytest.mark.parametrize(
    ("low", "high", "told"), [(0.0, 0.3, False), (-0.3, 0.0, False), (0.01, 0.3, True), (-0.3, -0.01, True)]
)
def test_an_interval_that_holds_zero_tells_nothing(low: float, high: float, told: bool) -> None:
    verdict = Difference(ACTIVE, Interval((low + high) / 2, low, high), True).verdict
    assert ("less than the seeds can tell" in verdict) != told
    assert ("intervals of the means are apart" in verdict) == told


def test_a_difference_of_zero_is_no_win() -> None:
    assert "is worse than" in Difference(ACTIVE, Interval(0.0, NAN, NAN), None).verdict
    found = Difference(WALL, Interval(0.5, 0.25, 0.75), False)
    assert found.to_json() == {
        "twin": "active",
        "same": "wall",
        "mean": 0.5,
        "interval": [0.25, 0.75],
        "apart": False,
        "verdict": found.verdict,
    }


def test_the_result_of_an_arm() -> None:
    result = arm_result(MOE, [1.0, 2.0])
    result.summaries[0]["train_drop_fraction"], result.summaries[1]["val_drop_fraction"] = 0.03, 0.5
    found = result.to_json()
    assert found["train_drop_fraction"] == pytest.approx(0.02)
    assert found["val_drop_fraction"] == 0.5
    assert (found["arm"], found["steps"], found["wall_seconds"]) == ("moe", 4, [3.0, 3.0])
    assert arm_result(ACTIVE, [1.0]).to_json()["train_drop_fraction"] is None
    result.summaries[0]["train_drop_fraction"] = None
    assert result.mean("train_drop_fraction") == 0.01
    result.summaries[1]["train_drop_fraction"] = None
    assert result.mean("train_drop_fraction") is None


def test_the_markdown_has_the_table_the_sentences_and_the_scores_of_the_seeds() -> None:
    found = report(plan(), [arm_result(MOE, [1.0, 1.5]), arm_result(ACTIVE, [1.25, 1.75])], dict)
    table, sentences, scores = (part.splitlines() for part in found.to_markdown().split("\n\n"))
    assert table[0] == f"| {' | '.join(HEADINGS)} |"
    assert set(table[1]) == {"|", "-", " "}
    assert [line.split(" | ")[0] for line in table[2:]] == ["| moe", "| dense-active, same tokens"]
    assert all(line.count("|") == len(HEADINGS) + 1 for line in table)
    assert [line[:22] for line in sentences] == ["- at the same tokens th"[:22]]
    assert scores == [
        "| bits per byte | seed 0 | seed 1 |",
        "| --- | --- | --- |",
        "| moe | 1.0000 | 1.5000 |",
        "| dense-active, same tokens | 1.2500 | 1.7500 |",
    ]


# The plan


def plan(flops: float = 1e9) -> Plan:
    return Plan(RunConfig(model=tiny.config()), flops, {"none": 0.5, "active": 0.25, "total": 1.0})


def test_steps_are_the_budget_divided_by_the_cost_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "training_flops", lambda config, steps: 100.0 * steps)
    for flops, steps in ((99, 1), (399, 3), (400, 4)):
        assert [arm.steps for arm in plan(flops).arms()] == [steps, steps, 2 * steps, steps, max(1, round(steps / 2))]


@pytest.mark.parametrize(("steps", "each"), [(1, 1), (10, 1), (11, 2), (100, 10), (101, 11)])
def test_a_run_is_evaluated_ten_times(steps: int, each: int) -> None:
    train = plan().config(Arm("none", "tokens", steps), 3, Path("out")).train
    assert (train.steps, train.seed, train.eval_every, train.save_every, train.patience) == (steps, 3, each, each, 0)
    assert study_runs.EVALUATIONS == 10


def test_a_plan_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = plan()
    saved.save(tmp_path / "plan.json", {"seeds": 3})
    assert Plan.load(tmp_path / "plan.json") == saved
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["asked"] == {"seeds": 3}
    assert document["steps"] == {arm.name: arm.steps for arm in saved.arms()}
    assert document["machine"]


def test_every_number_of_a_finished_run_is_needed(tmp_path: Path) -> None:
    whole = {"val_whole_stream": True, "steps": 4} | dict.fromkeys(study_runs.NEEDED, 1.5)
    for name in study_runs.NEEDED:
        (tmp_path / "summary.json").write_text(json.dumps(whole | {name: None}))
        assert study_runs.finished(tmp_path, 4) is None
    (tmp_path / "summary.json").write_text(json.dumps(whole | dict.fromkeys(study_runs.NEEDED, 0)))
    assert study_runs.finished(tmp_path, 4) is not None


# Its pictures


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Plan, Path]:
    """Each run of two seeds has evaluations at steps 1 and 2."""
    found = plan()
    for _, seed, config in comparison.runs(found, 2, tmp_path):
        folder = Path(config.run_dir)
        folder.mkdir(exist_ok=True)
        records = [{"step": s, "split": "val", "bits_per_byte": 2.0 - s + seed} for s in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return found, tmp_path


def test_curves_have_tokens_and_seconds_below(runs: tuple[Plan, Path]) -> None:
    pytest.importorskip("matplotlib")
    saved, out = runs
    figure = comparison_plots._training_curves(saved, 2, out)
    tokens, wall = figure.axes
    per_step = saved.base.train.batch_size * saved.base.train.grad_accum * saved.base.model.seq_len / 1e6
    assert [len(axes.get_lines()) for axes in (tokens, wall)] == [6, 6]  # three models, two seeds
    for line in tokens.get_lines():
        assert list(line.get_xdata()) == pytest.approx([per_step, 2 * per_step])
    assert [list(line.get_xdata()) for line in wall.get_lines()[:3]] == [[0.5, 1.0], [0.25, 0.5], [1.0, 2.0]]
    assert [list(line.get_ydata()) for line in tokens.get_lines()[::3]] == [[1.0, 0.0], [2.0, 1.0]]
    assert [text.get_text() for text in tokens.get_legend().get_texts()] == ["moe", "dense-active", "dense-total"]
    assert (tokens.get_title("left"), wall.get_title("left")) == ("same tokens", "same wall clock")
    assert (tokens.get_ylabel(), wall.get_ylabel()) == ("bits per byte of the validation subset", "")


def test_results_are_dots_with_their_interval() -> None:
    pytest.importorskip("matplotlib")
    results = [arm_result(MOE, [1.0, 2.0, 3.0]), arm_result(ACTIVE, [4.0, 6.0, 5.0]), arm_result(WALL, [5.0, 5.5, 6.0])]
    figure = comparison_plots._final_results(results)
    tokens, wall = figure.axes
    assert [label.get_text() for label in tokens.get_xticklabels()] == ["moe", "dense-active"]
    assert points(tokens, "o") == [([0.15] * 3, [1.0, 2.0, 3.0]), ([1.15] * 3, [4.0, 6.0, 5.0])]
    assert [y for _, y in points(wall, "D")] == [[2.0], [5.5]]
    low, high = tokens.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert tokens.get_xlim() == (-0.5, 1.5)
    joined = [line.get_ydata() for line in tokens.get_lines() if line.get_color() == "0.7"]
    assert [list(y) for y in joined] == [[1.0, 4.0], [2.0, 6.0], [3.0, 5.0]]


def test_one_seed_has_no_interval() -> None:
    pytest.importorskip("matplotlib")
    figure = comparison_plots._final_results([arm_result(MOE, [1.0]), arm_result(ACTIVE, [4.0])])
    tokens, _ = figure.axes
    assert [np.ptp(bar.get_segments()[0][:, 1]) for bar in tokens.collections] == [0, 0]


def points(axes: Any, marker: str) -> list[tuple[list[float], list[float]]]:
    """The x and y of each line that has this marker."""
    return [(list(a.get_xdata()), list(a.get_ydata())) for a in axes.get_lines() if a.get_marker() == marker]


# Samples


def test_each_prompt_is_told_with_each_seed() -> None:
    asked: list[Any] = []

    class Generator:
        def pieces(self, prompt: str, settings: Sampling, **how: Any) -> list[str]:
            asked.append((prompt, how))
            return [" one", " two"]

    generator: Any = Generator()
    found = prompted(generator, Sampling(), 9)
    assert [(p, seed) for p, seed, _ in found] == [(p, seed) for p in samples.PROMPTS for seed in (0, 1)]
    assert found[0][2] == f"{samples.PROMPTS[0]} one two"
    assert asked[1] == (samples.PROMPTS[0], {"seed": 1, "number": 0, "limit": 9})


def test_the_measures() -> None:
    found = samples.measure(["a b c a b c a b"], iter([]))
    assert {name: m.model for name, m in found.items()} == {
        "repetition_4": 1 - 3 / 5,
        "distinct_1": 3 / 8,
        "distinct_2": 3 / 7,
        "distinct_3": 3 / 6,
    }


def test_at_most_twenty_draws_of_the_first_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = [f"w{i} x" for i in range(50)]
    assert len(samples.measure(["a b"], iter(stories))["distinct_1"].text) == samples.DRAWS == 20
    monkeypatch.setattr(samples, "POOL", 3)
    assert len(samples.measure(["a b"], iter(stories))["distinct_1"].text) == 3


def test_a_draw_of_nothing_is_never_made() -> None:
    assert matched_draws(["a"], ["b", "c"], 0) == []


def test_a_page_of_samples() -> None:
    measures = {"distinct_1": Measure(0.5, (0.25, 0.75)), "repetition_4": Measure(0.125, ())}
    text = page("Title", ["one", "two"], measures, [("Once", 1, " Once\n\nmore \n")])
    assert text.splitlines() == [
        "# Title",
        "",
        "- one",
        "- two",
        "",
        "| measure | model | validation text, mean | range of the draws |",
        "|---|---|---|---|",
        "| distinct-1 | 0.500 | 0.500 | 0.250 to 0.750 in 2 draws |",
        "| repetition-4 | 0.125 | too short to say | |",
        "",
        "## Once … (seed 1)",
        "",
        "> Once",
        ">",
        "> more",
    ]
    assert text.endswith("more\n")

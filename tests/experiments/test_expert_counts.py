"""`compare --experts 4,8,16`: the models, differences by hand, words, record, picture. No run is trained."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.cli import compare, origin
from moe_jax.cli.compare import Compare
from moe_jax.config import ConfigError, RunConfig
from moe_jax.experiments import study_runs
from moe_jax.experiments.expert_counts import ExpertCounts, Models
from moe_jax.experiments.study_runs import BITS
from moe_jax.experiments.sweep_plots import experts_figure
from moe_jax.model.costs import training_flops
from tests.experiments.invented import Trainer, recipe

BASE = recipe("stories")
FLOPS = 12.5 * training_flops(BASE, 1)
MIXTURES = ("moe-2-experts", "moe-4-experts", "moe-8-experts")
SCORES = {0: 2.0, 2: 2.1, 4: 1.9, 8: 1.8}


def score(config: RunConfig) -> float:
    """2 for the dense baseline; with experts 2.1, 1.9, 1.8. The second seed is 0.5 above, with experts 0.52."""
    experts = 0 if config.model.dense == "active" else config.model.experts
    return SCORES[experts] + config.train.seed * (0.52 if experts else 0.5)


def made(seeds: int = 2) -> ExpertCounts:
    models, trainer = Models.of(BASE, [8, 2, 4], FLOPS), Trainer(score)
    return ExpertCounts.of(models, [trainer(run.config) for run in models.runs(seeds, Path("out"))])


def test_all_models_train_for_the_same_tokens() -> None:
    found = Models.of(BASE, [8, 2, 4], FLOPS).runs(2, Path("out"))
    assert {run.config.train.steps for run in found} == {12}
    assert [Path(run.config.out).name for run in found[:4]] == [
        "dense-active-12-steps-seed-0",
        "moe-2-experts-12-steps-seed-0",
        "moe-4-experts-12-steps-seed-0",
        "moe-8-experts-12-steps-seed-0",
    ]
    assert [run.config.train.seed for run in found] == [0] * 4 + [1] * 4
    assert {run.config.model.routing.top_k for run in found} == {2}
    assert {run.config.model.expert_hidden for run in found} == {8}
    assert [run.config.model.dense for run in found[:2]] == ["active", "none"]


def test_active_parameters_differ_by_the_router_only() -> None:
    """One layer of width 16: E more experts have 16 E more router entries, and 3 * 16 * 8 E more parameters."""
    by_count = {result.experts: result.to_json() for result in made().mixtures}
    assert by_count[8]["params_active"] - by_count[4]["params_active"] == 16 * 4
    assert by_count[8]["params_total"] - by_count[4]["params_total"] == 16 * 4 + 384 * 4


def test_differences_by_hand() -> None:
    """With 4 experts: 2 - 1.9 = 0.1 and 2.5 - 2.42 = 0.08, so the mean is 0.09, s is 0.01 sqrt 2, and t(0.975, 1) is
    12.706: the half width is 12.706 * 0.01 = 0.127."""
    found = made()
    difference = found.difference(found.mixtures[1])
    assert difference.mean == pytest.approx(0.09)
    assert difference.high - 0.09 == pytest.approx(0.12706, rel=1e-4)
    told = found.sentences()
    assert told[0].startswith("with 2 experts the mixture is worse than the dense baseline of the same active")
    assert "by 0.0900 bits per byte, less than the seeds can tell: 95 % [-0.0371, +0.2171]" in told[1]
    assert "with 8 experts the mixture is better" in told[2]


def test_the_record_and_the_table() -> None:
    found = made()
    report = found.report(dict)
    record = json.loads(json.dumps(report.record))
    assert (record["seeds"], record["steps"], record["top_k"]) == (2, 12, 2)
    assert [m["experts"] for m in record["models"]] == [None, 2, 4, 8]
    assert [m[BITS][0] for m in record["models"]] == [2.0, 2.1, 1.9, 1.8]
    assert [m["train_drop_fraction"] for m in record["models"]] == [None, 0.01, 0.01, 0.01]
    assert [d["mean"] for d in record["differences"]] == pytest.approx([-0.11, 0.09, 0.19])
    assert [row[0] for row in report.rows] == ["dense-active", *(f"moe-{e}-experts" for e in (2, 4, 8))]
    assert (report.rows[0][2], report.rows[0][-1]) == ("", "")
    assert report.rows[1][-1] == "1.0%"
    assert report.scores["moe-8-experts"] == [1.8, pytest.approx(2.32)]


def test_the_picture() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = experts_figure(made()).axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "8"]
    dots = [list(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "o"]
    assert dots == [[2.1, pytest.approx(2.62)], [1.9, pytest.approx(2.42)], [1.8, pytest.approx(2.32)]]
    means = next(line for line in axes.get_lines() if line.get_marker() == "D")
    assert (list(means.get_xdata()), list(means.get_ydata())) == ([2, 4, 8], pytest.approx([2.36, 2.16, 2.06]))
    low, high = axes.collections[0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 12.7062 * 0.26, rel=1e-4)
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((2.25 - 12.7062 * 0.25, 2.25 + 12.7062 * 0.25), rel=1e-4)


def test_one_seed_has_no_intervals() -> None:
    pytest.importorskip("matplotlib")
    assert made().report(dict).columns[1:3] == ("bits per byte [95 %]", "dense minus it, paired [95 %]")
    report = made(1).report(dict)
    assert report.columns[1:3] == ("bits per byte", "dense minus it, paired")
    assert report.to_markdown().startswith("| model | bits per byte | dense minus it, paired | parameters |")
    (axes,) = experts_figure(made(1)).axes
    means, dense = axes.get_lines()
    assert (means.get_marker(), list(means.get_ydata())) == ("D", [2.1, 1.9, 1.8])
    assert list(dense.get_ydata()) == [2.0, 2.0]
    assert (len(axes.collections), len(axes.patches)) == (0, 0)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"A cat met a dog, {i} times." for i in range(200)))
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(origin, "preset", lambda name: recipe(str(text)))
    return Compare(out=str(tmp_path / "out"), seeds=2, flops=FLOPS, experts="8,2")


def test_the_command_and_a_later_call_with_one_more(
    asked: Compare, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, out = Trainer(score), Path(asked.out)
    monkeypatch.setattr(study_runs, "train_run", trainer)
    assert asked.execute() == 0
    assert len(trainer.asked) == 6
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((out / "experts.json").read_text()) == result
    assert [m["experts"] for m in result["models"]] == [None, 2, 8]
    assert dataclasses.replace(asked, experts="2,4,8").execute() == 0
    names = [f"{model}-12-steps-seed-{seed}" for seed in (0, 1) for model in ("dense-active", *MIXTURES)]
    assert trainer.folders[6:] == names  # all are asked for; `train_run` trains those that are not there


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ("four", "--experts four: must be whole numbers, such as 4,8,16"),
        ("4,,8", "--experts 4,,8: must be whole numbers"),
        ("4,4", "--experts 4,4: names a number twice"),
        ("1,4", r"--experts 1,4: each number must be between 2 \(a token's experts\) and 4096"),
        ("4,5000", "--experts 4,5000: each number"),
    ],
)
def test_what_is_refused(asked: Compare, experts: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(asked, experts=experts)._check(Path(asked.out))


def test_memory_is_checked_for_the_most_experts(asked: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(compare, "check_memory", lambda config: checked.append(config.model.experts))
    dataclasses.replace(asked, experts="4,16,8")._check(Path(asked.out))
    assert checked == [16]

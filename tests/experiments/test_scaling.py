"""`compare --scaling`: the ladder, the laws of made losses, words, record, picture. No run is trained."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_jax.cli import origin
from moe_jax.cli.compare import Compare
from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.baselines import dense_baseline
from moe_jax.experiments import ladder, study_runs
from moe_jax.experiments.scaling import Scaling
from moe_jax.experiments.study_runs import BITS
from moe_jax.experiments.sweep_plots import scaling_figure
from moe_jax.model.costs import training_flops
from tests.experiments.invented import Trainer, recipe

BASE = recipe("stories")
ONE = training_flops(BASE, 1)


def test_the_ladder_by_hand() -> None:
    """From 10 to 160 steps of the mixture in five rungs: each twice the one before."""
    found = ladder.budgets(BASE, 10 * ONE, 160 * ONE)
    assert [rung.flops / ONE for rung in found] == pytest.approx([10, 20, 40, 80, 160])
    assert found[-1].flops == 160 * ONE
    assert [rung.steps["none"] for rung in found][::2] == [10, 40, 160]
    dense = training_flops(dense_baseline(BASE, "active"), 1)
    assert dense != ONE
    assert [rung.steps["active"] for rung in found] == [math.floor(rung.flops / dense) for rung in found]


def law_of(dense: str) -> tuple[float, float]:
    return (8.0, 0.05) if dense == "none" else (5.0, 0.03)


def score(config: RunConfig) -> float:
    """The mixture follows 8 C^-0.05, its baseline 5 C^-0.03. The second seed is 1 % above, the first 1 % below."""
    a, b = law_of(config.model.dense)
    seed = {0: 0.99, 1: 1.01}[config.train.seed]
    return seed * a * training_flops(config, config.train.steps) ** -b


def made(predicted: float = 1e16, score: Any = score) -> Scaling:
    budgets, trainer = ladder.budgets(BASE, 1e9, 1e11), Trainer(score)
    return Scaling.of(BASE, budgets, [trainer(r.config) for r in ladder.runs(BASE, budgets, 2, Path("out"))], predicted)


def test_the_runs_are_those_of_the_ladder() -> None:
    found = ladder.runs(BASE, ladder.budgets(BASE, 1e9, 1e11), 2, Path("out"))
    assert len(found) == 20
    assert len({run.config.out for run in found}) == 20
    assert [(r.config.model.dense, r.config.train.seed) for r in found[::9]] == [
        ("none", 0),
        ("active", 0),
        ("none", 1),
    ]
    assert found[0].title == "moe for 1e+09 operations, seed 0"
    assert found[0].config.train.steps == math.floor(1e9 / ONE)


def test_both_laws_come_back() -> None:
    found = made()
    for side, dense in ((found.mixture, "none"), (found.baseline, "active")):
        a, b = law_of(dense)
        assert (side.law.factor, side.law.exponent) == (pytest.approx(a, rel=1e-9), pytest.approx(b, rel=1e-9))
        assert [len(own) for own in side.bits] == [2] * 5
        assert all(own[0] / own[1] == pytest.approx(0.99 / 1.01) for own in side.bits)
    assert all(
        spent <= rung.flops < spent + ONE for spent, rung in zip(found.mixture.flops, found.budgets, strict=True)
    )


def test_differences_are_paired_and_the_quotient_is_of_the_two_models() -> None:
    found = made()
    first = found.differences[0]
    assert first.mean == pytest.approx(found.baseline.means[0] - found.mixture.means[0])
    predicted = found.quotient.prediction(1e16)
    assert predicted.mean == pytest.approx(5 / 8 * 1e16**0.02, rel=0.02)  # the budgets of the two differ by a step
    assert predicted.low < predicted.mean < predicted.high


def test_the_words() -> None:
    measured, mixture, twin, quotient, limit = made().sentences()
    assert measured.startswith("measured at 1e+11 operations: the mixture of experts is better than its dense baseline")
    assert "paired by seed" in measured
    assert mixture.startswith("moe: bits per byte fall as C^-b with b = 0.0500, standard error 0.0000; predicted at")
    assert f"{8 * 1e16**-0.05:.4f} [" in mixture
    assert twin.startswith("dense-active: ")
    assert "cannot tell" not in quotient
    assert "a loss with a floor falls more slowly" in limit
    same = made(score=lambda c: 5 * training_flops(c, c.train.steps) ** -0.03 * (1 + 0.02 * (c.train.steps % 3)))
    assert "which model is better there, the fit cannot tell" in same.sentences()[3]


def test_the_record_holds_all_numbers() -> None:
    found = made()
    record = json.loads(json.dumps(found.report(dict).record))
    assert (record["seeds"], record["predicted_flops"]) == (2, 1e16)
    assert record["budgets"] == [rung.flops for rung in found.budgets]
    for model, side in zip(record["models"], (found.mixture, found.baseline), strict=True):
        assert [point[BITS] for point in model["points"]] == side.bits
        assert [point["training_flops"] for point in model["points"]] == side.flops
        assert model["prediction"]["mean"] == pytest.approx(side.law.loss(1e16))
    assert [d["mean"] for d in record["differences"]] == [d.mean for d in found.differences]
    rows = found.report(dict).rows
    assert len(rows) == 5
    assert rows[0][0] == "1e+09"
    assert rows[0][-1] == f"{found.mixture.steps[0]} and {found.baseline.steps[0]}"
    assert len(found.report(dict).scores) == 10


def test_the_picture_has_seeds_means_lines_and_intervals() -> None:
    pytest.importorskip("matplotlib")
    found = made(predicted=1e13)
    (axes,) = scaling_figure(found).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    marks = {m: [line for line in axes.get_lines() if line.get_marker() == m] for m in ("o", "D")}
    assert [list(line.get_ydata()) for line in marks["D"]] == [found.mixture.means, found.baseline.means]
    assert [list(line.get_ydata()) for line in marks["o"]] == found.mixture.bits + found.baseline.bits
    solid, dashed = (
        [line for line in axes.get_lines() if line.get_linestyle() == style and line.get_marker() == "None"]
        for style in ("-", "--")
    )
    assert [max(line.get_xdata()) <= 1e11 for line in solid] == [True, True]
    assert [max(line.get_xdata()) for line in dashed] == pytest.approx([1e13, 1e13])
    assert [min(line.get_xdata()) >= 1e11 for line in dashed] == [True, True]
    assert len(axes.collections) == 2
    top = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(max(found.mixture.law.prediction(c).high for c in (1e9, 1e13)), rel=1e-3)


# The command


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"A cat met a dog, {i} times." for i in range(200)))
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(origin, "preset", lambda name: recipe(str(text)))
    return Compare(out=str(tmp_path / "out"), seeds=2, flops=1e11, scaling=True)


def test_the_command_writes_record_table_and_picture(
    asked: Compare, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    trainer, out = Trainer(score), Path(asked.out)
    monkeypatch.setattr(study_runs, "train_run", trainer)
    assert asked.execute() == 0
    assert len(trainer.asked) == 20
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert json.loads((out / "scaling.json").read_text()) == result
    assert result["budgets"] == pytest.approx([1e10 * 10 ** (i / 4) for i in range(5)])
    assert result["predicted_flops"] == 1e12
    assert {p.name for p in out.iterdir() if p.is_file() and p.suffix != ".lock"} >= {
        "plan.json",
        "scaling.json",
        "scaling.md",
        "scaling.png",
        "scaling.svg",
    }
    assert not (out / "overview.png").exists()  # of one picture
    assert "predicted at 1e+12 operations" in (out / "scaling.md").read_text()
    other = dataclasses.replace(asked, predict_flops=1e13)  # predicts elsewhere from the same runs
    assert other.execute() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["predicted_flops"] == 1e13
    with pytest.raises(ConfigError, match=r"--lowest-flops 2e\+10.*begun with other settings"):
        dataclasses.replace(asked, lowest_flops=2e10)._check(out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flops": 5e7}, r"--flops 5e\+07: the smallest budget has fewer than 5 steps; give "),
        ({"lowest_flops": 1e6}, r"--lowest-flops 1e\+06: the smallest budget has fewer"),
        ({"lowest_flops": 1e11}, r"--lowest-flops 1e\+11: must be below --flops 1e\+11"),
        ({"tune": True}, "--scaling: cannot be given with --tune"),
        ({"experts": "4,8"}, "--experts 4,8: cannot be given with --scaling"),
        ({"total": False}, "--no-total: --scaling and --experts have no such baseline"),
        ({"scaling": False, "predict_flops": 1e15}, r"--predict-flops 1e\+15: is for --scaling only"),
    ],
)
def test_what_is_refused(asked: Compare, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(asked, **changes)._check(Path(asked.out))


def test_the_budget_that_is_advised_is_accepted(asked: Compare) -> None:
    for changes, flag in (({"flops": 5e7}, "flops"), ({"lowest_flops": 1e6}, "lowest_flops")):
        with pytest.raises(ConfigError) as refused:
            dataclasses.replace(asked, **changes)._check(Path(asked.out))
        advised = float(str(refused.value).split("give ")[1].split()[0])
        assert dataclasses.replace(asked, **{flag: advised})._check(Path(asked.out))

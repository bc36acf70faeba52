"""`benchmarks/compare.py`: intervals, plans, verdicts by hand; made laws come back; a comparison stops and goes on."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
from comparison import baselines, scaling, study_runs
from comparison.baselines import Arm, ArmResult, Plan, differences, grouped
from comparison.power_law import fit
from comparison.report import CONFIDENCE
from comparison.study_runs import BITS
from scipy import stats

from moe_jax.config import ConfigError, RunConfig
from moe_jax.model.costs import training_flops
from moe_jax.training.session import Session, SessionData
from moe_jax.training.start import Start
from tests.benchmarks.invented_runs import Trainer, recipe
from tests.reliability import runs as processes
from tests.support import saved_run

BASE = recipe("stories")
ONE = training_flops(BASE, 1)

# Numbers by hand


def arm_result(arm: Arm, bits: list[float]) -> ArmResult:
    values = {"steps": arm.steps, "tokens_seen": 10_000_000, "training_flops": 20}
    values |= {"params_total": 4_000_000, "params_active": 2_000_000}
    summaries = [
        values | {BITS: b, "wall_seconds": 3.0, "train_drop_fraction": 0.01, "val_drop_fraction": 0} for b in bits
    ]
    return ArmResult(arm, summaries, arm.steps * 0.5)


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by 0.5, the models by 0.1 at each seed: the means' intervals overlap, the pairs' does not hold 0."""
    mixture = arm_result(Arm("none", "tokens", 4), [1.0, 1.5, 2.0])
    baseline = arm_result(Arm("active", "tokens", 4), [1.1, 1.61, 2.09])
    (found,) = differences(grouped([mixture, baseline]))
    assert found.paired.mean == pytest.approx(0.1)
    assert found.paired.low == pytest.approx(0.1 - 4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert found.apart is False
    assert found.verdict.startswith("at the same tokens the mixture of experts is better than its dense baseline")
    assert "by 0.1000 bits per byte, 95 % [0.0752, 0.1248] paired by seed; the intervals of the means overlap" in (
        found.verdict
    )


def test_for_the_same_time_the_mixture_is_the_one_that_was_chosen_for_it() -> None:
    """It is at 1.0, the one for the same tokens at 2.0, and the baseline at 1.1. Untuned there is one mixture."""
    arms = [Arm("none", "tokens", 4), Arm("none", "wall", 6), Arm("active", "tokens", 4), Arm("active", "wall", 8)]
    results = [arm_result(arm, [bits, bits]) for arm, bits in zip(arms, (2.0, 1.0, 2.3, 1.1), strict=True)]
    assert [d.paired.mean for d in differences(grouped(results))] == pytest.approx([0.3, 0.1])
    untuned = grouped([results[0], *results[2:]])
    assert [d.paired.mean for d in differences(untuned)] == pytest.approx([0.3, -0.9])


def test_steps_by_hand() -> None:
    """A matmul parameter costs 6 operations a token; here attention has 4*16*16, router 16*4, two experts 3*16*8
    each, and the tied head 257*16. A step has 2*4*16 tokens. Of 2.9 steps' worth two are taken. Dense baselines that
    are twice as fast and a third as fast get 4 steps and 1 in the same time."""
    one = 6 * 128 * (1024 + 64 + 768 + 257 * 16)
    seconds = {"moe": 0.2}
    for dense, time in (("active", 0.1), ("total", 0.6)):
        seconds |= {f"dense-{dense}, same {basis}": time for basis in ("tokens", "wall")}
    plan = Plan(BASE, 2.9 * one, seconds)
    assert [(a.dense, a.basis, a.steps) for a in plan.arms()] == [
        ("none", "tokens", 2),
        ("active", "tokens", 2),
        ("active", "wall", 4),
        ("total", "tokens", 2),
        ("total", "wall", 1),
    ]
    assert Plan(BASE, 1.0, plan.step_seconds).arms()[0].steps == 1
    without_total = Plan(BASE, 2.9 * one, {name: seconds[name] for name in list(seconds)[:3]})
    assert without_total.arms() == plan.arms()[:3]


# Power laws

BUDGETS = [2e12 * 10 ** (i / 2) for i in range(5)]


def test_the_interval_is_of_a_regression_with_an_intercept() -> None:
    """The variance of a new log L at x is s^2 (1 + (1, x) (X^T X)^-1 (1, x)^T), with s^2 from n - 2 degrees."""
    noise = np.random.default_rng(0).normal(size=5) * 0.01
    losses = [3.0 * c**-0.05 * math.exp(e) for c, e in zip(BUDGETS, noise, strict=True)]
    law, design = fit(BUDGETS, losses), np.stack([np.ones(5), np.log(BUDGETS)], 1)
    beta, (rest,), *_ = np.linalg.lstsq(design, np.log(losses), rcond=None)
    for flops in (2e12, 1e13, 1e16):
        row = np.array([1, math.log(flops)])
        variance = rest / 3 * (1 + row @ np.linalg.inv(design.T @ design) @ row)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, 3) * math.sqrt(variance)
        interval = law.prediction(flops)
        assert math.log(interval.high) == pytest.approx(row @ beta + half, abs=1e-7)
        assert math.log(interval.low) == pytest.approx(row @ beta - half, abs=1e-7)


def power_law_score(config: RunConfig) -> float:
    """The mixture follows 8 C^-0.05, its baseline 5 C^-0.03. The second seed is 1 % above, the first 1 % below."""
    a, b = (8.0, 0.05) if config.model.dense == "none" else (5.0, 0.03)
    return {0: 0.99, 1: 1.01}[config.train.seed] * a * training_flops(config, config.train.steps) ** -b


def test_both_laws_come_back_in_words_record_and_picture() -> None:
    pytest.importorskip("matplotlib")
    budgets, trainer = scaling.budgets(BASE, 1e9, 1e11), Trainer(power_law_score)
    runs = scaling.runs(BASE, budgets, 2, Path("out"))
    assert len({run.config.out for run in runs}) == 20
    result = scaling.Scaling.of(BASE, budgets, [trainer(run.config) for run in runs], 1e16)
    for side, a, b in ((result.mixture, 8.0, 0.05), (result.baseline, 5.0, 0.03)):
        assert (side.law.factor, side.law.exponent) == (pytest.approx(a, rel=1e-9), pytest.approx(b, rel=1e-9))
    assert result.quotient.prediction(1e16).mean == pytest.approx(5 / 8 * 1e16**0.02, rel=0.02)
    report = result.report()
    record = json.loads(json.dumps(report.record))
    assert [[point[BITS] for point in m["points"]] for m in record["models"]] == [
        result.mixture.bits,
        result.baseline.bits,
    ]
    assert "b = 0.0500, standard error 0.0000" in report.to_markdown()
    (axes,) = report.figures()["scaling"].axes
    means = [list(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "D"]
    assert means == [result.mixture.means, result.baseline.means]


# Whole comparisons


def test_settings_of_all_models_are_flags_of_train() -> None:
    config = compare.settings_to_compare("nano", ["--experts", "4", "--lr", "0.01"])
    assert (config.model.experts, config.train.lr) == (4, 0.01)
    with pytest.raises(ConfigError, match=r"^--steps 7: is chosen for each run; leave it out"):
        compare.settings_to_compare("nano", ["--steps", "7"])


STEP_SECONDS = {"none": 0.2, "active": 0.1}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    processes.write_text(path)
    with saved_run.quick_training(tmp_path_factory.mktemp("cache")) as patch:
        patch.setattr(baselines, "ROUNDS", 2)
        patch.setattr(study_runs.jax, "clear_caches", lambda: None)
        yield path


@pytest.fixture
def command(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command on the tiny recipe, one seed of three steps, with step times that are always the same."""
    document = recipe(str(text)).to_dict()
    document["model"]["vocab_size"] = 0
    monkeypatch.setattr(compare, "settings_to_compare", lambda *_: RunConfig.from_dict(document))
    monkeypatch.setattr(baselines, "step_seconds", lambda models: {c: STEP_SECONDS[c.model.dense] for c in models})
    return ["--out", str(tmp_path / "out"), "--seeds", "1", "--no-total", "--flops", str(3.5 * ONE)]


@pytest.mark.reliability
def test_a_comparison_goes_on_reports_and_repeats_nothing(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM within the second run: it is saved and resumed, the first is not touched, the plan is the same. When all
    is trained, a third call only reports."""
    pytest.importorskip("matplotlib")
    out, batch, opened = Path(command[1]), SessionData.batch, []
    with pytest.MonkeyPatch.context() as patch:

        def stop_in_the_second(data: SessionData, step: int) -> Any:
            if data.config.model.dense == "active" and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch(data, step)

        patch.setattr(study_runs, "EVALUATIONS", 1)  # with nothing to save, a signal would end the process at once
        patch.setattr(SessionData, "batch", stop_in_the_second)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            compare.run(command)
    assert not (out / "comparison.json").exists()
    plan, first = (out / "plan.json").read_text(), (out / "moe-3-steps-seed-0" / "metrics.jsonl").read_text()
    original = Session.open.__func__

    def record(cls: Any, config: RunConfig, start: Start | None) -> Any:
        session = original(cls, config, start)
        opened.append((Path(config.out).name, session.resumed_from))
        return session

    monkeypatch.setattr(Session, "open", classmethod(record))
    assert compare.run(command) == 0
    assert opened == [("dense-active-3-steps-seed-0", 2), ("dense-active-6-steps-seed-0", None)]
    assert (out / "plan.json").read_text() == plan
    assert (out / "moe-3-steps-seed-0" / "metrics.jsonl").read_text() == first
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert json.loads((out / "comparison.json").read_text()) == result
    for arm in result["arms"]:
        name = arm["arm"].split(",")[0]
        dense = "none" if name == "moe" else "active"
        own = json.loads((out / f"{name}-{arm['steps']}-steps-seed-0" / "summary.json").read_text())
        assert arm["val_bits_per_byte"] == [own["val_bits_per_byte"]]
        assert arm["train_seconds"] == pytest.approx(arm["steps"] * STEP_SECONDS[dense])
    assert all(difference["verdict"] in (out / "comparison.md").read_text() for difference in result["differences"])
    pictures = {f"{name}.{kind}" for name in ("comparison", "curves") for kind in ("png", "svg")}
    assert {p.name for p in out.glob("c*.*")} == {"comparison.json", "comparison.md", *pictures}
    assert compare.run(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    assert len(opened) == 2
    with pytest.raises(ConfigError, match="was begun with another flops"):
        compare.run([*command[:-1], "1e9"])
    with pytest.raises(ConfigError, match="was begun with another study"):
        compare.run([*command, "--tune"])

"""The fair comparison on runs of a second: what the plan chooses, that it goes on, and what it says of its numbers."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_jax.cli import origin
from moe_jax.cli.compare import Compare
from moe_jax.config import ConfigError, RunConfig
from moe_jax.experiments import comparison, intervals, study_runs
from moe_jax.experiments.comparison import Arm, Plan
from moe_jax.experiments.comparison_result import ArmResult, Difference, collect, differences, rows
from moe_jax.experiments.intervals import Interval, apart, t_interval
from moe_jax.experiments.study_runs import BITS
from moe_jax.system.timing import Times
from moe_jax.training.session import Session, SessionData
from tests.experiments.invented import recipe
from tests.reliability import runs as processes
from tests.support import saved_run

# Numbers by hand


def test_t_interval_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, and t(0.975, 2) = 4.303; its half width is 4.303 / sqrt(3) = 2.484."""
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - interval.low == pytest.approx(interval.high - 2)
    assert str(interval) == "2.0000 [-0.4841, 4.4841]"


def test_a_single_value_has_no_interval() -> None:
    interval = t_interval([0.5])
    assert not interval.known
    assert interval.to_json() == {"mean": 0.5, "interval": None}
    assert str(interval) == "0.5000"
    assert apart(interval, t_interval([1.0, 1.1])) is None


def test_a_t_interval_covers_as_often_as_it_says() -> None:
    """Of 4,000 samples of three normal numbers: 95 % within 1.4 points, four standard deviations of that count. With
    the normal 1.96 in place of Student's 4.303 it would be 81 %."""
    import numpy as np

    samples = np.random.default_rng(0).normal(size=(4000, 3))
    covered = [i.low <= 0 <= i.high for i in map(t_interval, samples.tolist())]
    assert abs(np.mean(covered) - intervals.CONFIDENCE) < 0.014


def test_apart() -> None:
    assert apart(Interval(1, 0.5, 1.5), Interval(2, 1.6, 2.4)) is True
    assert apart(Interval(2, 1.6, 2.4), Interval(1, 0.5, 1.5)) is True
    assert apart(Interval(1, 0.5, 1.7), Interval(2, 1.6, 2.4)) is False


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
    (found,) = differences([mixture, baseline])
    assert found.paired.mean == pytest.approx(0.1)
    assert found.paired.low == pytest.approx(0.1 - 4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert found.apart is False
    assert found.verdict.startswith("at the same tokens the mixture of experts is better than its dense baseline")
    assert "by 0.1000 bits per byte, 95 % [0.0752, 0.1248] paired by seed; the intervals of the means overlap" in (
        found.verdict
    )


@pytest.mark.parametrize(
    ("paired", "words"),
    [
        (
            Interval(-0.2, -0.3, -0.1),
            "is worse than its dense baseline of the same total parameters by 0.2000 bits per byte, 95 % [0.1000, 0.3",
        ),
        (Interval(0.1, -0.1, 0.3), "less than the seeds can tell: 95 % [-0.1000, +0.3000]"),
        (Interval(0.1, math.nan, math.nan), "one seed gives no interval"),
    ],
)
def test_verdicts(paired: Interval, words: str) -> None:
    verdict = Difference(Arm("total", "wall", 3), paired, paired.known or None).verdict
    assert "at the same wall clock" in verdict
    assert words in verdict


def test_the_table() -> None:
    """Four, two and ten million, and half a second a step."""
    (row,) = rows([arm_result(Arm("active", "wall", 4), [1.0, 1.0])])
    assert row[:2] == ("dense-active, same wall", "1.0000 [1.0000, 1.0000]")
    assert row[2:5] == ("4.00 M", "2.00 M", "10.00 M")
    assert row[5:] == ("20", "500.0", "2", "")  # a dense baseline has no drops
    assert rows([arm_result(Arm("none", "tokens", 4), [1.0])])[0][-1] == "1.0%"


# The plan


def base(text: Path, **train: Any) -> RunConfig:
    return recipe(str(text), **train)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    processes.write_text(path)
    return path


def test_steps_by_hand(text: Path) -> None:
    """A matmul parameter costs 6 operations a token; here attention has 4*16*16, router 16*4, two experts 3*16*8
    each, and the tied head 257*16. A step has 2*4*16 tokens. Of 2.9 steps' worth two are taken. Dense baselines that
    are twice as fast and a third as fast get 4 steps and 1 in the same time."""
    one = 6 * 128 * (1024 + 64 + 768 + 257 * 16)
    plan = Plan(base(text), 2.9 * one, {"none": 0.2, "active": 0.1, "total": 0.6})
    assert [(a.dense, a.basis, a.steps) for a in plan.arms()] == [
        ("none", "tokens", 2),
        ("active", "tokens", 2),
        ("active", "wall", 4),
        ("total", "tokens", 2),
        ("total", "wall", 1),
    ]
    assert Plan(base(text), 1.0, plan.step_seconds).arms()[0].steps == 1
    without_total = Plan(base(text), 2.9 * one, {"none": 0.2, "active": 0.1})
    assert without_total.arms() == plan.arms()[:3]


def test_runs_are_ordinary_and_share_what_is_the_same(text: Path, tmp_path: Path) -> None:
    plan = Plan(base(text, patience=3), 1e9, {"none": 0.2, "active": 0.2, "total": 0.4})
    steps = plan.arms()[0].steps
    found = {(arm.name, seed): config for arm, seed, config in comparison.runs(plan, 2, tmp_path)}
    assert len(found) == 10
    for (name, seed), config in found.items():
        assert (config.train.seed, config.train.patience) == (seed, 0)
        assert config.model.dense == ("none" if name == "moe" else name.split(",")[0].removeprefix("dense-"))
    assert found["dense-active, same wall", 0] == found["dense-active, same tokens", 0]
    assert found["dense-total, same wall", 1].train.steps == round(steps / 2)
    assert found["moe", 0].run_dir == str(tmp_path / f"moe-{steps}-steps-seed-0")
    assert found["moe", 0].train.eval_every == math.ceil(steps / 10)


def test_a_run_is_finished_once_it_is_scored_whole(tmp_path: Path) -> None:
    """Not by the summary of its last evaluation, which is of the fixed part, nor by that of fewer steps."""
    assert study_runs.finished(tmp_path, 4) is None
    whole = {"val_whole_stream": True, "steps": 4} | dict.fromkeys(study_runs.NEEDED, 1.5)
    for summary, done in (
        (whole | {"val_whole_stream": False}, False),
        (whole | {"steps": 3}, False),
        (whole, True),
        ({}, False),
        ([], False),
        ({"val_whole_stream": True, "steps": 4}, False),
        (whole | {"val_bits_per_byte": "low"}, False),
    ):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert study_runs.finished(tmp_path, 4) == (summary if done else None)


# Whole comparisons

STEP_SECONDS = {"moe": 0.2, "dense-active": 0.1, "dense-total": 0.2}


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with saved_run.quick_training(tmp_path_factory.mktemp("cache")) as patch:
        patch.setattr(comparison, "ROUNDS", 2)
        patch.setattr("moe_jax.experiments.study_runs.jax.clear_caches", lambda: None)
        yield


@pytest.fixture
def asked(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """The command on the tiny recipe, two seeds of three steps, with step times that are always the same."""
    recipe = base(text)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=0))
    monkeypatch.setattr(origin, "preset", lambda name: recipe)
    alternate = comparison.alternate

    def fixed(candidates: dict[str, Any], rounds: int) -> dict[str, Times]:
        assert {name: len(times.seconds) for name, times in alternate(candidates, rounds).items()} == dict.fromkeys(
            STEP_SECONDS, comparison.ROUNDS
        )
        return {name: Times((seconds,)) for name, seconds in STEP_SECONDS.items()}

    monkeypatch.setattr(comparison, "alternate", fixed)
    return Compare(out=str(tmp_path / "out"), seeds=2, flops=3.5 * 6 * 128 * (1024 + 64 + 768 + 257 * 16))


def test_a_comparison_goes_on_reports_and_repeats_nothing(
    asked: Compare, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM within the second run: it is saved and resumed, the first is not touched, the plan is the same. When all
    is trained, a third call only reports."""
    pytest.importorskip("matplotlib")
    out, batch, opened = Path(asked.out), SessionData.batch, []
    with pytest.MonkeyPatch.context() as patch:

        def stop_in_the_second(data: SessionData, step: int) -> Any:
            if data.config.model.dense == "active" and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch(data, step)

        patch.setattr(study_runs, "EVALUATIONS", 1)  # with nothing to save, a signal would end the process at once
        patch.setattr(SessionData, "batch", stop_in_the_second)
        assert asked.execute() == 128 + signal.SIGTERM
    assert not (out / "comparison.json").exists()
    plan, first = (out / "plan.json").read_text(), (out / "moe-3-steps-seed-0" / "metrics.jsonl").read_text()
    original = Session.open.__func__

    def record(cls: Any, config: RunConfig, saved: RunConfig | None, *lock: Any) -> Any:
        session = original(cls, config, saved, *lock)
        opened.append((Path(config.out).name, session.progress.resumed_from))
        return session

    monkeypatch.setattr(Session, "open", classmethod(record))
    assert asked.execute() == 0
    each = ["moe-3-steps", "dense-active-3-steps", "dense-active-6-steps", "dense-total-3-steps"]
    names = [f"{name}-seed-{seed}" for seed in (0, 1) for name in each]
    assert opened == [(names[1], 1), *((name, None) for name in names[2:])]
    assert (out / "plan.json").read_text() == plan
    assert (out / "moe-3-steps-seed-0" / "metrics.jsonl").read_text() == first
    printed = capsys.readouterr().out
    check_report(out, printed)
    assert asked.execute() == 0
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    assert len(opened) == 7


def check_report(out: Path, printed: str) -> None:
    """The last line holds what the runs' own summaries hold; table, words and pictures lie in the folder."""
    result = json.loads(printed.splitlines()[-1])
    assert json.loads((out / "comparison.json").read_text()) == result
    assert [(arm["arm"], arm["steps"]) for arm in result["arms"]] == [
        ("moe", 3),
        ("dense-active, same tokens", 3),
        ("dense-active, same wall", 6),
        ("dense-total, same tokens", 3),
        ("dense-total, same wall", 3),
    ]
    for arm in result["arms"]:
        name = arm["arm"].split(",")[0]
        own = [json.loads((out / f"{name}-{arm['steps']}-steps-seed-{s}" / "summary.json").read_text()) for s in (0, 1)]
        assert arm["val_bits_per_byte"] == [s["val_bits_per_byte"] for s in own]
        assert all(s["val_whole_stream"] for s in own)
        assert arm["mean"] == pytest.approx(sum(arm["val_bits_per_byte"]) / 2)
        assert arm["train_seconds"] == pytest.approx(arm["steps"] * STEP_SECONDS[name])
        assert arm["tokens_seen"] == arm["steps"] * 128
    compared = [(d["twin"], d["same"]) for d in result["differences"]]
    assert compared == [("active", "tokens"), ("active", "wall"), ("total", "tokens"), ("total", "wall")]
    for difference in result["differences"]:
        assert difference["verdict"] in printed
        assert difference["verdict"] in (out / "comparison.md").read_text()
    pictures = {f"{name}.{kind}" for name in ("comparison", "curves") for kind in ("png", "svg")}
    assert {p.name for p in out.glob("c*.*")} == {"comparison.json", "comparison.md", *pictures}


def test_another_comparison_in_the_folder_is_refused(asked: Compare, text: Path, tmp_path: Path) -> None:
    config = asked._check(tmp_path / "new")
    (tmp_path / "out").mkdir()
    Plan(base(text), asked.flops, {"none": 1.0, "active": 1.0, "total": 1.0}).save(
        tmp_path / "out" / "plan.json", asked._asked(config)
    )
    assert asked._check(tmp_path / "out") == config
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    del plan["asked"]["config"]["train"]["patience"]  # a setting that came later, as it was before it did
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    assert asked._check(tmp_path / "out") == config
    other = tmp_path / "other.txt"
    other.write_text("another text " * 100)
    changed = (
        ({"flops": 1e9}, "--flops 1e"),
        ({"data": str(other)}, "--data .*other.txt"),
        ({"total": False}, "--no-total"),
    )
    for changes, flag in changed:
        with pytest.raises(ConfigError, match=f"{flag}.*begun with other settings"):
            dataclasses.replace(asked, **changes)._check(tmp_path / "out")


def test_collect_uses_each_models_own_step_time(text: Path) -> None:
    plan = Plan(base(text), 1e9, {"none": 0.2, "active": 0.1, "total": 0.4})
    summaries = {arm: arm_result(arm, [1.0]).summaries for arm in plan.arms()}
    assert [r.train_seconds / r.arm.steps for r in collect(plan, summaries)] == pytest.approx([0.2, 0.1, 0.1, 0.4, 0.4])

"""`train --dry-run`: what a run would cost, by hand, and nothing written."""

from pathlib import Path

import pytest

from moe_jax.cli.main import run_command
from moe_jax.config.presets import with_vocabulary
from moe_jax.model.costs import count_parameters, totals, training_flops
from moe_jax.system import machine
from moe_jax.system.terminal import duration
from tests.support.commands import train_settings


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Of seed-158m with other steps and another learning rate, on a machine of 1e12 operations a second. There is a run
    of that name, which a dry run does not touch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "seed-158m" / "checkpoints" / "step_00000001").mkdir(parents=True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "matmul_rate", lambda dtype: 1e12)
    typed = "--preset seed-158m --steps 100 --lr 1e-3 --precision float32 --model.no-bias --dry-run"
    assert run_command(["train", *typed.split()]) == 0
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    return " ".join(capsys.readouterr().out.split())


def test_the_costs_stand_first_and_then_what_differs_from_the_preset(printed: str) -> None:
    assert printed.index("GFLOP/s") < printed.index("settings that differ")
    for line in ("--steps 100 (preset 5000)", "--lr 0.001 (preset 0.0003)", "--model.bias False (preset True)"):
        assert line in printed


def test_parameters_memory_and_time(printed: str) -> None:
    """AdamW in 8 bits: 4 bytes a weight, as many a gradient, half as many of state; 4 x 8 x 256 tokens a step.

    Activations of 6 layers and 4 sequences of 256 in float32, by hand: the residual stream of width 512 takes 12 MiB,
    half of the attention weights of 8 heads take 24 MiB.
    """
    typed = ["--preset", "seed-158m", "--model.no-bias", "--steps", "100", "--out", "new"]
    config = with_vocabulary(train_settings(*typed)[0])
    groups = count_parameters(config.model)
    total = totals(groups)
    for name, count in groups.items():
        assert f"{name} {count.total:,}" in printed
    assert f"{total.total:,} in all, {total.active:,} active" in printed
    mib = total.total * 4 / 2**20
    assert f"at least {2.5 * mib + 12 + 24:,.0f} MiB in a training step" in printed
    assert "819,200 tokens" in printed
    flops = training_flops(config, 100)
    assert f"{flops:.2e} floating-point operations" in printed
    assert f"{duration(flops / 6e11)} to {duration(flops / 3e11)}" in printed
    assert "30% to 60% of 1,000 GFLOP/s" in printed

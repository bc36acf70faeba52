"""`benchmark.py gpu`: its parts run on a device, and its predictions are those of the roofline."""

import dataclasses
import io
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from moe_jax.benchmarks import card, card_parts
from moe_jax.cli import benchmark
from moe_jax.cli.main import main, run_as
from moe_jax.config import ConfigError, ExecutionConfig, RunConfig, TrainConfig
from moe_jax.model.hardware import Card
from moe_jax.planning.roofline import Rates
from moe_jax.planning.target import load_target
from moe_jax.system import environment
from tests.support import tiny

ROWS = 8
CONFIG = RunConfig(
    model=tiny.config(seq_len=16),
    train=TrainConfig(batch_size=ROWS, grad_accum=1),
    execution=ExecutionConfig(compute_dtype="float32"),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_parts, "SIZES", (8, 16))
    monkeypatch.setattr(card_parts, "COPIED", 2**20)


def test_every_part_runs_and_its_arguments_are_those_that_are_compiled(small: None) -> None:
    """Called twice: a state is given on. Every number that comes out is finite, so no step skips its update."""
    found = list(card_parts.parts(CONFIG, jax.devices("cpu")[0]))
    assert len({part.name for part in found}) == len(found)
    for part in found:
        call = part.call()
        first, second = call(), call()
        shapes = jax.eval_shape(part.program, *part.shapes)
        told = shapes if part.start is None else shapes[1]
        assert jax.tree.map(lambda a: (a.shape, a.dtype), second) == jax.tree.map(lambda a: (a.shape, a.dtype), told)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((first, second))), part.name
    steps = [part for part in found if "training step" in part.name]
    assert [part.shapes[1].shape for part in steps] == [(1, 8, 17), (2, 4, 17)]


def test_a_card_is_asked_for_the_products_that_it_has_units_for(small: None) -> None:
    def names(gpu: str) -> set[str]:
        found = card_parts._constants(Card.of(load_target(gpu)))
        return {part.name.rpartition(", ")[2] for part in found if "products" in part.name}

    assert names("rtx3050-4gb") == {"float32", "TF32", "bfloat16", "float16"}
    assert names("quadro-t1000-4gb") == {"float32"}


def test_a_chain_multiplies_eight_times(small: None) -> None:
    part = next(iter(card_parts._constants(Card("gpu", "", 8.6))))
    x, w = (np.random.default_rng(n).normal(size=(8, 8)).astype(np.float32) / np.sqrt(8) for n in (0, 1))
    expected = x @ np.linalg.matrix_power(w.astype(np.float64), 8)
    np.testing.assert_allclose(part.program(x, w), expected, rtol=0, atol=1e-6)


def test_a_line_has_the_ratio_and_fits_a_terminal() -> None:
    measured = card.line(card.Row("", "its dense twin's, 32 x 1", 500.0, 650.0))
    assert measured.split()[-3:] == ["500", "650", "1.3"]
    assert card.line(card.Row("", "a prompt of 256 tokens", None, 650.0)).split()[-3:] == ["?", "650", "?"]
    assert card.line(card.Row("", "attention", 2.0, None)).split() == ["attention", "2"]
    for group in ("the card", "one layer, forward and backward", "programs of a run"):
        assert len(card.heading(group, measured=True)) == len(measured) <= 80


def test_the_largest_difference_of_any_parameter_counts() -> None:
    expected: Any = {"a": np.array([1.0, -4.0]), "b": np.array([0.001]), "c": np.zeros(2)}
    found: Any = {"a": np.array([1.0, -4.2]), "b": np.array([0.0012]), "c": np.zeros(2)}
    assert card.largest_difference(expected, found) == pytest.approx(0.2)
    assert card.largest_difference(expected, expected | {"c": np.array([0, 1e-30])}) == float("inf")


def test_gradients_of_one_device_beside_itself_are_equal() -> None:
    assert card.gradients_beside_cpu(jax.devices("cpu")[0]) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train", "--gpu", "rtx3050-4gb"], "is for gpu, and not for train"),
        (["gpu", "--gpu", "rtx9999"], "must be one of h100-80gb"),
        (["serve", "--uniform-routing"], "is for moe, train, decode, scaling, all, and not for serve"),
        (["decode", "--with-quality", "runs/x"], "--with-quality runs/x: is for train, all, and not for decode"),
    ],
)
def test_what_a_suite_does_not_heed_or_know_is_refused(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "prepare_environment", lambda: pytest.fail("it is refused before"))
    assert main(lambda argv: run_as(benchmark.Benchmark, argv, "benchmark.py"), arguments) == 2
    assert problem in capsys.readouterr().err


def test_a_named_card_beside_a_real_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(platform="gpu", device_kind="NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(jax, "devices", lambda *_: [here])
    with pytest.raises(ConfigError, match="--gpu h100-80gb: this machine has a card, NVIDIA GeForce RTX 3060"):
        card.gpu(Console(file=io.StringIO()), CONFIG, "h100-80gb", "rtx3050-4gb", rounds=1)


@pytest.mark.plan
@pytest.mark.skipif(not environment.has_cuda_plugin(), reason="needs the extra `gpu-plan`")
def test_predictions_without_the_card(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A product's time by hand; 200 launches; and nothing is said to be measured."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(card_parts, "SIZES", (1024,))
    target, printed = load_target("rtx3050-4gb"), io.StringIO()
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=2, grad_accum=1))
    found = card.gpu(Console(file=printed, width=200), config, "", "rtx3050-4gb", rounds=1)
    rates, times = Rates.of(target), found["parts"]
    by_hand = 8 * (2 * 1024**3 / rates.narrow + rates.launch)
    assert times["8 products of 1,024, float16"]["predicted"] == pytest.approx(1e3 * by_hand, rel=0.05)
    assert 1 <= times["200 small kernels"]["predicted"] / (1e3 * 200 * rates.launch) < 1.1
    assert found["measured"] is False
    assert {row["measured"] for row in times.values()} == {None}
    assert "Nothing is measured" in printed.getvalue()

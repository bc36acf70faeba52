"""The parts of benchmark.py on a model that is small enough: what they count, and that they measure what they say."""

import io
import time

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from moe_jax.analysis.accounting import bound_flops
from moe_jax.analysis.bench import card, decoding, layer, machine, report
from moe_jax.analysis.bench.timing import Times, alternate, recycled
from moe_jax.config import ModelConfig, RunConfig, TrainConfig


def config(**changes) -> RunConfig:
    values = {"vocab_size": 60, "seq_len": 16, "layers": 2, "width": 16, "heads": 2, "experts": 4, "expert_hidden": 24}
    return RunConfig(model=ModelConfig(**(values | changes)), train=TrainConfig(steps=10, precision="float32"))


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATMUL_SIZES", (32,))
    monkeypatch.setattr(machine.matmuls, "__defaults__", ((32,),))
    monkeypatch.setattr(machine, "READ_BYTES", 2**16)


def test_candidates_run_in_turn_and_warm_ups_do_not_count() -> None:
    order: list[str] = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: time.sleep(0.002) or order.append("b")}, 3, 1)
    assert order == ["a", "b"] * 4
    assert len(times["a"].seconds) == len(times["b"].seconds) == 3
    assert min(times["b"].seconds) >= 0.002
    assert Times((1.0, 2.0, 3.0, 4.0)).median == 2.5
    assert Times((1.0, 2.0, 3.0, 4.0)).spread == pytest.approx((3.25 - 1.75) / 2.5)


def test_a_recycled_call_gives_the_same_results_again() -> None:
    call = recycled(lambda x, y: {"sum": x + y, "product": x * y}, jnp.arange(4.0), jnp.full(4, 3.0))
    for _ in range(3):
        result = call()
        np.testing.assert_array_equal(result["sum"], [3, 4, 5, 6])
        np.testing.assert_array_equal(result["product"], [0, 3, 6, 9])


def test_bound_by_hand() -> None:
    """T 16, K 2, E 4, cf 1.25: 10 slots. Two sequences: 2*4*10 rows of 2*3*16*24 operations, 32 tokens of 2*16*4."""
    assert config().model.capacity == 10
    assert bound_flops(config().model, 2) == 80 * 2304 + 32 * 128
    assert bound_flops(config(shared_experts=1).model, 2) == (80 + 32) * 2304 + 32 * 128


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "tied_head": False, "positions": "learned"},
        {"shared_experts": 1},
        {"dense": "active"},
    ],
    ids=str,
)
def test_formula_and_program_agree(changes: dict) -> None:
    found = card.compute(config(**changes), 2)
    assert found.difference < 0.02, (found.formula, found.compiled)
    assert min(found.compiled.values()) > 0


def test_dense_layouts_are_one_function() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16)), jnp.float32)
    results = [np.asarray(function(w, x)) for function, w in layer.dense_layouts(config().model).values()]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5)


def test_decoding_must_read_the_active_parameters() -> None:
    """By hand: embedding 60*16 (tied), two layers of attention 4*16*16, router 16*4 and two experts of 3*16*24, and
    five norms of 16; four bytes each."""
    assert decoding.active_bytes(config()) == 4 * (960 + 2 * (1024 + 64 + 2304) + 80)


KEYS = {
    "moe": {
        *("flops_over_bound_forward", "flops_over_bound_grad", "wall_over_dense_active", "wall_over_best_dense"),
        *("dense_all_over_wall", "wall_growth_8_to_64_experts", "layer_share_of_matmul_peak"),
        *("train_step_share_of_matmul_peak", "temp_bytes", "temp_bytes_plain_loss"),
    },
    "train": {"tokens_per_second", "share_of_matmul_peak"},
    "decode": {"decode_share_of_bandwidth_bound", "decode_ms_per_token_batch1", "uncached_4_token_ms"},
}


@pytest.mark.parametrize("part", KEYS)
def test_parts_print_tables_and_give_their_numbers(part: str) -> None:
    printed = io.StringIO()
    numbers = report.PARTS[part](Console(file=printed, width=120), config(), 2, 1)
    assert set(numbers) >= KEYS[part]
    assert all(np.isfinite(value) and value > 0 for value in numbers.values())
    assert "median ms" in printed.getvalue()
    if part == "moe":
        assert numbers["flops_over_bound_forward"] == pytest.approx(1)

"""The programs for a GPU that read each expert's matrix in place: interpreted here on a CPU, against loops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import RunConfig
from moe_jax.model.kernels import grouped_kernel, grouped_matmul
from moe_jax.model.moe import layer as moe_layer
from moe_jax.model.moe.dispatch import Blocks, dispatch
from moe_jax.model.moe.functional import layer_shapes, with_gradients
from moe_jax.planning.device_memory import for_described_gpu, lower_for
from moe_jax.planning.target import load_target
from moe_jax.training.programs import Programs
from tests.support import tiny
from tests.support.programs import compiled_for_gpu

R, D, F, PAIRS = 16, 32, 48, 64
"""Rows of a block, width, hidden width (three tiles of 16 columns), and pairs of tokens and experts."""


@functools.lru_cache
def compiled() -> Any:
    """The product and its gradients. It compiles once for each number of experts and each dtype."""

    def run(rows, weights, further_expert, d_y):
        y = grouped_kernel.multiply(rows, weights, further_expert, interpret=True)
        return y, *grouped_kernel.gradients(rows, weights, further_expert, d_y, interpret=True)

    return jax.jit(run)


def blocks(expert: list[list[int]], experts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [G, R, D] of tokens that chose these experts, as training lays them out; the further groups' experts; and
    for each group its expert."""
    index = jnp.asarray(expert)[None]
    plan, further, _ = Blocks(R).plan_queues(index, jnp.ones((1, len(expert)), bool), experts)
    x = np.random.default_rng(seed).normal(size=(1, len(expert), D)).astype(np.float32)
    rows = np.asarray(dispatch(jnp.asarray(x), plan))[:, 0]
    return rows, np.asarray(further), np.concatenate([np.arange(experts), further])


EVEN = [[t % 4] for t in range(PAIRS)]
CASES = {
    "several blocks each": ([[t % 3 + (t % 7 == 0)] for t in range(PAIRS)], 4),
    "everything to one expert, nothing to the others": ([[2]] * PAIRS, 4),
    "one row": ([[1], *[[3]] * (PAIRS - 1)], 4),
    "each token to all experts": ([[3, 1, 0, 2]] * (PAIRS // 4), 4),
    "one expert": ([[0]] * PAIRS, 1),
    "a number of experts that is no power of 2": ([[t % 5] for t in range(PAIRS)], 5),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_product_and_its_gradients_against_loops_in_float64(case: str, dtype: str) -> None:
    """In bfloat16, operands are exact in float64, sums are in float32, and a result is rounded once: by at most 2^-8 of
    itself."""
    rows, further, expert = blocks(*CASES[case])
    rng = np.random.default_rng(1)
    weights, d_y = rng.normal(size=(max(expert) + 1, D, F)), rng.normal(size=(len(rows), R, F))
    rows, weights, d_y = (np.asarray(jnp.asarray(a, jnp.float32).astype(dtype)) for a in (rows, weights, d_y))
    operands = (rows, weights.astype(np.float32), further, d_y)
    found, again = compiled()(*operands), compiled()(*operands)
    tiny.assert_same_bits(found, again)
    assert [a.dtype for a in found] == [dtype, dtype, "float32"]
    rows, weights, d_y = (a.astype(np.float64) for a in (rows, weights, d_y))
    d_weights = np.zeros_like(weights)
    np.add.at(d_weights, expert, rows.swapaxes(1, 2) @ d_y)
    exact = (rows @ weights[expert], d_y @ weights[expert].swapaxes(1, 2), d_weights)
    rounding = 2.0**-8 if dtype == "bfloat16" else 0
    for ours, expected in zip(found, exact, strict=True):
        allowed = 1e-6 * np.abs(expected).max() + rounding * np.abs(expected)
        assert (np.abs(np.asarray(ours, np.float64) - expected) <= allowed).all()


def test_a_nan_stays_with_its_row_and_its_expert() -> None:
    rows, further, _ = blocks(EVEN, 4)
    rows = rows.copy()
    rows[1, 5] = np.nan
    found = compiled()(rows, np.ones((4, D, F), np.float32), further, np.ones((len(rows), R, F), np.float32))
    y, d_rows, d_weights = (np.isnan(a) for a in found)
    assert y[1, 5].all()
    assert y.sum() == F
    assert not d_rows.any()
    assert d_weights[1].all()
    assert d_weights.sum() == D * F


@pytest.mark.parametrize(
    ("rows", "weights", "dtype", "answer"),
    [
        ((7, 128, 512), (4, 512, 256), "bfloat16", True),
        ((7, 16, 48), (4, 48, 80), "float32", True),
        ((7, 8, 512), (4, 512, 256), "bfloat16", False),
        ((7, 48, 512), (4, 512, 256), "bfloat16", False),
        ((7, 256, 512), (4, 512, 256), "bfloat16", False),
        ((7, 128, 520), (4, 520, 256), "bfloat16", False),
        ((7, 128, 512), (4, 512, 8), "bfloat16", False),
        ((7, 128, 512), (4, 512, 256), "float64", False),
        ((2**15, 128, 512), (4, 512, 16), "bfloat16", False),  # 2^31 numbers
        ((2**15, 128, 16), (4, 16, 512), "bfloat16", False),
    ],
    ids=str,
)
def test_the_shapes_that_it_takes(rows: Any, weights: Any, dtype: str, answer: bool) -> None:
    assert grouped_kernel.suits(rows, weights, dtype) is answer


def product_and_gradients(rows, weights, further_expert, d_y, implementation="in_place"):
    multiply = functools.partial(
        grouped_matmul.grouped_matmul, further_expert=further_expert, implementation=implementation
    )
    y, pull = jax.vjp(multiply, rows, weights)
    return y, *pull(d_y)


def shapes(experts: int, further: int, count: int, width: int, hidden: int, dtype: str = "bfloat16") -> list[Any]:
    rows, d_y = ((experts + further, count, size) for size in (width, hidden))
    made = ((rows, dtype), ((experts, width, hidden), "float32"), ((further,), "int32"), (d_y, dtype))
    return [jax.ShapeDtypeStruct(*one) for one in made]


def lowered_for_gpu(function: Any, *shapes: Any) -> str:
    with for_described_gpu():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("implementation", "count", "programs"), [("in_place", 16, 3), ("in_place", 8, 0), ("blocked", 16, 0)]
)
def test_what_a_gpu_gets(implementation: str, count: int, programs: int) -> None:
    """One program for the product and one for each gradient, and no copies of matrices. 8 rows are too few.

    Triton reads no array of five numbers, one for each expert, so it gets eight.
    """
    function = functools.partial(product_and_gradients, implementation=implementation)
    text = lowered_for_gpu(function, *shapes(5, 3, count, 32, 48))
    assert text.count("@__gpu$xla.gpu.triton") == programs
    assert (text.count("stablehlo.gather") == 0) == (programs > 0)


def test_the_products_of_a_layer() -> None:
    """The three products of SwiGLU, and two gradients of each."""
    config = tiny.config(layers=1, width=32, expert_hidden=16, dispatch="blocks")
    x = jax.ShapeDtypeStruct((2, 32, config.width), jnp.float32)  # 128 pairs: blocks of 32 rows
    for cls, expected in ((moe_layer.InPlaceMoE, 3 * 3), (moe_layer.MoE, 0)):
        forward, params = layer_shapes(config, cls)
        text = lowered_for_gpu(with_gradients(forward), params, x, x)
        assert text.count("@__gpu$xla.gpu.triton") == expected


@pytest.mark.parametrize(
    ("gpu", "dispatch", "in_place"),
    [
        ("rtx3050-4gb", "blocks", True),
        ("h100-80gb", "blocks", True),
        ("quadro-t1000-4gb", "blocks", False),
        ("rtx3050-4gb", "capacity", False),
        (None, "blocks", False),
    ],
)
def test_who_trains_with_it(gpu: str | None, dispatch: str, in_place: bool) -> None:
    config = RunConfig(model=tiny.config(dispatch=dispatch))
    programs = Programs.of(config, gpu and load_target(gpu))
    model = nnx.merge(programs.training_graphdef, programs.param_shapes)
    assert {type(block.ffn) for block in model.blocks} == {moe_layer.InPlaceMoE if in_place else moe_layer.MoE}
    if dispatch == "blocks":
        assert model.blocks[0].ffn.dispatch_for(moe_layer.Mode.TRAIN, 64, 64) == Blocks(64 if in_place else 128)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", ["rtx3050-4gb", "h100-80gb"])
@compiled_for_gpu
def test_it_compiles_within_the_shared_memory_of_a_card(gpu: str, dtype: str) -> None:
    """The largest tiles. XLA refuses a program that takes more shared memory than the card has."""
    lower_for(load_target(gpu), jax.jit(product_and_gradients), *shapes(4, 9, 128, 512, 256, dtype)).compile()

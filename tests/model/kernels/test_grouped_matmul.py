"""Each group of rows times its expert's matrix: the forms by copies and in turn, the reference, and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.model.kernels import grouped_matmul as grouped
from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from moe_jax.system.hlo import read_program
from tests.support import programs, tiny

COPIES, IN_TURN = 3, 1
"""Rows of a group for which a 5 x 2 matrix is copied (10 <= 3 * 7), and for which it is not (10 > 1 * 7)."""


@functools.lru_cache
def compiled(implementation: str, further: bool):
    def run(rows, weights, further_expert, cotangent):
        index = further_expert if further else None
        y, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, index, implementation), rows, weights)
        return y, *pull(cotangent)

    return jax.jit(run)


@given(
    count=st.sampled_from([COPIES, IN_TURN]),
    further_expert=st.none() | st.lists(st.integers(0, 3), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocked_is_the_reference(count: int, further_expert: list[int] | None, seed: int) -> None:
    """Any experts for the further groups: all one, none of some, in any order."""
    rng = np.random.default_rng(seed)
    groups = 4 + len(further_expert or [])
    operands = (
        rng.normal(size=(groups, count, 5)),
        rng.normal(size=(4, 5, 2)),
        np.array(further_expert or [], int),
        rng.normal(size=(groups, count, 2)),
    )
    with jax.enable_x64(True):
        ours, expected = (compiled(name, further_expert is not None)(*operands) for name in ("blocked", "reference"))
    for one, other in zip(ours, expected, strict=True):
        assert tiny.relative_error(one, other) < 1e-14


def test_the_gradients_of_all_groups_of_an_expert_are_added() -> None:
    """Groups 0 to 2 belong to the experts 0 to 2; groups 3 and 4 to expert 1. So 1 + 3 + 4 = 8 for expert 1."""
    d_copies = jnp.arange(5, dtype=jnp.bfloat16)[:, None, None]
    total = grouped._sum_of_groups(d_copies, jnp.array([1, 1]), 3)
    assert (total.ravel().tolist(), total.dtype) == ([0, 8, 2], jnp.float32)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("count", [COPIES, IN_TURN])
@pytest.mark.parametrize("further_expert", [None, [0], [0, 0]], ids=str)
def test_one_expert_for_all_groups(implementation: str, count: int, further_expert: list[int] | None) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(1, 5, 2)).astype(np.float32)
    rows = rng.normal(size=(1 + len(further_expert or []), count, 5)).astype(np.float32)
    index = None if further_expert is None else jnp.asarray(further_expert)
    y = grouped_matmul(jnp.asarray(rows), jnp.asarray(weights), index, implementation)
    np.testing.assert_allclose(y, rows @ weights[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("count", [COPIES, IN_TURN])
def test_the_product_has_the_dtype_of_the_rows(implementation: str, count: int) -> None:
    """bfloat16 rows, float32 weights: a bfloat16 product, and a float32 gradient for the weights."""
    rows, weights = jnp.ones((4, count, 5), jnp.bfloat16), jnp.ones((3, 5, 2), jnp.float32)
    y, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, jnp.array([1]), implementation), rows, weights)
    d_rows, d_weights = pull(y)
    assert (y.dtype, d_rows.dtype, d_weights.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("count", [COPIES, IN_TURN])
def test_the_gradient_of_matrices_has_a_fixed_order(count: int) -> None:
    """No scatter-add of floats: on a GPU its order, and so its rounding, changes from run to run."""

    def indexed(rows, weights, further_expert):
        return rows @ jnp.concatenate([weights, weights[further_expert]])

    shapes = [((6, count, 5), "float32"), ((4, 5, 2), "float32"), ((2,), "int32"), ((6, count, 2), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    for multiply, expected in ((grouped_matmul, 0), (indexed, 1)):

        def run(rows, weights, further_expert, cotangent, multiply=multiply):
            return jax.vjp(lambda r, w: multiply(r, w, further_expert), rows, weights)[1](cotangent)

        assert len(programs.scatter_adds_of_floats(jax.jit(run).lower(*arguments).as_text())) == expected


@pytest.mark.parametrize("experts", [1, 2])
def test_a_product_is_found_by_its_name_in_the_compiled_program(experts: int) -> None:
    """Also that of a single expert, which the compiler would turn into another product without a name."""

    def run(rows, weights):
        with jax.named_scope("ffn"):
            return grouped_matmul(rows, weights).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((experts, 64, 32), (experts, 32, 48))]
    for function, products in ((run, 1), (jax.grad(run, (0, 1)), 2)):
        program = read_program(jax.jit(function).lower(*shapes).compile().as_text())
        assert program.flops_of("ffn") == program.flops == products * experts * 2 * 64 * 32 * 48

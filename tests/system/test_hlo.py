"""The reader of optimised HLO, on programs whose products can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.system.hlo import Program, read_program, scopes


def compiled(function, *shapes: tuple[int, ...]) -> Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function).lower(*arguments).compile().as_text())


def test_one_product() -> None:
    def layer(a, b):
        with jax.named_scope("router"):
            return a @ b

    program = compiled(layer, (32, 48), (48, 80))
    (dot,) = program.dots
    assert (dot.left, dot.right, dot.out, dot.runs) == ((32, 48), (48, 80), (32, 80), 1)
    assert program.flops == dot.total == 2 * 32 * 48 * 80
    assert program.flops_of("router") == program.flops
    assert program.flops_of("route") == 0


def test_a_batch_of_products_and_their_gradients() -> None:
    def loss(x, w):
        return jnp.sum(jnp.einsum("erd,edf->erf", x, w) ** 2)

    program = compiled(jax.grad(loss, argnums=(0, 1)), (3, 40, 24), (3, 24, 56))
    assert program.flops == 3 * (2 * 3 * 40 * 24 * 56)  # forward, and two backward
    assert len(program.dots) == 3


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def repeated(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=12)[0]

    program = compiled(repeated, (64, 64), (64, 64))
    assert program.flops == 12 * 2 * 64**3
    assert max(dot.runs for dot in program.dots) == 12


def test_loops_within_loops_multiply() -> None:
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (inner(x, w), None), x, None, length=3)[0]

    assert compiled(outer, (32, 32), (32, 32)).flops == 15 * 2 * 32**3


def test_both_sides_of_a_conditional_count() -> None:
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert compiled(either, (32, 32), (32, 32)).flops in (
        2 * 2 * 32**3,
        3 * 2 * 32**3,
    )  # a shared product may be hoisted


def test_what_nobody_uses_is_not_there() -> None:
    def half(x, w):
        unused = x @ x
        del unused
        return x @ w

    assert compiled(half, (32, 32), (32, 32)).flops == 2 * 32**3


def test_a_loop_of_unknown_length_is_refused() -> None:
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="number of passes of a loop is unknown"):
        compiled(until, (8, 8))


def test_the_largest_buffer_is_seen() -> None:
    def outer_product(a, b):
        return jnp.sort(a[:, None] * b[None, :], axis=0)

    largest = compiled(outer_product, (50,), (70,)).largest(1)[0]
    assert sorted(largest.shape) == [50, 70]
    assert largest.elements == 3500


def test_scopes_are_whole_names() -> None:
    found = scopes("jit(step)/transpose(jvp(experts))/grd,gdf->grf/dot_general")
    assert {"step", "experts", "dot_general"} <= found
    assert "expert" not in found

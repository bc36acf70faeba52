"""The reader of optimised HLO, on programs whose products can be counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import TrainConfig
from moe_jax.config.presets import preset
from moe_jax.model.costs import layer_flops
from moe_jax.planning.device_memory import BACK_ENDS, lower_for
from moe_jax.planning.target import load_target
from moe_jax.system.hlo import Program, read_program, scopes
from moe_jax.training.programs import Programs
from tests.support.programs import compiled_for_gpu


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


LIBRARY_CALL = """HloModule jit_f
ENTRY %main (a: f32[6,40,24], b: f32[6,24,56]) -> f32[6,40,56] {
  %a = f32[6,40,24]{2,1,0} parameter(0)
  %b = f32[6,24,56]{2,1,0} parameter(1)
  %call = (f32[6,40,56]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="TARGET", \
metadata={op_name="jit(f)/experts/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"precision_config":{"operand_precision":["HIGHEST",\
"HIGHEST"],"algorithm":"ALG_UNSET"},"epilogue":"DEFAULT"}}
  ROOT %y = f32[6,40,56]{2,1,0} get-tuple-element(%call), index=0
}
"""


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_a_product_of_a_gpu_library(target: str) -> None:
    program = read_program(LIBRARY_CALL.replace("TARGET", target))
    (dot,) = program.dots
    assert (dot.left, dot.right, dot.out) == ((6, 40, 24), (6, 24, 56), (6, 40, 56))
    assert (dot.dtype, dot.operand_dtype, dot.precision) == ("f32", "f32", "highest")
    assert program.flops == program.flops_of("experts") == 2 * 6 * 40 * 24 * 56


@pytest.mark.parametrize("target", ["__cudnn$fmhaSoftmax", "__cublas$future", "__onednn$convolution"])
def test_a_call_that_cannot_be_counted_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="cannot be counted"):
        read_program(LIBRARY_CALL.replace("TARGET", target))


def test_a_call_without_products_counts_nothing() -> None:
    assert read_program(LIBRARY_CALL.replace("TARGET", "cu_threefry2x32")).dots == []


@pytest.mark.parametrize(
    ("gpu", "back_end"), [("rtx3050-4gb", "triton"), ("rtx3050-4gb", "cublas"), ("quadro-t1000-4gb", "cublas")]
)
@compiled_for_gpu
def test_a_gpu_program_has_the_operations_of_the_cpu_program(gpu: str, back_end: str) -> None:
    """The training step, in the part of the expert layers, and in all."""
    config = dataclasses.replace(preset("nano"), train=TrainConfig(optimizer="adamw"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=512))
    programs = Programs.of(config, target := load_target(gpu))
    batch = jax.ShapeDtypeStruct((1, 8, config.model.seq_len + 1), jnp.int32)
    lowered = lower_for(target, programs.step, programs.state_shapes, batch)
    program = read_program(lowered.compile(compiler_options=dict(BACK_ENDS[back_end])).as_text())
    ours = read_program(Programs.of(config).compiled_step(8).as_text())
    assert program.flops == ours.flops > 0
    layer = ("router", "dispatch", "experts", "combine")
    assert program.flops_of(*layer) == ours.flops_of(*layer) == 3 * config.model.layers * layer_flops(config.model, 8)


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

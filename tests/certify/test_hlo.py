"""The reader of optimised HLO, on programs whose products can be counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from moe_jax.certify.hlo import Program, read_program


def compiled(function, *shapes: tuple[int, ...]) -> Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function).lower(*arguments).compile().as_text())


def test_one_product() -> None:
    def layer(a, b):
        with jax.named_scope("router"):
            return a @ b

    program = compiled(layer, (32, 48), (48, 80))
    (dot,) = program.dots
    assert (dot.operand_dtype, dot.runs) == ("f32", 1)
    assert program.flops == dot.total == 2 * 32 * 48 * 80
    assert program.flops_of("router") == program.flops
    assert program.flops_of("route") == 0


def test_a_loop_counts_as_often_as_it_runs_and_loops_within_loops_multiply() -> None:
    def inner(x, w, length=5):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=length)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (inner(x, w), None), x, None, length=3)[0]

    program = compiled(partial(inner, length=12), (64, 64), (64, 64))
    assert (program.flops, max(dot.runs for dot in program.dots)) == (12 * 2 * 64**3, 12)
    assert compiled(outer, (32, 32), (32, 32)).flops == 15 * 2 * 32**3


def test_both_sides_of_a_conditional_count_and_what_nobody_uses_is_not_there() -> None:
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    def half(x, w):
        unused = x @ x
        del unused
        return x @ w

    one = 2 * 32**3
    assert compiled(either, (32, 32), (32, 32)).flops in (2 * one, 3 * one)  # a shared product may be hoisted
    assert compiled(half, (32, 32), (32, 32)).flops == one


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
    assert (dot.operand_dtype, dot.precision) == ("f32", "highest")
    assert program.flops == program.flops_of("experts") == 2 * 6 * 40 * 24 * 56


def library_attention(mask: str) -> str:
    """A call forward and one backward: 2 sequences of 5 positions, 6 heads of 8 numbers on 3 key heads."""
    config = '{"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "mask_type": "' + mask + '"}}'
    return f"""HloModule jit_f
ENTRY %main (q: bf16[2,5,6,8], k: bf16[2,5,3,8], v: bf16[2,5,3,8], o: bf16[2,5,6,8]) -> bf16[2,6,5,8] {{
  %q = bf16[2,5,6,8]{{3,2,1,0}} parameter(0)
  %k = bf16[2,5,3,8]{{3,2,1,0}} parameter(1)
  %v = bf16[2,5,3,8]{{3,2,1,0}} parameter(2)
  %o = bf16[2,5,6,8]{{3,2,1,0}} parameter(3)
  %f = (bf16[2,6,5,8]{{3,1,2,0}}, f32[2,6,5]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %v), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={{op_name="jit(f)/attention/fwd"}}, backend_config={config}
  %s = f32[2,6,5]{{2,1,0}} get-tuple-element(%f), index=1
  %b = (bf16[2,6,5,8]{{3,1,2,0}}, bf16[2,3,5,8]{{3,1,2,0}}, bf16[2,3,5,8]{{3,1,2,0}}, u8[0]{{0}}) \
custom-call(%q, %k, %v, %s, %o, %o), custom_call_target="__cudnn$fmhaSoftmaxBackward", \
metadata={{op_name="jit(f)/transpose(attention)/bwd"}}, backend_config={config}
  ROOT %d = bf16[2,6,5,8]{{3,1,2,0}} get-tuple-element(%b), index=0
}}
"""


@pytest.mark.parametrize(("mask", "scores"), [("CAUSAL", 1 + 2 + 3 + 4 + 5), ("NO_MASK", 25)])
def test_the_products_of_cudnns_attention(mask: str, scores: int) -> None:
    """Two products forward and five backward, each with 2 x 8 operations for every score of every head."""
    forward, backward = read_program(library_attention(mask)).dots
    assert forward.flops == 2 * (2 * 6) * scores * 2 * 8
    assert backward.flops == 5 * (2 * 6) * scores * 2 * 8
    assert (forward.operand_dtype, backward.operand_dtype) == ("bf16", "bf16")
    assert read_program(library_attention(mask)).flops_of("attention") == forward.flops + backward.flops

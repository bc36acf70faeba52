"""The reader of optimised HLO, on programs whose products can be counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import TrainConfig
from moe_jax.config.presets import preset
from moe_jax.model.costs import layer_flops, step_products
from moe_jax.planning.device_memory import back_ends, lower_for
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


def test_another_program_of_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be counted"):
        read_program(LIBRARY_CALL.replace("TARGET", "__gpu$xla.gpu.triton"))


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


def test_attention_with_another_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be counted"):
        read_program(library_attention("PADDING"))


@pytest.mark.parametrize("target", ["__cudnn$fmhaSoftmaxF8", "__cublas$future", "__onednn$convolution"])
def test_a_call_that_cannot_be_counted_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="cannot be counted"):
        read_program(LIBRARY_CALL.replace("TARGET", target))


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "multiplications"),
    [
        ("bf16[6,40]", "bf16[40,8]", "bf16[6,8]", "dim_labels=bf_io->bf", 6 * 40 * 8),
        ("bf16[40,6]", "bf16[8,40]", "f32[6,8]", "dim_labels=fb_oi->bf", 6 * 40 * 8),
        # Three pairs of matrices. 9 pairs of a result and a tap of the window, of which 6 meet an inserted zero.
        (
            "bf16[3,5,4]",
            "bf16[3,4,7]",
            "bf16[3,5,7]",
            "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            3 * 5 * 4 * 7,
        ),
        (
            "bf16[3,5,4]",
            "bf16[3,4,7]",
            "bf16[3,5,7]",
            "window={size=3 stride=3 pad=2_2 lhs_dilate=2 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            3 * 5 * 4 * 7,
        ),
        (
            "bf16[2,3,5,4]",
            "bf16[2,3,4,7]",
            "bf16[2,3,5,7]",
            "window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=01bf_01io->01bf",
            2 * 3 * 5 * 4 * 7,
        ),
        # One matrix for every entry of a dimension.
        ("f32[8,25,4]", "f32[4,6,1]", "f32[8,25,6]", "window={size=1}, dim_labels=0bf_io0->0bf", 8 * 25 * 4 * 6),
        # A window of 3 over 5 entries, with a padding of 1 at each end: 3 x 5 - 2 pairs.
        ("f32[5,1,1]", "f32[3,1,1]", "f32[5,1,1]", "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 13),
        ("s32[6,40]", "s32[40,8]", "s32[6,8]", "dim_labels=bf_io->bf", 0),
    ],
)
def test_a_product_that_a_tpu_writes_as_a_convolution(
    left: str, right: str, out: str, attributes: str, multiplications: int
) -> None:
    program = read_program(
        f"HloModule jit_f\nENTRY %main (a: {left}, b: {right}) -> {out} {{\n"
        f"  %a = {left}{{1,0:T(8,128)}} parameter(0)\n"
        f"  %b = {right}{{1,0:T(8,128)}} parameter(1)\n"
        f"  ROOT %c = {out}{{1,0:T(8,128)S(1)}} convolution(%a, %b), {attributes}, "
        'operand_precision={highest,highest}, metadata={op_name="jit(f)/head/dot"}\n}\n'
    )
    assert program.flops == program.flops_of("head") == 2 * multiplications
    assert program.dots[0].precision == "highest"


TPU_LOOP = """HloModule jit_f
%body (s: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {
  %one = s32[]{:T(128)} constant(1)
  %s = (f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=1
  %kept = s32[]{:T(128)} copy(%i)
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%s), index=0
  %y = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  %next = s32[]{:T(128)} add(%kept, %one)
  ROOT %t = (f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%y, %next)
}
%condition (s: (f32[8,8], s32[])) -> pred[] {
  %end = s32[]{:T(128)} constant(7)
  %s = (f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}
ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(2)
  %first = s32[]{:T(128)} copy(%zero)
  %t = (f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%a, %first)
  %loop = (f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) while(%t), condition=%condition, body=%body
  ROOT %y = f32[8,8]{1,0:T(8,128)} get-tuple-element(%loop), index=0
}
"""


def test_the_passes_of_a_loop_are_counted_where_the_compiler_does_not_write_them() -> None:
    """From 2 to 6: five passes."""
    assert read_program(TPU_LOOP).flops == 5 * 2 * 8**3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=LE"),
        ("constant(1)", "constant(2)"),
        ("add(%kept", "subtract(%kept"),
        ("%zero = s32[]{:T(128)} constant(2)", "%zero = s32[]{:T(128)} negate(%a)"),
        ("constant(7)", "negate(%s)"),
        ("compare(%i", "compare(%end"),
    ],
)
def test_a_loop_that_counts_in_another_way_has_an_unknown_length(old: str, new: str) -> None:
    with pytest.raises(ValueError, match="number of passes of a loop is unknown"):
        read_program(TPU_LOOP.replace(old, new))


def test_a_call_without_products_counts_nothing() -> None:
    assert read_program(LIBRARY_CALL.replace("TARGET", "cu_threefry2x32")).dots == []


@pytest.mark.parametrize(
    ("gpu", "back_end"), [("rtx3050-4gb", "triton"), ("rtx3050-4gb", "cublas"), ("quadro-t1000-4gb", "cublas")]
)
@compiled_for_gpu
def test_a_gpu_program_has_the_operations_of_the_cpu_program(gpu: str, back_end: str) -> None:
    """The training step, in the part of the expert layers, and in all. The RTX 3050 takes cuDNN's attention, which does
    not compute the scores of later positions."""
    config = dataclasses.replace(preset("nano"), train=TrainConfig(optimizer="adamw"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=512))
    programs = Programs.of(config, target := load_target(gpu))
    batch = jax.ShapeDtypeStruct((1, 8, config.model.seq_len + 1), jnp.int32)
    lowered = lower_for(target, programs.step, programs.state_shapes, batch)
    program = read_program(lowered.compile(compiler_options=back_ends(target)[back_end]).as_text())
    ours = read_program(Programs.of(config).compiled_step(8).as_text())
    assert (programs.attention.implementation == "cudnn") == (gpu == "rtx3050-4gb")
    own, given = (step_products(config, 8, cudnn=cudnn)["attention"] for cudnn in (False, gpu == "rtx3050-4gb"))
    assert program.flops == ours.flops - own + given > 0
    assert program.flops_of("attention") == given
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

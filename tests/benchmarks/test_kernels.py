"""The kernels of a GPU program and their traffic, on texts whose bytes are counted by hand."""

import pytest
from predicted.kernels import Kernel, read_kernels

SUM = """%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
"""


def only(text: str) -> Kernel:
    (kernel,) = read_kernels("HloModule m\n" + text)
    return kernel


def traffic(kernel: Kernel) -> tuple[int, int]:
    return kernel.bytes_read, kernel.bytes_written


def test_a_fusion_reads_its_operands_and_writes_all_its_results() -> None:
    """It reads 40 numbers of 4 bytes, a scalar, and writes 40 numbers of 2 bytes and 10 of 4."""
    kernel = only(
        SUM
        + """%fused (p0: f32[10,4], p1: f32[]) -> (bf16[10,4], f32[10]) {
  %p0 = f32[10,4]{1,0} parameter(0)
  %p1 = f32[] parameter(1)
  %c = bf16[10,4]{1,0} convert(%p0)
  %r = f32[10]{0} reduce(%p0, %p1), dimensions={1}, to_apply=%sum
  ROOT %t = (bf16[10,4]{1,0}, /*index=1*/f32[10]{0}) tuple(%c, %r)
}
ENTRY %main (a: f32[10,4], z: f32[]) -> bf16[10,4] {
  %a = f32[10,4]{1,0} parameter(0)
  %z = f32[] constant(0)
  %f = (bf16[10,4]{1,0}, /*index=1*/f32[10]{0}) fusion(%a, %z), kind=kInput, calls=%fused, \
metadata={op_name="jit(step)/jvp(head)/reduce_sum"}
  ROOT %g = bf16[10,4]{1,0} get-tuple-element(%f), index=0
}
"""
    )
    assert traffic(kernel) == (160 + 4, 80 + 40)
    assert (kernel.opcode, kernel.runs, kernel.dots) == ("fusion", 1, ())
    assert "reduce" in kernel.inner
    assert "head" in kernel.scopes


LOOP = """%body (p: (s32[], f32[6,100], f32[8,100])) -> (s32[], f32[6,100], f32[8,100]) {
  %p = (s32[], f32[6,100]{1,0}, f32[8,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %out = f32[6,100]{1,0} get-tuple-element(%p), index=1
  %in = f32[8,100]{1,0} get-tuple-element(%p), index=2
  %u = f32[6,100]{1,0} fusion(%out, %in, %i), kind=kLoop, calls=%update
  %k = f32[8,100]{1,0} copy(%in)
  ROOT %t = (s32[], f32[6,100]{1,0}, f32[8,100]{1,0}) tuple(%i, %u, %k)
}
%update (o: f32[6,100], x: f32[8,100], i: s32[]) -> f32[6,100] {
  %o = f32[6,100]{1,0} parameter(0)
  %x = f32[8,100]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%x, %i.1, %zero), dynamic_slice_sizes={1,100}
  %half = f32[1,100]{1,0} multiply(%row, %row)
  ROOT %d = f32[6,100]{1,0} dynamic-update-slice(%o, %half, %i.1, %zero)
}
%more (p: (s32[], f32[6,100], f32[8,100])) -> pred[] {
  %p.1 = (s32[], f32[6,100]{1,0}, f32[8,100]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i.2, %n), direction=LT
}
ENTRY %main (a: f32[6,100], b: f32[8,100]) -> f32[6,100] {
  %a = f32[6,100]{1,0} parameter(0)
  %b = f32[8,100]{1,0} parameter(1)
  %z = s32[] constant(0)
  %t.1 = (s32[], f32[6,100]{1,0}, f32[8,100]{1,0}) tuple(%z, %a, %b)
  %w = (s32[], f32[6,100]{1,0}, f32[8,100]{1,0}) while(%t.1), condition=%more, body=%body, \
metadata={op_name="jit(step)/experts/while"}, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %r = f32[6,100]{1,0} get-tuple-element(%w), index=1
}
"""


def test_a_loop_reads_a_slice_and_writes_a_slice_in_each_pass() -> None:
    """Six passes. The fusion reads a row of 400 bytes and its number (4 bytes), and writes a row in place. The copy
    reads and writes 8 rows. The condition is no kernel. What has no name of its own has that of the loop."""
    update, copy = read_kernels(LOOP)
    assert (update.opcode, update.runs, *traffic(update)) == ("fusion", 6, 400 + 4, 400)
    assert (copy.opcode, copy.runs, *traffic(copy)) == ("copy", 6, 3200, 3200)
    assert update.traffic == 6 * 804
    assert all("experts" in kernel.scopes for kernel in (update, copy))


def test_a_gather_reads_its_rows_and_a_scatter_adds_to_its_rows() -> None:
    """The gather: 3 rows of 400 bytes and 3 indices. The scatter: its updates (1,200 bytes) and indices, and the rows
    that it changes are read and written."""
    gather, scatter = read_kernels(
        SUM
        + """%fused (t: f32[1000,100], i: s32[3,1], u: f32[3,100]) -> f32[1000,100] {
  %t = f32[1000,100]{1,0} parameter(0)
  %i = s32[3,1]{1,0} parameter(1)
  %u = f32[3,100]{1,0} parameter(2)
  ROOT %s = f32[1000,100]{1,0} scatter(%t, %i, %u), update_window_dims={1}, to_apply=%sum
}
ENTRY %main (t: f32[1000,100], i: s32[3,1]) -> f32[1000,100] {
  %a = f32[1000,100]{1,0} parameter(0)
  %j = s32[3,1]{1,0} parameter(1)
  %g = f32[3,100]{1,0} gather(%a, %j), offset_dims={1}, slice_sizes={1,100}
  ROOT %f = f32[1000,100]{1,0} fusion(%a, %j, %g), kind=kInput, calls=%fused
}
"""
    )
    assert traffic(gather) == (1200 + 12, 1200)
    assert traffic(scatter) == (1200 + 12, 2400)
    assert "scatter" in scatter.inner


def test_a_librarys_product_without_its_workspace_and_launches_that_are_waited_for_later() -> None:
    """The product reads [6,40,24] and [6,24,56] and writes [6,40,56], in bfloat16. `fusion-start` is one launch, and
    `copy-start` another; what waits for them is none."""
    product, fusion, copy = read_kernels(
        """%fused (p: bf16[6,40,56]) -> bf16[40,56] {
  %p = bf16[6,40,56]{2,1,0} parameter(0)
  ROOT %s = bf16[40,56]{1,0} slice(%p), slice={[0:1], [0:40], [0:56]}
}
ENTRY %main (a: bf16[6,40,24], b: bf16[6,24,56]) -> bf16[40,56] {
  %a = bf16[6,40,24]{2,1,0} parameter(0)
  %b = bf16[6,24,56]{2,1,0} parameter(1)
  %call = (bf16[6,40,56]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}
  %y = bf16[6,40,56]{2,1,0} get-tuple-element(%call), index=0
  %s = ((bf16[6,40,56]{2,1,0}), bf16[40,56]{1,0}, u32[]) fusion-start(%y), kind=kLoop, calls=%fused
  %d = bf16[40,56]{1,0} fusion-done(%s)
  %cs = (bf16[40,56]{1,0}, bf16[40,56]{1,0}, u32[]) copy-start(%d)
  ROOT %cd = bf16[40,56]{1,0} copy-done(%cs)
}
"""
    )
    assert traffic(product) == (2 * 6 * 40 * 24 + 2 * 6 * 24 * 56, 2 * 6 * 40 * 56)
    assert [dot.flops for dot in product.dots] == [2 * 6 * 40 * 24 * 56]
    assert traffic(fusion) == traffic(copy) == (2 * 40 * 56, 2 * 40 * 56)
    assert (fusion.opcode, copy.opcode) == ("fusion", "copy")


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "multiplications"),
    [
        ("bf16[6,40]", "bf16[40,8]", "bf16[6,8]", "dim_labels=bf_io->bf", 6 * 40 * 8),
        # Six pairs of matrices. Most pairs of a result and a tap of the window meet an inserted zero.
        (
            "bf16[2,3,5,4]",
            "bf16[2,3,4,7]",
            "bf16[2,3,5,7]",
            "window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=01bf_01io->01bf",
            2 * 3 * 5 * 4 * 7,
        ),
        # A window of 3 over 5 entries, with a padding of 1 at each end: 3 x 5 - 2 pairs.
        ("f32[5,1,1]", "f32[3,1,1]", "f32[5,1,1]", "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 13),
        ("s32[6,40]", "s32[40,8]", "s32[6,8]", "dim_labels=bf_io->bf", 0),
    ],
)
def test_a_product_that_a_tpu_writes_as_a_convolution(
    left: str, right: str, out: str, attributes: str, multiplications: int
) -> None:
    (kernel,) = read_kernels(
        f"HloModule jit_f\nENTRY %main (a: {left}, b: {right}) -> {out} {{\n"
        f"  %a = {left}{{1,0:T(8,128)}} parameter(0)\n"
        f"  %b = {right}{{1,0:T(8,128)}} parameter(1)\n"
        f"  ROOT %c = {out}{{1,0:T(8,128)S(1)}} convolution(%a, %b), {attributes}, "
        'operand_precision={highest,highest}, metadata={op_name="jit(f)/head/dot"}\n}\n'
    )
    (dot,) = kernel.dots
    assert (dot.total, dot.precision, "head" in kernel.scopes) == (2 * multiplications, "highest", True)

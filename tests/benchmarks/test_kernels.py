"""The kernels of a GPU program and their traffic, on texts whose bytes are counted by hand."""

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

"""The reader of collectives, on programs that are written by hand."""

import pytest

from moe_jax.certify.collectives import bytes_by_kind, read_collectives

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=4\n"

LOOPED = (
    HEADER
    + """
%body (state: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %state = (s32[], f32[4,6]{1,0}) parameter(0)
  %x = f32[4,6]{1,0} get-tuple-element(%state), index=1
  %swapped = f32[4,6]{1,0} all-to-all(%x), replica_groups={{0,2},{1,3}}, dimensions={0}, metadata={op_name="jit(f)/a"}
  ROOT %next = (s32[], f32[4,6]{1,0}) tuple(%n, %swapped)
}

ENTRY %main (a: bf16[3], b: f32[2,5]) -> f32[2,5] {
  %a = bf16[3]{0} parameter(0)
  %b = f32[2,5]{1,0} parameter(1)
  %start = (bf16[3]{0}, bf16[12]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %done = bf16[12]{0} all-gather-done(%start)
  %both = (f32[2,5]{1,0}, bf16[3]{0}) all-reduce(%b, %a), replica_groups={}, to_apply=%add
  %part = f32[1,5]{1,0} reduce-scatter(%b), replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}, to_apply=%add
  %shifted = f32[2,5]{1,0} collective-permute(%b), source_target_pairs={{0,1},{1,0}}
  %loop = (s32[], f32[4,6]{1,0}) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[2,5]{1,0} copy(%b)
}
"""
)


def test_every_kind_with_its_bytes_and_loops() -> None:
    gather, reduce, scatter, permute, exchange = read_collectives(LOOPED)
    assert (gather.kind, gather.bytes) == ("all-gather", 3 * 2 * 4)
    assert (reduce.kind, reduce.bytes) == ("all-reduce", 2 * 5 * 4 + 3 * 2)
    assert reduce.operands == (("f32", (2, 5)), ("bf16", (3,)))
    assert (scatter.kind, scatter.bytes) == ("reduce-scatter", 40)
    assert (permute.kind, permute.bytes) == ("collective-permute", 40)
    assert (exchange.kind, exchange.op_name, exchange.loops) == ("all-to-all", "jit(f)/a", (3,))
    assert (exchange.bytes, exchange.total) == (96, 288)
    assert bytes_by_kind([gather, exchange, exchange]) == {"all-gather": 24, "all-to-all": 576}


def test_a_collective_in_a_loop_of_unknown_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="loop of unknown length"):
        read_collectives(LOOPED.replace("known_trip_count", "unknown"))


GPU = (
    HEADER
    + """
ENTRY %main (a: bf16[8,3], b: f32[4]) -> bf16[8,3] {
  %a = bf16[8,3]{1,0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %s1 = ((bf16[8,3]{1,0}), bf16[8,3]{1,0}) all-to-all-start(%a), replica_groups=mesh['x'=1,'y'=4] {'y'}, dimensions={0}
  %d1 = bf16[8,3]{1,0} all-to-all-done(%s1)
  %s2 = ((f32[4]{0}), f32[1]{0}) reduce-scatter-start(%b), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %d2 = f32[1]{0} reduce-scatter-done(%s2)
  %s3 = f32[4]{0} all-reduce-start(%b), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d3 = f32[4]{0} all-reduce-done(%s3)
}
"""
)


def test_started_collectives_of_a_gpu_count_once() -> None:
    """The result of a `-start` names its operands too: 24 numbers of bfloat16 are 48 bytes, and not 96."""
    assert [(c.kind, c.bytes) for c in read_collectives(GPU)] == [
        ("all-to-all", 48),
        ("reduce-scatter", 16),
        ("all-reduce", 16),
    ]

"""Counting the FLOPs, memory traffic and collectives of HLO modules written by hand."""

import pytest

from flip_jax.tools import hlo

LOOP = """HloModule test
%condition (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)S(1)} constant(24)
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[]{:S(1)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:S(1)} compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p.1), index=1
  %w = f32[8,8]{1,0:S(1)} constant({...})
  %y = f32[4,8]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i.1, %y)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[4,8]{1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_loops_count_once_per_iteration():
    module = hlo.Module(LOOP)
    assert module.flops()[0] == 24 * 2 * 4 * 8 * 8
    assert module.hbm_bytes() == 24 * 2 * (4 * 8 * 4)  # the weight is in on-chip memory, S(1)


IN_PLACE = """HloModule test
%fused (all: f32[24,8], i: s32[], one: f32[24,8]) -> f32[24,8] {
  %all = f32[24,8]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %one = f32[24,8]{1,0} parameter(2)
  %slice = f32[1,8]{1,0} dynamic-slice(%one, %i, %i), dynamic_slice_sizes={1,8}
  %update = f32[24,8]{1,0} dynamic-update-slice(%all, %slice, %i, %i)
  ROOT %t = (f32[24,8]{1,0}, f32[1,8]{1,0}) tuple(%update, %slice)
}

ENTRY %main (all: f32[24,8], i: s32[], one: f32[24,8]) -> f32[24,8] {
  %all = f32[24,8]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %one = f32[24,8]{1,0} parameter(2)
  ROOT %f = (f32[24,8]{1,0}, f32[1,8]{1,0}) fusion(%all, %i, %one), kind=kLoop, calls=%fused
}
"""


def test_stacked_layers_count_only_the_slices_read_and_written():
    assert hlo.Module(IN_PLACE).hbm_bytes() == 3 * 8 * 4  # the slice is read once and written twice


@pytest.mark.parametrize("precision, passes", [("", 1), (", operand_precision={highest,highest}", 6)])
def test_batched_products_as_tpus_write_them(precision, passes):
    text = (
        "ENTRY %main (a: bf16[1]) -> bf16[1] {\n"
        "  %a = bf16[256,99,16,64]{3,2,1,0} parameter(0)\n"
        "  %b = bf16[256,99,16,64]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = f32[256,16,99,99]{2,3,1,0:T(8,128)} convolution(%a, %b), "
        "window={size=256x16 stride=255x15 lhs_dilate=256x16}, dim_labels=0b1f_0o1i->01bf" + precision + "\n}\n"
    )
    flops, weighted = hlo.Module(text).flops()
    assert flops == 2 * 256 * 16 * 99 * 99 * 64
    assert weighted == passes * flops


@pytest.mark.parametrize(
    "text",
    [
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}",
        "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, use_global_device_ids=true",
        "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={1}",
        "source_target_pairs={{0,4},{1,5},{2,6},{3,7}}",
    ],
)
def test_groups_of_devices(text):
    assert sorted(map(sorted, hlo.groups(text, 8).tolist())) == [[0, 4], [1, 5], [2, 6], [3, 7]]


SLICED = """HloModule test
%fetch (all: f32[64,8]) -> f32[16,8] {
  %all = f32[64,8]{1,0} parameter(0)
  ROOT %part = f32[16,8]{1,0:S(1)} slice(%all), slice={[0:16], [0:8]}
}

ENTRY %main (a: f32[64,8]) -> f32[16,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %start = ((f32[64,8]{1,0}), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%fetch
  %done = f32[16,8]{1,0:S(1)} async-done(%start)
  ROOT %slice = f32[8,8]{1,0} slice(%a), slice={[8:16], [0:8]}
}
"""


def test_slices_count_only_the_bytes_they_move():
    # One is copied to on-chip memory, the other from and to main memory.
    assert hlo.Module(SLICED).hbm_bytes() == 16 * 8 * 4 + 2 * 8 * 8 * 4


NESTED = """HloModule test
%same (input: f32[64,8]) -> f32[64,8] {
  %input = f32[64,8]{1,0} parameter(0)
  ROOT %again = f32[64,8]{1,0:T(8,128)} copy(%input)
}

%turn (input: f32[64,8]) -> f32[64,8] {
  %input = f32[64,8]{1,0} parameter(0)
  ROOT %turned = f32[64,8]{0,1} custom-call(%input), custom_call_target="format"
}

%whole (a: f32[64,8], b: f32[8,16]) -> f32[64,16] {
  %a = f32[64,8]{1,0} parameter(0)
  %tiled = f32[64,8]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%same
  %b = f32[8,16]{1,0} parameter(1)
  ROOT %dot = f32[64,16]{1,0} dot(%tiled, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%row (a: f32[64,8], i: s32[]) -> f32[1,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %tiled = f32[64,8]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%same
  %i = s32[]{:S(6)} parameter(1)
  ROOT %part = f32[1,8]{1,0} dynamic-slice(%tiled, %i, %i), dynamic_slice_sizes={1,8}
}

ENTRY %main (a: f32[64,8], b: f32[8,16], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %product = f32[64,16]{1,0:S(1)} fusion(%a, %b), kind=kOutput, calls=%whole
  %first = f32[1,8]{1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%row
  %start = ((), (), (s32[8]{0:S(11)})) async-start(), async_execution_thread="sparsecore", calls=%turn
  %update = ((f32[64,8]{1,0}), f32[64,8]{0,1}, (s32[8]{0:S(11)})) async-update(%start, %a)
  ROOT %done = f32[64,8]{0,1} async-done(%update)
}
"""


def test_operands_in_another_layout_are_read_like_the_operands_themselves():
    # The product reads both operands, the slice one row; TPU7x's SparseCore reads and writes a whole array.
    assert hlo.Module(NESTED).hbm_bytes() == 4 * ((64 * 8 + 8 * 16) + 8 + 2 * 64 * 8)

"""Compiled programs read back: what runs how often, what it multiplies, moves and sends."""

import itertools

import pytest

from gemma.plan import flops, hlo, v5p
from gemma.plan.hlo_cost import Place, axes_of, bandwidth, cost, groups_of, pairs

LOOP = """HloModule jit_update, is_scheduled=true

%fused_product (param_0.1: bf16[512,256], param_1.1: bf16[23,256,128], param_2.1: s32[]) -> bf16[512,128] {
  %param_0.1 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[23,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.1 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,256,128]{2,1,0} dynamic-slice(%param_1.1, %param_2.1, %zero, %zero), dynamic_slice_sizes={1,256,128}
  %weight = bf16[256,128]{1,0} bitcast(%slice)
  ROOT %product = bf16[512,128]{1,0} convolution(%param_0.1, %weight), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[512,256], bf16[23,256,128], s32[])) -> (s32[], bf16[512,256], bf16[23,256,128], s32[]) {
  %arg = (s32[], bf16[512,256]{1,0}, bf16[23,256,128]{2,1,0}, /*index=3*/s32[]) parameter(0)
  %at = s32[] get-tuple-element(%arg), index=0
  %x = bf16[512,256]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[23,256,128]{2,1,0} get-tuple-element(%arg), index=2
  %last = s32[] get-tuple-element(%arg), index=3
  %y = bf16[512,128]{1,0} fusion(%x, %w, %at), calls=%fused_product, config={"estimated_cycles":"1750"}
  %sum = bf16[512,128]{1,0} all-reduce(%y), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%at, %one)
  ROOT %result = (s32[], bf16[512,256]{1,0}, bf16[23,256,128]{2,1,0}, /*index=3*/s32[]) tuple(%next, %x, %w, %last)
}

%condition (arg.1: (s32[], bf16[512,256], bf16[23,256,128], s32[])) -> pred[] {
  %arg.1 = (s32[], bf16[512,256]{1,0}, bf16[23,256,128]{2,1,0}, /*index=3*/s32[]) parameter(0)
  %at.1 = s32[] get-tuple-element(%arg.1), index=0
  %last.1 = s32[] get-tuple-element(%arg.1), index=3
  ROOT %less = pred[] compare(%at.1, %last.1), direction=LT
}

ENTRY %main (x.1: bf16[512,256], w.1: bf16[23,256,128]) -> bf16[512,256] {
  %x.1 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[23,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %from = s32[] constant(0)
  %to = s32[] constant(23)
  %to.copy = s32[] copy(%to)
  %start = (s32[], bf16[512,256]{1,0}, bf16[23,256,128]{2,1,0}, /*index=3*/s32[]) tuple(%from, %x.1, %w.1, %to.copy)
  %loop = (s32[], bf16[512,256]{1,0}, bf16[23,256,128]{2,1,0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[512,256]{1,0} get-tuple-element(%loop), index=1
}
"""
MESH = {"replica": 2, "fsdp": 2, "tensor": 2}
CUBE = [Place(0, (x, y, z)) for x, y, z in itertools.product(range(2), range(2), range(2))]


def test_a_loop_counts_as_often_as_it_runs() -> None:
    found = cost(hlo.parse(LOOP), MESH, CUBE)
    assert found.flops == 23 * 2 * 512 * 256 * 128
    assert found.cycles_s == pytest.approx(23 * 1750 / v5p.CLOCK_HZ, rel=0.01)  # the additions are next to nothing


def test_of_stacked_weights_a_step_reads_one_layer() -> None:
    product = 2 * (512 * 256 + 256 * 128 + 512 * 128)
    reduced = 2 * 2 * 512 * 128
    assert cost(hlo.parse(LOOP), MESH, CUBE).hbm_bytes == pytest.approx(23 * (product + reduced), rel=0.001)


def test_a_ring_of_two_sends_each_byte_of_a_sum_once() -> None:
    found = cost(hlo.parse(LOOP), MESH, CUBE)
    assert found.sent_bytes == {"tensor": {"all-reduce": 23 * 2 * 512 * 128}}
    one_link = v5p.ICI_BYTES_PER_S / 6
    assert found.network_s == pytest.approx(23 * 2 * 512 * 128 / one_link)


def test_a_loop_that_no_counter_ends_is_refused_by_name() -> None:
    endless = LOOP.replace("direction=LT", "direction=NE")
    with pytest.raises(hlo.HloError, match="loop"):
        cost(hlo.parse(endless), MESH, CUBE)


def test_a_text_without_an_entry_is_refused() -> None:
    with pytest.raises(hlo.HloError, match="ENTRY"):
        hlo.parse(LOOP.replace("ENTRY ", ""))


def test_between_slices_a_send_that_names_its_kind_is_the_collective() -> None:
    send = (
        "  %s = (bf16[512,256]{1,0}, u32[]{:S(2)}, token[]) send(%x.1, %token), channel_id=5, is_host_transfer=true,"
        ' frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = LOOP.replace("  %from =", f"{send}\n  %from =")
    slices = [Place(at // 4, place.coords) for at, place in enumerate(CUBE)]
    found = cost(hlo.parse(text), MESH, slices)
    assert found.sent_bytes["replica"] == {"all-reduce": 2 * 512 * 256}
    assert found.network_s > 2 * 512 * 256 / v5p.DCN_BYTES_PER_S


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("bf16[2,1,512]{2,1,0:T(8,128)(2,1)S(1)}", [("bf16", (2, 1, 512), 1, 2048)]),
        (
            "(f32[3]{0}, s8[4,2]{1,0}, /*index=2*/pred[])",
            [("f32", (3,), 0, 12), ("s8", (4, 2), 0, 8), ("pred", (), 0, 1)],
        ),
    ],
)
def test_shapes(text: str, want: list[tuple[str, tuple[int, ...], int, int]]) -> None:
    assert [(a.dtype, a.shape, a.space, a.bytes) for a in hlo.arrays(text)] == want


def test_attributes_keep_their_brackets_and_quotes() -> None:
    line = '  ROOT %a.1 = f32[2]{0} fusion(%b, /*index=1*/%c), kind=kLoop, calls=%d, metadata={op_name="x(,)" id=1}'
    i = hlo.instruction(line)
    assert (i.name, i.opcode, i.operands, i.root) == ("a.1", "fusion", ("b", "c"), True)
    assert i.attribute("calls") == "d"
    assert i.attribute("metadata") == '{op_name="x(,)" id=1}'
    assert i.attribute("kin") is None


@pytest.mark.parametrize(
    ("attribute", "group", "axes"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", [0, 2], "fsdp"),
        ("[4,2]<=[8]", [0, 1], "tensor"),
        ("[4,2]<=[2,2,2]T(2,1,0)", [0, 4], "replica"),
        ("[2,4]<=[2,4]T(0,1)", [0, 1, 2, 3], "fsdp+tensor"),
        ("[1,8]<=[8]", list(range(8)), "replica+fsdp+tensor"),
    ],
)
def test_groups_are_told_as_mesh_axes(attribute: str, group: list[int], axes: str) -> None:
    i = hlo.instruction(f"  %r = f32[8]{{0}} all-reduce(%x), replica_groups={attribute}, to_apply=%add")
    assert groups_of(i, 8) == group
    assert axes_of(group, MESH) == axes


@pytest.mark.parametrize(
    ("axes", "sides", "links"),
    [
        ((2,), (8, 8, 8), 2),
        ((1, 2), (8, 8, 8), 4),
        ((0, 1, 2), (8, 8, 8), 6),
        ((2,), (2, 2, 2), 1),
        ((2,), (2, 2, 4), 2),
    ],
)
def test_a_group_has_the_links_of_the_torus_axes_it_spans(
    axes: tuple[int, ...], sides: tuple[int, int, int], links: int
) -> None:
    everyone = [Place(0, at) for at in itertools.product(*(range(side) for side in sides))]
    group = [p for p in everyone if all(c == 0 for axis, c in enumerate(p.coords) if axis not in axes)]
    assert bandwidth(group, everyone) == links * v5p.ICI_BYTES_PER_S / 6


def test_between_slices_the_dcn_is_what_there_is() -> None:
    assert bandwidth([Place(0, (0, 0, 0)), Place(1, (0, 0, 0))], [Place(0, (3, 3, 3))]) == v5p.DCN_BYTES_PER_S


@pytest.mark.parametrize(
    ("size", "kernel", "out", "window", "want"),
    [
        (1, 1, 1, {}, 1),
        (8, 8, 1, {}, 8),  # contracted
        (1, 8, 8, {"pad": "7_7"}, 8),  # an outer product by padding: each output meets one element
        (5, 3, 3, {}, 9),
        (5, 3, 5, {"pad": "1_1"}, 13),
        (4, 4, 4, {"pad": "3_3", "lhs_dilate": "1", "stride": "1"}, 10),
    ],
)
def test_padding_is_no_work(size: int, kernel: int, out: int, window: dict[str, str], want: int) -> None:
    assert pairs(size, kernel, out, window) == want


@pytest.mark.parametrize("window", [None, 1, 5, 8, 9, 64])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 8), (8, 4)])
def test_a_kernel_visits_the_blocks_that_the_mask_leaves(queries: int, keys: int, window: int | None) -> None:
    T = 32
    seen = [(q, k) for q in range(T) for k in range(q + 1) if window is None or q - k < window]
    blocks = {(q // queries, k // keys) for q, k in seen}
    assert flops.block_pairs(T, queries, keys, window) == len(blocks) * queries * keys


def test_what_is_copied_to_vmem_ahead_counts_with_what_uses_it() -> None:
    """256 x 1024 x 1024 products take 0.0014 ms, the weight's 2 MB 0.0009 ms: the copy hides behind them."""
    text = """HloModule m
ENTRY %main (p0: bf16[256,1024], p1: bf16[1024,1024]) -> bf16[256,1024] {
  %p0 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[1024,1024]{1,0:S(1)}, bf16[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%p1)
  %copy-done = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %convolution = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} convolution(%p0, %copy-done), dim_labels=bf_io->bf
}
"""
    found = cost(hlo.parse(text), {"tensor": 1}, [Place(0, (0, 0, 0))])
    products_s, copy_s = 2 * 256 * 1024**2 / v5p.COMPILER_FLOPS, 2 * 1024**2 / v5p.COMPILER_BYTES_PER_S
    assert found.roofline_s == pytest.approx(products_s + copy_s)
    assert found.overlapped_s == pytest.approx(max(products_s, copy_s))
    assert found.hbm_bytes == 2 * 1024**2


BITCAST = """HloModule m
%bitcast_fusion (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  ROOT %bitcast = bf16[1024,1024]{1,0} bitcast(%p)
}
%fused (a: bf16[8,1024], b: bf16[1024,1024]) -> bf16[8,1024] {
  %a = bf16[8,1024]{1,0} parameter(0)
  %b = bf16[1024,1024]{1,0} parameter(1)
  %c = bf16[1024,1024]{1,0} fusion(%b), kind=kLoop, calls=%bitcast_fusion
  ROOT USER
}
ENTRY %main (p0: bf16[8,1024], p1: bf16[1024,1024]) -> bf16[8,1024] {
  %p0 = bf16[8,1024]{1,0:S(1)} parameter(0)
  %p1 = bf16[1024,1024]{1,0} parameter(1)
  ROOT %fusion = bf16[8,1024]{1,0:S(1)} fusion(%p0, %p1), kind=kOutput, calls=%fused
}
"""


@pytest.mark.parametrize(
    ("user", "rows"),
    [
        ("%convolution = bf16[8,1024]{1,0} convolution(%a, %c), dim_labels=bf_io->bf", 1024),
        ("%slice = bf16[8,1024]{1,0} slice(%c), slice={[0:8], [0:1024]}", 8),
        ("%moved = bf16[1024,1024]{1,0} bitcast(%c)", 1024),
    ],
)
def test_of_a_weight_behind_a_bitcast_what_is_used_is_read(user: str, rows: int) -> None:
    found = cost(hlo.parse(BITCAST.replace("USER", user)), {"tensor": 1}, [Place(0, (0, 0, 0))])
    assert found.hbm_bytes == 2 * 1024 * rows

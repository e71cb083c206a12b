"""The count of shared-memory wavefronts: the hardware's rule, PTX by hand with known conflicts, what is unknown."""

import numpy as np
import pytest

from charrnn_fast.bench import ptx, wavefronts
from charrnn_fast.bench.ptx_integers import compute

LANES = np.arange(32)
MASK = (1 << 32) - 1


def kernel(body: str, threads: int = 32) -> str:
    """A kernel of the shape in which compilers write them."""
    return f"""
.version 8.0
.extern .shared .align 16 .b8 memory[];
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u32 k_param_1
)
.reqntid {threads}
{{
\t.reg .pred %p<9>;
\tmov.u32 %lane, %tid.x;  // a comment with a brace {{
\tmov.b32 %base, memory;
{body}
\tret;
}}
"""


def totals(body: str, threads: int = 32, arguments=None) -> tuple[int, int, int]:
    """(wavefronts, least, unknown accesses) of a kernel without a loop."""
    found = wavefronts.count(kernel(body, threads), arguments)
    return found.loop.wavefronts, found.loop.least, len(found.unknown)


@pytest.mark.parametrize(
    ("addresses", "width", "expected"),
    [
        (LANES * 4, 4, (1, 1)),
        (LANES * 4 + 4, 4, (1, 1)),
        (LANES * 8, 4, (2, 1)),
        (LANES * 32 * 4, 4, (32, 1)),
        (LANES * 33 * 4, 4, (1, 1)),
        (LANES * 0, 4, (1, 1)),  # a broadcast
        (LANES // 2 * 128, 4, (16, 1)),
        (LANES * 2, 2, (1, 1)),
        (LANES, 1, (1, 1)),
        (LANES * 128, 1, (32, 1)),
        (LANES * 8, 8, (2, 2)),
        (LANES * 16, 8, (4, 2)),
        (LANES // 2 * 8, 8, (1, 1)),  # pairs of lanes agree, so both halves go together
        (LANES * 0, 8, (1, 1)),
        (LANES % 8 * 8, 8, (2, 1)),  # neighbours differ, so the halves stay apart
        (LANES * 16, 16, (4, 4)),
        (LANES * 32, 16, (8, 4)),
        (LANES * 512, 16, (32, 4)),  # eight ways in each quarter
        (LANES * 0, 16, (2, 2)),  # a broadcast: the halves always apart, as the counters of a GPU have it
        (LANES % 2 * 16, 16, (2, 2)),
        (LANES // 16 * 16, 16, (2, 2)),
        (LANES % 4 * 16, 16, (4, 2)),
    ],
)
def test_wavefronts_of_an_access(addresses, width, expected):
    assert wavefronts.access(addresses, width) == expected


def test_lanes_that_do_not_take_part_cost_nothing():
    assert wavefronts.access(LANES * 128, 4, LANES < 4) == (4, 1)
    assert wavefronts.access(LANES * 128, 4, LANES < 0) == (0, 0)
    assert wavefronts.access(LANES * 16, 16, LANES < 8) == (1, 1)


def test_an_access_of_impossible_width_is_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        wavefronts.access(LANES, 32)


def test_wavefronts_of_matrices_and_atomics():
    assert wavefronts.matrices(LANES * 16, 4) == (4, 4)
    assert wavefronts.matrices(LANES * 128, 4) == (32, 4)
    assert wavefronts.matrices(LANES * 144, 2) == (2, 2)
    everyone = np.ones(32, bool)
    assert wavefronts.atomic(LANES * 4, 4, everyone) == (1, 1)
    assert wavefronts.atomic(LANES * 0, 4, everyone) == (32, 1)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shl.b32 %a, %lane, 2; ld.shared.b32 %v, [%a];", (1, 1, 0)),
        ("shl.b32 %a, %lane, 7; ld.shared.b32 %v, [%a];", (32, 1, 0)),
        ("shl.b32 %a, %lane, 7; st.shared.b32 [%a+4], %v;", (32, 1, 0)),
        ("mul.lo.s32 %a, %lane, 132; ld.shared.b32 %v, [%a+-128];", (1, 1, 0)),
        ("shl.b32 %a, %lane, 4; ld.shared.v4.b32 {%v, %w, %x, %y}, [%a];", (4, 4, 0)),
        ("shl.b32 %a, %lane, 4; ld.shared.v2.b64 {%v, %w}, [%a];", (4, 4, 0)),
        ("shl.b32 %a, %lane, 9; ld.shared.v4.b32 {%v, %w, %x, %y}, [%a];", (32, 4, 0)),
        ("shl.b32 %a, %lane, 3; st.shared.v4.b16 [%a], {%v, %w, %x, %y};", (2, 2, 0)),
        ("add.s32 %a, %base, 64; ld.shared.v4.f32 {%v, %w, %x, %y}, [%a];", (2, 2, 0)),
        ("shl.b32 %a, %lane, 4; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%v, %w, %x, %y}, [%a];", (4, 4, 0)),
        ("shl.b32 %a, %lane, 7; stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%a], {%v, %w};", (16, 2, 0)),
        ("shl.b32 %a, %lane, 4; cp.async.cg.shared.global [ %a + 0 ], [ %rd + 0 ], 0x10;", (4, 4, 0)),
        ("shl.b32 %a, %lane, 7; cp.async.ca.shared.global [%a], [%rd], 4, %n;", (32, 1, 0)),
        ("atom.shared.add.u32 %v, [%base], 1;", (32, 1, 0)),
        ("cvt.u64.u32 %a, %lane; shl.b64 %b, %a, 5; ld.shared::cta.b32 %v, [%b];", (8, 1, 0)),
        ("cp.async.wait_group 0; bar.sync 0; ld.global.b32 %v, [%rd];", (0, 0, 0)),
        ("setp.lt.u32 %p1, %lane, 4; shl.b32 %a, %lane, 7; @%p1 ld.shared.b32 %v, [%a];", (4, 1, 0)),
        ("setp.lt.u32 %p1, %lane, 4; shl.b32 %a, %lane, 7; @!%p1 ld.shared.b32 %v, [%a];", (28, 1, 0)),
    ],
)
def test_wavefronts_of_ptx(instruction, expected):
    assert totals(instruction) == expected


def test_every_warp_counts():
    assert totals("shl.b32 %a, %lane, 7; ld.shared.b32 %v, [%a];", threads=128) == (128, 4, 0)
    # Four warps, the second half of which has a stride of two words.
    body = "setp.lt.u32 %p1, %lane, 64; selp.b32 %s, 2, 3, %p1; shl.b32 %a, %lane, %s; ld.shared.b32 %v, [%a];"
    assert totals(body, threads=128) == (1 + 1 + 2 + 2, 4, 0)


@pytest.mark.parametrize(
    "body",
    [
        "ld.shared.b32 %v, [%nowhere];",
        "ld.global.b32 %a, [%rd]; ld.shared.b32 %v, [%a];",
        "ld.shared.b32 %a, [%base]; and.b32 %b, %a, 124; ld.shared.b32 %v, [%b];",
        "frobnicate.b32 %a, %lane; ld.shared.b32 %v, [%a];",
        "mul.hi.u32 %a, %lane, 4; ld.shared.b32 %v, [%a];",
        "setp.lt.f32 %p1, %f, 0f00000000; @%p1 ld.shared.b32 %v, [%base];",
        "ld.global.b32 %f, [%rd]; setp.lt.s32 %p1, %f, 3; selp.b32 %a, 0, %lane, %p1; ld.shared.b32 %v, [%a];",
        "st.async.shared::cluster.b32 [%base], %v, [%bar];",
        "exchange.shared.b32 %v, [%base];",
    ],
)
def test_what_is_unknown_is_never_counted_as_free(body):
    *_, unknown = totals(body)
    assert unknown == 1


def test_an_access_that_no_way_leads_to_is_unknown():
    assert totals("bra $over; ld.shared.b32 %v, [%base]; $over: mov.u32 %a, 1;") == (0, 0, 1)


def test_both_ways_of_an_unknown_branch_are_gone():
    body = """
    ld.global.b32 %v, [%rd];
    setp.eq.s32 %p1, %v, 0;
    shl.b32 %a, %lane, 7;
    @%p1 bra $other;
    ld.shared.b32 %v, [%base];
    bra.uni $join;
$other:
    ld.shared.b32 %v, [%a];
$join:
    st.shared.b32 [%a], %v;
"""
    assert totals(body) == (64, 2, 0)  # the dearer of the two


def test_a_branch_by_a_table_goes_everywhere():
    body = """
    ld.global.b32 %v, [%rd];
    shl.b32 %a, %lane, 7;
    brx.idx %v, $table;
$table: .branchtargets $one, $two;
$one:
    ld.shared.b32 %v, [%base];
    bra.uni $join;
$two:
    ld.shared.b32 %v, [%a];
$join:
    mov.u32 %b, 1;
"""
    assert totals(body) == (32, 1, 0)


def test_threads_that_part_meet_again():
    body = """
    setp.lt.u32 %p1, %lane, 8;
    mov.u32 %s, 7;
    @%p1 bra $few;
    mov.u32 %s, 2;
$few:
    shl.b32 %a, %lane, %s;
    ld.shared.b32 %v, [%a];
"""
    assert totals(body) == (8, 1, 0)  # lanes 0 to 7 in bank 0, the others in the 24 banks from 8 on


LOOP = """
    mov.u32 %i, 0;
    shl.b32 %a, %lane, 7;
    st.shared.b32 [%a], %v;
$loop:
    and.b32 %s, %i, 1;
    shl.b32 %s, %s, 12;
    shl.b32 %b, %lane, 2;
    xor.b32 %b, %b, %s;
    ld.shared.b32 %v, [%b];
    {inner}
    add.s32 %i, %i, 1;
    setp.lt.s32 %p1, %i, %n;
    @%p1 bra $loop;
    st.shared.b32 [%a], %v;
    st.shared.b32 [%a], %v;
"""


@pytest.mark.parametrize("count", ["ld.param.b32 %n, [k_param_1];", "ld.global.b32 %n, [%rd];", "mov.u32 %n, 2;"])
def test_a_loop_is_counted_by_the_turn(count):
    found = wavefronts.count(kernel(count + LOOP.format(inner="st.shared.b32 [%a], %v;")))
    assert (found.loop.wavefronts, found.loop.least) == (33, 2)
    assert (found.once.wavefronts, found.once.least) == (96, 3)
    assert found.unknown == []


def test_inner_loops_run_as_often_as_they_do():
    inner = """
    mov.u32 %j, 0;
$inner:
    ld.shared.b32 %v, [%a];
    add.s32 %j, %j, 1;
    setp.ne.s32 %p2, %j, %m;
    @%p2 bra $inner;
"""
    text = kernel("ld.param.b32 %m, [k_param_1]; mov.u32 %n, 100;" + LOOP.format(inner=inner))
    assert wavefronts.count(text, {1: 5}).loop.wavefronts == 1 + 5 * 32


def test_a_loop_with_its_head_in_the_middle_is_found_whole():
    """Compilers move the entry of a loop behind parts of its body."""
    body = """
    shl.b32 %a, %lane, 7;
    mov.u32 %i, 0;
    bra.uni $head;
$part:
    ld.shared.b32 %v, [%a];
    bra.uni $latch;
$head:
    ld.shared.b32 %v, [%base];
    bra.uni $part;
$latch:
    add.s32 %i, %i, 1;
    setp.lt.s32 %p1, %i, 100;
    @%p1 bra $head;
"""
    assert wavefronts.count(kernel(body)).loop.wavefronts == 33


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("add.s32", (MASK, 2), 1),
        ("sub.u32", (1, 2), MASK),
        ("mad.lo.s32", (MASK, 5, 7), 2),
        ("mul.wide.s32", (MASK, 5), (1 << 64) - 5),
        ("mul.wide.u32", (MASK, 5), MASK * 5),
        ("mad.wide.s32", (MASK, 5, 7), 2),
        ("shl.b32", (3, 31), 1 << 31),
        ("shl.b32", (3, 40), 0),
        ("shr.u32", (MASK, 31), 1),
        ("shr.s32", (1 << 31, 31), MASK),
        ("shr.s32", (1 << 31, 99), MASK),
        ("div.s32", (MASK - 6, 2), MASK - 2),  # -7 / 2, rounded to zero
        ("rem.s32", (MASK - 6, 2), MASK),
        ("div.u32", (7, 2), 3),
        ("min.s32", (MASK, 1), MASK),
        ("max.u32", (MASK, 1), MASK),
        ("abs.s32", (MASK,), 1),
        ("neg.s32", (1,), MASK),
        ("not.b32", (0,), MASK),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfe.s32", (0xABCD, 4, 8), MASK - 0x43),
        ("bfe.s32", (1 << 31, 30, 8), MASK - 1),  # past the end the sign goes on
        ("bfe.s32", (MASK, 3, 0), 0),
        ("bfi.b32", (0xF, 0, 4, 4), 0xF0),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7410), 0x77441100),
        ("prmt.b32", (0x80, 0, 0x8888), MASK),  # the sign of a byte
        ("lop3.b32", (0b1100, 0b1010, 0b0110, 0x96), 0b0000),
        ("lop3.b32", (0b1100, 0b1010, 0, 0xC0), 0b1000),
        ("shf.l.wrap.b32", (0x80000000, 1, 33), 3),
        ("shf.r.clamp.b32", (0, 1, 32), 1),
        ("cvt.u64.u32", (MASK,), MASK),
        ("cvt.s64.s32", (MASK,), (1 << 64) - 1),
        ("cvt.u16.u32", (0x12345,), 0x2345),
        ("popc.b32", (0xF0F,), 8),
        ("brev.b32", (1,), 1 << 31),
    ],
)
def test_integer_instructions(name, operands, expected):
    values = [np.array([operand], np.uint64) for operand in operands]
    assert int(compute(tuple(name.split(".")), values)[0]) == expected


@pytest.mark.parametrize("name", ["add.f32", "cvt.rn.f32.s32", "cvt.rzi.s32.f32", "mul.hi.s32", "mystery.b32"])
def test_other_instructions_are_not_modelled(name):
    assert compute(tuple(name.split(".")), [np.array([1], np.uint64)] * 2) is None


def test_shuffles_move_addresses():
    body = "shl.b32 %a, %lane, 2; shfl.sync.idx.b32 %b, %a, 0, 31, -1; ld.shared.v4.b32 {%v, %w, %x, %y}, [%b];"
    assert totals(body, threads=64) == (4, 4, 0)
    moved = "shl.b32 %a, %lane, 2; shfl.sync.bfly.b32 %b, %a, 16, 31, -1; add.s32 %b, %b, %a; ld.shared.b32 %v, [%b];"
    assert totals(moved) == (1, 1, 0)


def test_arguments_by_their_place():
    body = "ld.param.b32 %s, [k_param_1]; mul.lo.s32 %a, %lane, %s; ld.shared.b32 %v, [%a];"
    assert totals(body, arguments={1: 8}) == (2, 1, 0)
    assert totals(body, arguments={1: 128}) == (32, 1, 0)


def test_a_text_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="no kernel"):
        ptx.Kernel(".version 8.0")

"""The count of shared-memory wavefronts, on accesses whose conflicts are known."""

import pytest

from bench.bank_conflicts import shared_accesses, wavefronts


@pytest.mark.parametrize(
    ("stride", "width", "expected"),
    [
        (4, 4, (1, 1)),
        (128, 4, (32, 1)),  # one column of 32 floats
        (132, 4, (1, 1)),  # padded by one
        (32, 4, (8, 1)),  # eight floats apart
        (0, 4, (1, 1)),  # the same word for all
        (2, 2, (1, 1)),
        (16, 16, (4, 4)),
        (8, 8, (2, 2)),
        (128, 16, (32, 4)),
    ],
)
def test_wavefronts_of_a_stride(stride, width, expected):
    assert wavefronts([lane * stride for lane in range(32)], width) == expected


def kernel(shift: int) -> str:
    return f"""
        mov.u32 %r1, %tid.x;
        and.b32 %r2, %r1, 31;
        shl.b32 %r3, %r2, {shift};
        mov.b32 %r4, global_smem;
        add.s32 %r5, %r4, %r3;
        @%p1 st.shared.b32 [ %r5 + 4 ], %r9;
        bar.sync 0;
        ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%r5+128];
    """


def test_addresses_follow_from_the_thread():
    assert shared_accesses(kernel(4)) == [("st", 4, 1), ("ld", 4, 4)]
    assert shared_accesses(kernel(7)) == [("st", 32, 1), ("ld", 32, 4)]
    assert shared_accesses(kernel(2))[0] == ("st", 1, 1)

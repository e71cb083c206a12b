"""The windows of a corpus that begin at given places, gathered time-major. Imports Triton alone.

    window[t, b] = corpus[starts[b] + t],    t = 0 .. T

Row t is time t, so a batch's tokens are the first T rows of the window and its targets the last T, both in the order
that the kernels of a recurrence walk. A program gathers BLOCK_B windows, BLOCK_T characters of each: the reads of one
window lie side by side, as do the writes of one step.
"""

import triton
import triton.language as tl

BLOCK_T, BLOCK_B, WARPS = 16, 64, 4  # derived: eight ids a thread, writes of 512 bytes


@triton.jit
def windows_kernel(
    # pointers
    corpus_ptr,  # (N,) ids of any integer type
    starts_ptr,  # (B,) int64, contiguous
    window_ptr,  # (T + 1, B) int64, contiguous
    # sizes
    N,
    B,
    rows,  # T + 1
    # meta-parameters
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    starts = tl.load(starts_ptr + offs_b, mask=offs_b < B, other=0)
    starts = tl.maximum(tl.minimum(starts, N - rows), 0)  # no place makes it read beyond the corpus
    mask = (offs_t < rows)[:, None] & (offs_b < B)[None, :]
    ids = tl.load(corpus_ptr + starts[None, :] + offs_t[:, None], mask=mask, other=0)
    places = offs_t.to(tl.int64)[:, None] * B + offs_b[None, :]
    tl.store(window_ptr + places, ids.to(tl.int64), mask=mask)

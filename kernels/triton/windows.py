"""Launcher of the gather of windows (windows_kernels.py has the kernel)."""

import torch

from .launch import start, target_of
from .targets import launch_options
from .windows_kernels import BLOCK_B, BLOCK_T, WARPS, windows_kernel


def windows(corpus: torch.Tensor, starts: torch.Tensor, rows: int) -> torch.Tensor:
    """The ids (rows, B) int64 that begin at places of a corpus, contiguous.

    corpus: (N,) ids of any integer type, contiguous. starts: (B,) int64, contiguous, taken as the nearest in 0..N-rows.
    """
    batch = len(starts)
    window = torch.empty((rows, batch), dtype=torch.int64, device=corpus.device)
    grid = (-(-batch // BLOCK_B), -(-rows // BLOCK_T), 1)
    options = launch_options(WARPS, target_of(corpus.device)[0])
    blocks = {"BLOCK_T": BLOCK_T, "BLOCK_B": BLOCK_B}
    start(windows_kernel, grid, corpus.device, corpus, starts, window, len(corpus), batch, rows, **blocks, **options)
    return window

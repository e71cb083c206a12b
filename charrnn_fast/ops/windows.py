"""A batch gathered from a corpus: the windows of T + 1 ids that begin at given places, in one operation.

tokens[t, b] = corpus[starts[b] + t],    targets[t, b] = corpus[starts[b] + t + 1]
"""

import torch
from torch import Tensor

from . import backends
from .context import addressable


def windows(corpus: Tensor, starts: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Token ids (T, B) int64 and the ids that follow them, (T, B) int64: two views of one gather.

    Args:
        corpus: (N,) ids of any integer type. starts: (B,) int64 on its device, each in 0..N-T-1: on a CPU another is an
            IndexError, on a GPU the nearest stands for it. num_steps: T.

    On a GPU one launch, in the order of memory (T, B); on a CPU (B, T).
    """
    rows = num_steps + 1
    if len(corpus) < rows:
        raise ValueError(f"a corpus of at least {rows} ids was expected for windows of {num_steps}, got {len(corpus)}")
    if _by_triton(corpus, starts):
        from charrnn_fast.kernels.triton import windows as kernels

        window = kernels.windows(corpus, starts, rows)
        return window[:-1], window[1:]
    window = corpus.unfold(0, rows, 1).index_select(0, starts)  # (B, T + 1)
    window = window if window.dtype == torch.int64 else window.long()
    return window[:, :-1].t(), window[:, 1:].t()


def _by_triton(corpus: Tensor, starts: Tensor) -> bool:
    if not len(starts) or not addressable(corpus, starts) or not (corpus.is_contiguous() and starts.is_contiguous()):
        return False
    return backends.choose("windows", corpus.device, corpus.dtype) == "triton"

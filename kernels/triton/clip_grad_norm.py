"""Launchers of the clipping kernels (clip_grad_norm_kernels.py has the algorithm).

    norm = sqrt(sum of g^2 over all tensors)      g <- min(1, max_norm / (norm + 1e-6)) g

One launch up to SMALL elements, two beyond. Nothing waits for the device. Everything is bitwise repeatable, and the
same on every device that rounds alike.
"""

import contextlib
import functools
import itertools
import math
import struct
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .clip_grad_norm_kernels import (
    BLOCK,
    KINDS,
    MAX_PROGRAMS,
    WARPS,
    clip_small_kernel,
    norm_kernel,
    scale_kernel,
    small_tile,
)
from .launch import target_of
from .targets import launch_options

_KIND = dict(zip((torch.float64, torch.float32, torch.float16, torch.bfloat16), range(len(KINDS)), strict=True))

# Elements that one program takes: two walks over 128 KB that the first brings into its cache. Beyond, a second launch
# costs less than the walk of one multiprocessor.
SMALL = 32768
# Tensors that go as pointer arguments: two pointers each make 1 KB of the 4 KB that every device takes for a launch.
MAX_ARGUMENTS = 64


def clip_limits(grads: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str | None:
    """None if the kernels take these gradients (and their parameters, for a step), else one clause saying why not."""
    if not any(g.numel() for g in grads):
        return "there are no elements"
    device = grads[0].device
    if any(g.device != device or g.layout != torch.strided or g.dtype not in _KIND for g in grads):
        return "not all gradients are dense floating-point tensors on one device"
    if not all(map(_side_by_side, grads)):
        return "the elements of a gradient do not lie side by side"
    for p, g in zip(params or (), grads, strict=params is not None):
        if p.device != device or p.dtype != g.dtype or p.shape != g.shape or p.stride() != g.stride():
            return "a parameter is not laid out like its gradient"
    if _share_memory(grads if params is None else params):
        return "tensors share memory"
    if len(grads) > MAX_ARGUMENTS and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a captured graph would read the table of tensors again from host memory that nobody keeps"
    return None


def _side_by_side(tensor: Tensor) -> bool:
    """Whether the tensor is contiguous but for the order of its dimensions."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


def _bits(x: float) -> int:
    """The 64 bits of a double as a signed integer."""
    return struct.unpack("q", struct.pack("d", x))[0]


def _table(grads: Sequence[Tensor], params: Sequence[Tensor] | None, firsts: Sequence[int]) -> Tensor:
    """(chunks, COLUMNS) int64 on the host: addresses of gradients and parameters, number of elements, kind."""
    zeros = [0] * len(grads)
    columns = (
        [g.data_ptr() for g in grads],
        zeros if params is None else [p.data_ptr() for p in params],
        [g.numel() for g in grads],
        [_KIND[g.dtype] for g in grads],
        [g.element_size() for g in grads],
        firsts,
    )
    rows = torch.tensor(columns, dtype=torch.int64, device="cpu")  # (6, N)
    chunks = -(-rows[2] // BLOCK)
    rows = rows.repeat_interleave(chunks, 1)  # (6, chunks)
    start = (torch.arange(rows.shape[1], dtype=torch.int64, device="cpu") - rows[5]) * BLOCK
    param = rows[1] if params is None else rows[1] + start * rows[4]
    count = (rows[2] - start).clamp(max=BLOCK)
    return torch.stack((rows[0] + start * rows[4], param, count, rows[3]), 1)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, which PyTorch keeps until the copy is done: the host does not wait."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    """What torch.nn.utils.clip_grad_norm_ returns: the norms of all tensors promoted together."""
    return functools.reduce(torch.promote_types, {g.dtype for g in grads})


def _launch(
    grads: Sequence[Tensor], params: Sequence[Tensor] | None, max_norm: float | None, lr: float | Tensor
) -> Tensor:
    device = grads[0].device
    norm = torch.empty((), dtype=_norm_dtype(grads), device=device)
    kept = [i for i, g in enumerate(grads) if g.numel()]
    grads = tuple(grads[i] for i in kept)
    params = None if params is None else tuple(params[i] for i in kept)
    numels = tuple(g.numel() for g in grads)
    scalars = (_bits(math.inf if max_norm is None else float(max_norm)), _bits(0.0 if isinstance(lr, Tensor) else lr))
    lr_ptr = lr if isinstance(lr, Tensor) else None
    constants = {"CLIP": max_norm is not None, "STEP": params is not None}
    target, _ = target_of(device)
    double = any(g.dtype == torch.float64 for g in grads)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if sum(numels) <= SMALL and len(grads) <= MAX_ARGUMENTS:
            block, warps = small_tile(sum(numels))
            clip_small_kernel[(1,)](
                grads,
                params or (),
                norm,
                lr_ptr,
                *scalars,
                NUMELS=numels,
                BLOCK=block,
                DOUBLE=double,
                **constants,
                **launch_options(warps, target, all_registers=False),
            )
            return norm
        *firsts, chunks = itertools.accumulate((triton.cdiv(n, BLOCK) for n in numels), initial=0)
        programs = min(chunks, MAX_PROGRAMS)
        partial = torch.empty(programs, dtype=torch.float64, device=device)
        plain = len(grads) <= MAX_ARGUMENTS
        table = None if plain else _to_device(_table(grads, params, firsts), device)
        options = launch_options(WARPS, target, all_registers=False)
        written = grads if params is None else (*grads, *params)
        layout = {
            "NUMELS": numels if plain else (),
            "FIRSTS": tuple(firsts) if plain else (),
            "KIND_OF": tuple(_KIND[g.dtype] for g in grads) if plain else (),
            "PRESENT": tuple(sorted({_KIND[g.dtype] for g in grads})),
            "BLOCK": BLOCK,
            "ALIGNED": all(t.data_ptr() % 16 == 0 for t in written),
        }
        norm_kernel[(programs,)](
            grads if plain else (),
            table,
            partial,
            chunks,
            **layout,
            DOUBLE=double,
            **options,
        )
        scale_kernel[(programs,)](
            grads if plain else (),
            (params or ()) if plain else (),
            table,
            partial,
            norm,
            lr_ptr,
            chunks,
            *scalars,
            **layout,
            BLOCK_P=triton.next_power_of_2(programs),
            **constants,
            **options,
        )
    return norm


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale all tensors in place by min(1, max_norm / (norm + 1e-6)); returns the L2 norm of all together, a scalar.

    The tensors must satisfy clip_limits. The norm has the dtype that all of theirs promote to.
    """
    return _launch(grads, None, max_norm, 0.0)


def clip_and_sgd_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], max_norm: float | None, lr: float | Tensor
) -> Tensor:
    """p -= lr * min(1, max_norm / (norm + 1e-6)) * g for every pair; returns the L2 norm of the gradients, a scalar.

    The gradients stay as they were. max_norm None leaves out the scale. lr: a number, or a scalar tensor on the
    device, which is read when the kernel runs. The tensors must satisfy clip_limits.
    """
    return _launch(grads, params, max_norm, lr)

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

from .. import tensors
from ..tensors import Survey
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

# Elements that one program takes: two walks over 128 KB that the first brings into its cache. Beyond, a second launch
# costs less than the walk of one multiprocessor.
SMALL = 32768
# Tensors that go as pointer arguments: two pointers each make 1 KB of the 4 KB that every device takes for a launch.
MAX_ARGUMENTS = 64
# Tables of more tensors that stay on their device, for while the tensors stay where they are: 4 KB for 128 chunks.
MAX_TABLES = 8


def clip_limits(
    grads: Sequence[Tensor], params: Sequence[Tensor] | None = None, found: Survey | None = None
) -> str | None:
    """None if the kernels take these gradients (and their parameters, for a step), else one clause saying why not.

    found: the survey of the gradients and parameters.
    """
    found = found or tensors.survey(list(grads), None if params is None else list(params))
    if found is not None and not found.elements:
        return "there are no elements"
    if found is None or not found.one_device or not found.floats:
        return "not all tensors are dense floats, the gradients on one device"
    if not found.side_by_side:
        return "the elements of a gradient do not lie side by side"
    if params is not None and not found.alike:
        return "a parameter is not laid out like its gradient"
    if not found.apart:
        return "tensors share memory"
    if found.count > MAX_ARGUMENTS and grads[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a captured graph would read the table of tensors again from host memory that nobody keeps"
    return None


def _bits(x: float) -> int:
    """The 64 bits of a double as a signed integer."""
    return struct.unpack("q", struct.pack("d", x))[0]


def _table(table: bytes, count: int) -> Tensor:
    """(chunks, COLUMNS) int64 on the host: addresses of gradients and parameters, number of elements, kind."""
    rows = torch.frombuffer(bytearray(table), dtype=torch.int64).view(4, count)  # as in a survey
    sizes = torch.tensor([dtype.itemsize for dtype in tensors.KINDS], dtype=torch.int64, device="cpu")[rows[2]]
    chunks = -(-rows[1] // BLOCK)
    firsts = chunks.cumsum(0) - chunks
    grads, numels, kinds, params, sizes, firsts = torch.stack((*rows, sizes, firsts)).repeat_interleave(chunks, 1)
    start = (torch.arange(len(grads), dtype=torch.int64, device="cpu") - firsts) * BLOCK
    params = torch.where(params == 0, 0, params + start * sizes)
    return torch.stack((grads + start * sizes, params, (numels - start).clamp(max=BLOCK), kinds), 1)


@functools.lru_cache(MAX_TABLES)
def _kept_table(table: bytes, count: int, device: torch.device, stream: int) -> Tensor:
    """The table of these tensors on the device: made and copied once for as long as they stay where they are.

    Through pinned memory, which PyTorch keeps until the copy is done: the host does not wait. stream: the one that
    copies and reads it.
    """
    found = _table(table, count)
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def _norm_dtype(found: Survey) -> torch.dtype:
    """What torch.nn.utils.clip_grad_norm_ returns: the norms of all tensors promoted together."""
    return functools.reduce(torch.promote_types, found.dtypes)


def _launch(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    max_norm: float | None,
    lr: float | Tensor,
    found: Survey | None,
) -> Tensor:
    device = grads[0].device
    found = found or tensors.survey(list(grads), None if params is None else list(params))
    if found is None:
        raise ValueError(f"clip: {clip_limits(grads, params)}")
    norm = torch.empty((), dtype=_norm_dtype(found), device=device)
    scalars = (_bits(math.inf if max_norm is None else float(max_norm)), _bits(0.0 if isinstance(lr, Tensor) else lr))
    lr_ptr = lr if isinstance(lr, Tensor) else None
    constants = {"CLIP": max_norm is not None, "STEP": params is not None}
    target, _ = target_of(device)
    double = torch.float64 in found.dtypes
    plain = found.count <= MAX_ARGUMENTS
    kept = [i for i, numel in enumerate(found.column(1)) if numel] if plain else []
    as_arguments = tuple([grads[i] for i in kept])
    numels, kinds = (tuple([found.column(row)[i] for i in kept]) for row in (1, 2))
    written = () if params is None else tuple([params[i] for i in kept])
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if plain and found.elements <= SMALL:
            block, warps = small_tile(found.elements)
            clip_small_kernel[(1,)](
                as_arguments,
                written,
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
        table = None
        if not plain:
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            table = _kept_table(found.table.tobytes(), found.count, device, stream)
            chunks = len(table)
        programs = min(chunks, MAX_PROGRAMS)
        partial = torch.empty(programs, dtype=torch.float64, device=device)
        options = launch_options(WARPS, target, all_registers=False)
        layout = {
            "NUMELS": numels,
            "FIRSTS": tuple(firsts),
            "KIND_OF": kinds,
            "PRESENT": tuple([kind for kind in range(len(KINDS)) if found.kinds >> kind & 1]),
            "BLOCK": BLOCK,
            "ALIGNED": found.aligned,
        }
        norm_kernel[(programs,)](
            as_arguments,
            table,
            partial,
            chunks,
            **layout,
            DOUBLE=double,
            **options,
        )
        scale_kernel[(programs,)](
            as_arguments,
            written,
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


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float, found: Survey | None = None) -> Tensor:
    """Scale all tensors in place by min(1, max_norm / (norm + 1e-6)); returns the L2 norm of all together, a scalar.

    The tensors must satisfy clip_limits. The norm has the dtype that all of theirs promote to. found: their survey.
    """
    return _launch(grads, None, max_norm, 0.0, found)


def clip_and_sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    max_norm: float | None,
    lr: float | Tensor,
    found: Survey | None = None,
) -> Tensor:
    """p -= lr * min(1, max_norm / (norm + 1e-6)) * g for every pair; returns the L2 norm of the gradients, a scalar.

    The gradients stay as they were. max_norm None leaves out the scale. lr: a number, or a scalar tensor on the
    device, which is read when the kernel runs. The tensors must satisfy clip_limits. found: the gradients' survey, with
    the parameters as the others.
    """
    return _launch(grads, params, max_norm, lr, found)

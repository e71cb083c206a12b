"""Launcher of the C kernel that clips by the global norm (clip_grad_norm.c has the algorithm)."""

import functools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import KINDS, Survey, survey
from . import library
from .memory import COMPUTE, array_of


def clip_limits(grads: Sequence[Tensor], found: Survey | None = None) -> str | None:
    """None if clip_grad_norm_ can run on these tensors, else one clause saying why not. found: their survey."""
    if library.missing:
        return library.missing
    if not grads:
        return None
    found = found or survey(list(grads))
    if found is None or not (found.one_device and grads[0].is_cpu):
        return "not all gradients are dense tensors on the CPU"
    if not found.floats:
        return "not all gradients are of float32, float64, bfloat16 or float16"
    return None if found.side_by_side else "the elements of a gradient do not lie side by side"


def clips_in_place(found: Survey) -> bool:
    """Whether clip_grad_norm_ reads and writes the tensors as they are: of one type, float32 or float64."""
    return found.kinds in (1 << KINDS.index(torch.float32), 1 << KINDS.index(torch.float64))


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float, found: Survey | None = None) -> Tensor:
    """Scale all tensors in place by min(1, max_norm / (norm + 1e-6)); returns the L2 norm of all together, a scalar.

    The tensors must satisfy clip_limits. Of several types, or 16-bit, they are copied to the wider one, float32 at
    least, and back. The norm has the type that all of theirs promote to. found: their survey.
    """
    if not grads:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    found = found or survey(list(grads))
    if (why := clip_limits(grads, found)) is not None or found is None:
        raise ValueError(f"clip_grad_norm_: {why}")
    dtype = grads[0].dtype
    if not clips_in_place(found):
        dtype = functools.reduce(torch.promote_types, found.dtypes)
        wide = [g.to(torch.promote_types(dtype, torch.float32), copy=True) for g in grads]
        norm = clip_grad_norm_(wide, max_norm)
        narrow = norm.to(dtype)
        if narrow.isinf() and norm.isfinite():  # torch scales by the norm as it is in the gradients' type
            torch._foreach_mul_(list(grads), torch.clamp(max_norm / (narrow + 1e-6), max=1.0))
            return narrow
        for g, w in zip(grads, wide, strict=True):
            g.copy_(w)
        return narrow
    address, size = found.table.buffer_info()[0], 8 * found.count
    limit, result = array("d", [max_norm]), array("d", [0.0])
    library.extension.clip(
        *(library.isa_number(), COMPUTE[dtype], found.count, torch.get_num_threads()),
        *(address, size, address + size, size, *array_of(limit), *array_of(result)),
    )
    return torch.tensor(result[0], dtype=dtype, device="cpu")

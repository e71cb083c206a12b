"""How tensors are told to C: addresses, the bytes that follow them, and strides. Nothing here knows an operation."""

from array import array
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

COMPUTE = {torch.float32: 0, torch.float64: 1}  # the types that C computes in, by its number for them


@overload
def computed(tensor: Tensor) -> Tensor: ...
@overload
def computed(tensor: Tensor | None) -> Tensor | None: ...
def computed(tensor: Tensor | None) -> Tensor | None:
    """The tensor in the type that the kernels compute in, its last stride 1."""
    if tensor is None:
        return None
    if tensor.is_neg():  # a view whose memory holds the numbers of the other sign
        tensor = tensor.resolve_neg()
    if tensor.dtype not in COMPUTE:
        tensor = tensor.float()
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def require_one_type(*tensors: Tensor | None) -> None:
    """C is told one type and reads all floating-point memory as it: ValueError where a tensor has another."""
    first = None
    for tensor in tensors:
        if tensor is None:
            continue
        if first is None:
            first = tensor.dtype
        elif tensor.dtype != first:
            dtypes = {t.dtype for t in tensors if t is not None}
            raise ValueError(f"expected tensors of one type, got {' and '.join(sorted(map(str, dtypes)))}")


def buffer_of(tensor: Tensor | None) -> tuple[int, int]:
    """Address, and the bytes from there to the end of its memory: what C checks sizes and strides against."""
    if tensor is None:
        return 0, 0
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.nbytes
    return tensor.data_ptr(), tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * tensor.itemsize


def buffers_of(tensors: Sequence[Tensor | None]) -> list[tuple[int, int]]:
    """`buffer_of` each, by one call."""
    found = []
    for t in tensors:
        found.append((0, 0) if t is None else (t.data_ptr(), t.nbytes) if t.is_contiguous() else buffer_of(t))
    return found


def array_of(values: array) -> tuple[int, int]:
    """Address and bytes of an array."""
    address, length = values.buffer_info()
    return address, length * values.itemsize


def rows_of(tensor: Tensor) -> tuple[int, int, int]:
    """Buffer and stride of the rows of a matrix."""
    return *buffer_of(tensor), tensor.stride(0)

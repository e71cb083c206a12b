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
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        raise ValueError(f"expected tensors of one type, got {' and '.join(sorted(map(str, dtypes)))}")


def buffer_of(tensor: Tensor | None) -> tuple[int, int]:
    """Address, and the bytes from there to the end of its memory: what C checks sizes and strides against."""
    if tensor is None:
        return 0, 0
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.nbytes
    return tensor.data_ptr(), tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * tensor.itemsize


def buffers_of(tensors: Sequence[Tensor | None]) -> tuple[int, int, int, int]:
    """The addresses and then the sizes of one or two tensors."""
    first, second = buffer_of(tensors[0]), buffer_of(tensors[1] if len(tensors) > 1 else None)
    return first[0], second[0], first[1], second[1]


def array_of(values: array) -> tuple[int, int]:
    """Address and bytes of an array."""
    address, length = values.buffer_info()
    return address, length * values.itemsize


def sequence_of(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Buffer and strides (t, b) of a sequence (T, B, C), or packed (N, C)."""
    if tensor is None:
        return 0, 0, 0, 0
    strides = tensor.stride()
    return *buffer_of(tensor), (strides[0] if tensor.dim() == 3 else 0), strides[-2]


def states_of(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Buffer and strides (d, b) of states (D, B, H)."""
    return (0, 0, 0, 0) if tensor is None else (*buffer_of(tensor), tensor.stride(0), tensor.stride(1))


def rows_of(tensor: Tensor) -> tuple[int, int, int]:
    """Buffer and stride of the rows of a matrix."""
    return *buffer_of(tensor), tensor.stride(0)


def pair_of(values: Sequence[int]) -> tuple[int, int]:
    return values[0], (values[1] if len(values) > 1 else 0)

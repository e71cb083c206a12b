"""What many tensors are, in one call: their addresses and sizes, and whether a kernel may take them as they lie.

The C extension asks through the table of functions that PyTorch has for exchanging tensors by DLPack, a tenth of a
microsecond a tensor; without the extension, or where PyTorch has no such table, Python asks each tensor.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .native import library

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # by their numbers in a survey's table
_OTHER_KIND = len(KINDS)
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)


@dataclass(slots=True)
class Survey:
    """What is true of some tensors, and perhaps of as many others. One without elements is contiguous and apart."""

    count: int
    elements: int  # of all tensors together
    table: array  # (4, count) int64: addresses, numbers of elements, kinds, the addresses of the others or 0
    one_device: bool
    kinds: int  # bit k: one of them is of KINDS[k]; bit 4: of another type
    contiguous: bool
    side_by_side: bool  # contiguous but for the order of their dimensions
    apart: bool  # no two share memory, of the others or, without others, of the tensors
    aligned: bool  # the addresses, also of the others, of those with elements are multiples of 16
    alike: bool  # each has the type, device, shape and strides of its other

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those of KINDS that there are."""
        return [dtype for kind, dtype in enumerate(KINDS) if self.kinds >> kind & 1]

    @property
    def floats(self) -> bool:
        """Are all types among KINDS?"""
        return self.kinds < 1 << _OTHER_KIND

    def column(self, index: int) -> array:
        return self.table[index * self.count : (index + 1) * self.count]


def strided(*tensors: Tensor) -> bool:
    """Have all of them addresses, of elements at strides?"""
    return all(x.layout == torch.strided and x.device.type != "meta" for x in tensors)


def survey(
    tensors: list[Tensor], others: list[Tensor] | None = None, plain: Callable[..., bool] = strided
) -> Survey | None:
    """None if one of them is no plain memory, or an inference tensor.

    Complex tensors, which no kernel takes, are not asked if they are conjugate views.
    others: as many, each to be compared with its tensor. plain: says of tensors whether all are plain strided memory,
    where Python has to ask.
    """
    if others is not None and len(others) != len(tensors):
        raise ValueError(f"expected as many others as tensors, got {len(others)} and {len(tensors)}")
    count = len(tensors)
    table = array("q", bytes(32 * count))
    if library.missing is None and _EXCHANGE is not None:
        address, length = table.buffer_info()
        asked = ((Tensor, nn.Parameter), _REFUSED, _EXCHANGE, address, 8 * length)
        found = library.extension.survey(tensors, others, *asked)
    else:
        found = _by_python(tensors, others, plain, table)
    if found is None:
        return None
    bits, elements = found
    one_device, contiguous, side_by_side, apart, aligned, alike = [bits & 1 << bit != 0 for bit in range(6)]
    return Survey(count, elements, table, one_device, bits >> 8, contiguous, side_by_side, apart, aligned, alike)


_REFUSED = (Tensor.is_neg, Tensor.is_inference)


def _by_python(
    tensors: Sequence[Tensor], others: Sequence[Tensor] | None, plain: Callable[..., bool], table: array
) -> tuple[int, int] | None:
    """What tensors.c finds."""
    every = [*tensors, *(others or ())]
    if not plain(*every) or any(x.is_inference() for x in every):
        return None
    count, kinds = len(tensors), [_kind(x) for x in tensors]
    table[:count] = array("q", [x.data_ptr() for x in tensors])
    table[count : 2 * count] = array("q", [x.numel() for x in tensors])
    table[2 * count : 3 * count] = array("q", kinds)
    if others is not None:
        table[3 * count :] = array("q", [x.data_ptr() for x in others])
    answers = (
        len({x.device for x in tensors}) < 2,
        all(x.is_contiguous() for x in tensors),
        all(map(_side_by_side, tensors)),
        _apart(tensors if others is None else others),
        all(x.data_ptr() % 16 == 0 for x in every if x.numel()),
        others is not None and all(map(_same_layout, tensors, others)),
    )
    bits = sum(answer << bit for bit, answer in enumerate(answers)) | sum(1 << kind for kind in set(kinds)) << 8
    return bits, sum(x.numel() for x in tensors)


def _kind(tensor: Tensor) -> int:
    return KINDS.index(tensor.dtype) if tensor.dtype in KINDS else _OTHER_KIND


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype, a.shape, a.stride()) == (b.device, b.dtype, b.shape, b.stride())


def _side_by_side(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _apart(tensors: Sequence[Tensor]) -> bool:
    end = 0
    for start, size in sorted((x.data_ptr(), x.nbytes) for x in tensors if x.numel()):
        if start < end:
            return False
        end = start + size
    return True

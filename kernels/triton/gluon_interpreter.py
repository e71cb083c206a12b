"""Gluon where a kernel is compiled, and a stand-in for it where TRITON_INTERPRET=1 has Triton interpret its kernels.

Gluon (triton.experimental.gluon) has no interpreter. A kernel written for `gl`, `jit` and `mma_v2` of this module runs
in Triton's: there `jit` is triton.jit, what a kernel calls (`device_function`) stays plain Python, and `gl` has each
operation as triton.language's, called with the same arguments but for the layout, which says where values lie on a GPU
and nothing about what they are. Shared memory is an array, its
views are the array's, and it starts as NaN, so that reading before storing shows. Programs run one after another and
each as one thread, so there is nothing for a barrier to do. Only what the kernels use is here; add to it as needed.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from . import numerics
from .numerics import INTERPRETED, dot

if TYPE_CHECKING:
    import numpy as np  # which need not be there where kernels are compiled

__all__ = ["HAS_REINTERPRET", "barrier", "device_function", "gl", "jit", "mma_v2"]


class SharedMemory:
    """What allocate_shared_memory returns: an array, or a view of one, that tensors are stored to and loaded from."""

    def __init__(self, array: np.ndarray, dtype: tl.dtype) -> None:
        self.array, self.dtype, self.layout = array, dtype, None

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def store(self, value: tl.tensor) -> None:
        if list(value.shape) != self.shape or value.dtype != self.dtype:
            raise ValueError(f"{value.dtype} {list(value.shape)} stored to {self.dtype} {self.shape}")
        self.array[...] = value.handle.data

    def load(self, layout=None) -> tl.tensor:
        from triton.runtime.interpreter import TensorHandle

        return tl.tensor(TensorHandle(self.array.copy(), self.dtype), tl.block_type(self.dtype, self.shape))

    def reinterpret(self, dtype: tl.dtype, shape: list[int], layout=None) -> SharedMemory:
        if dtype != self.dtype:
            raise ValueError(f"{self.dtype} reinterpreted as {dtype}")
        return SharedMemory(self.array.reshape([int(size) for size in shape]), dtype)

    def index(self, index: int) -> SharedMemory:
        return SharedMemory(self.array[int(index)], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise ValueError(f"{start}:{start + length} is not within {self.shape[dim]}")
        where = [slice(None)] * self.array.ndim
        where[dim] = slice(start, start + length)
        return SharedMemory(self.array[tuple(where)], self.dtype)


def _allocate_shared_memory(dtype: tl.dtype, shape: list[int], layout=None) -> SharedMemory:
    import numpy as np
    from triton.runtime.interpreter import _get_np_dtype

    array = np.empty([int(size) for size in shape], _get_np_dtype(dtype))
    array.view(np.uint8).fill(0xFF)
    return SharedMemory(array, dtype)


def _layout(*arguments, **options) -> None:
    """Any layout: the interpreter has no use for it."""


def _reduced(operation: str) -> Callable[[tl.tensor, int], tl.tensor]:
    """`sum` or `max` along an axis; a scalar where that is the only one."""

    def reduce(value: tl.tensor, axis: int) -> tl.tensor:
        import numpy as np
        from triton.runtime.interpreter import TensorHandle

        found = np.atleast_1d(getattr(value.handle.data, operation)(axis=axis))
        found = found.astype(value.handle.data.dtype, copy=False)  # numpy widens sums of integers
        rank = len(value.shape)
        kind = tl.block_type(value.dtype, list(found.shape)) if rank > 1 else value.dtype
        return tl.tensor(TensorHandle(found, value.dtype), kind)

    return reduce


def _mma_v2(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    return dot(a, b, acc, "ieee")


def _stand_in() -> types.SimpleNamespace:
    layouts = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "SwizzledSharedLayout")
    same = ("constexpr", "float16", "bfloat16", "float32", "float64", "int1", "int32", "int64")
    # The interpreter replaces these while a kernel runs, so they are looked up at each call.
    called = "load store where program_id num_programs expand_dims cast permute atomic_add"
    called += " exp exp2 log abs fma minimum maximum"

    def late(name):
        return lambda *arguments, **options: getattr(tl, name)(*arguments, **options)

    return types.SimpleNamespace(
        **dict.fromkeys(layouts, _layout),
        **{name: getattr(tl, name) for name in same},
        **{name: late(name) for name in called.split()},
        arange=lambda start, end, layout=None: tl.arange(start, end),
        sum=_reduced("sum"),
        max=_reduced("max"),
        zeros=lambda shape, dtype, layout=None: tl.full(shape, 0, dtype),
        full=lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype),
        convert_layout=lambda value, layout: value,
        allocate_shared_memory=_allocate_shared_memory,
        static_range=range,
    )


if not INTERPRETED:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2

    device_function = jit
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before 3.7
    HAS_REINTERPRET = tl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # else under another name
else:
    gl, jit, mma_v2, device_function = _stand_in(), triton.jit, _mma_v2, numerics.device_function
    HAS_REINTERPRET = tl.constexpr(True)

    def barrier() -> None:
        """Nothing to wait for: a program is one thread."""

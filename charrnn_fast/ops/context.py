"""What surrounds a call: who follows its operations, and whether its tensors are plain memory.

A kernel reads addresses. So it may run only on tensors that are nothing but strided memory, and only where nobody wants
to see PyTorch's operators go by: `addressable` says both. Everywhere else PyTorch's own operators run, with its results
and its errors; or the kernels as registered operators, where a compiler or a tracer takes those.
"""

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .compiling import constant_to_compilers

# What torch's dispatcher knows of a plain tensor of a device with kernels: no more than these. Others say that it is
# sparse, nested, a subclass in Python, a negative view, ...
_PLAIN_KEYS = ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView")
_OTHER_KEYS = ~functools.reduce(
    operator.or_, (_C.DispatchKeySet(getattr(_C.DispatchKey, key)).raw_repr() for key in _PLAIN_KEYS)
)
_INPLACE_KEY = _C.DispatchKeySet(_C.DispatchKey.ADInplaceOrView).raw_repr()  # inference tensors lack it


OPERATORS = "PyTorch's own operators"
REGISTERED = "registered operators"


def watched() -> str | None:
    """What eager code may run here, asked once a call: None for anything, kernels too; OPERATORS where it must stay
    within PyTorch's own, as :func:`tensor_operations_only` says, else REGISTERED, as :func:`registered_operators_only`.
    """
    if torch.compiler.is_compiling():
        return REGISTERED
    modes = _C._len_torch_dispatch_stack()
    if not (
        modes
        or _C._get_tracing_state()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_function_stack()
        or forward_ad._current_level >= 0
    ):
        return None
    if tensor_operations_only():
        return OPERATORS
    return REGISTERED if modes else None


def addressable(*tensors: Tensor | None) -> bool:
    """May a kernel be given the addresses of these tensors, here and now? Every operation asks before it takes one."""
    return watched() is None and in_plain_memory(tensors)


def plain(*tensors: Tensor | None) -> bool:
    """As :func:`in_plain_memory`; to a compiler, whose tensors are stand-ins for such memory, all are."""
    return torch.compiler.is_compiling() or in_plain_memory(tensors)


def in_plain_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Is every tensor that is there nothing but strided memory: exactly a Tensor or a Parameter, bytes as they are?

    It is not if it is a subclass (fake and distributed tensors are), sparse, nested, quantized, a torch.func wrapper,
    a negative or conjugate view, or without memory (storage freed, as FSDP does between uses, or known zeros); nor is
    an inference tensor where a graph is recorded, which may not keep it. Elements may overlap. Not for a compiler.
    """
    keys_of = _C._dispatch_keys
    looked_at, wanted = (_OTHER_KEYS | _INPLACE_KEY, _INPLACE_KEY) if torch.is_grad_enabled() else (_OTHER_KEYS, 0)
    for x in tensors:
        if x is None:
            continue
        kind = type(x)
        if (kind is not Tensor and kind is not nn.Parameter) or keys_of(x).raw_repr() & looked_at != wanted:
            return False
        if x.data_ptr() == 0 and x.numel() > 0:
            return False
    return True


def tensor_operations_only() -> bool:
    """Must eager code stay within PyTorch's own operators: in a transform, under torch.jit.trace, in a user's mode?"""
    return transforms_active() or traced() or _function_modes() or _users_dispatch_modes()


def registered_operators_only() -> bool:
    """Must all that runs be registered operators: under a compiler, or in a dispatch mode (fake tensors, make_fx)?"""
    return torch.compiler.is_compiling() or _C._len_torch_dispatch_stack() > 0


def _users_dispatch_modes() -> bool:
    """Is there a mode that sees operators and is not torch's own for tracing? One that counts floating-point
    operations, say, knows torch's operators and not ours.
    """
    if torch.compiler.is_compiling() or _C._len_torch_dispatch_stack() == 0:
        return False
    return is_in_torch_dispatch_mode(include_infra_modes=False)


def traced() -> bool:
    """Are torch.jit.trace or the ONNX exporter that is built on it writing down the operators of this call?"""
    return _C._get_tracing_state() is not None


def exported_to_onnx() -> bool:
    """Is torch.onnx.export(dynamo=True) reading this call, which can be told the ONNX operator that it is?"""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def exported() -> bool:
    """Is torch.export reading this call, for ONNX too?"""
    return torch.compiler.is_compiling() and torch.compiler.is_exporting()


def transforms_active() -> bool:
    """Is the caller inside torch.func (vmap, grad, jvp, ...) or computing forward-mode derivatives?"""
    if torch.compiler.is_compiling():
        return False
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _function_modes() -> bool:
    """Is there a mode that sees the calls of torch's functions and is not torch's own (default device, make_fx)?"""
    depth = _C._len_torch_function_stack()
    if depth == 0 or torch.compiler.is_compiling():
        return False
    modes = (_C._get_function_stack_at(level) for level in range(depth))
    return any(not type(mode).__module__.startswith("torch.") for mode in modes)


@constant_to_compilers  # torch 2.11's compiler cannot look into the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def in_autocast(device_type: str) -> bool:
    """Is there an autocast region for devices of this type around the call?"""
    return (device_type in ("cpu", "cuda") or _has_autocast(device_type)) and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, operands: list[Any]) -> list[Any]:
    """As torch's autocast treats the operands of torch.nn.RNN: to the region's type, float64 excepted."""
    if not in_autocast(device_type):
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    return [x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype) for x in operands]

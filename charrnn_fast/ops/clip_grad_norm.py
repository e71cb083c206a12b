"""Gradient clipping by the global norm: one pass for the norm, one to scale, over all gradients together.

    g <- min(1, max_norm / (||g|| + 1e-6)) g        ||g||: the norm over all parameters together

Source: R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013; the
1e-6 is torch.nn.utils.clip_grad_norm_'s, whose contract this is.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from charrnn_fast.kernels import native

from . import backends


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients of the parameters in place so that their norm together is at most max_norm.

    Args:
        parameters: tensors of any shapes; one without a gradient is passed over. max_norm, norm_type,
        error_if_nonfinite, foreach: as in torch.nn.utils.clip_grad_norm_. The native kernel runs for
            the 2-norm of contiguous fp32 or fp64 gradients on a CPU; everything else is torch's.

    Returns: the norm before clipping, a scalar tensor; zero without gradients. There is no host synchronisation unless
    error_if_nonfinite is set.

    Raises: RuntimeError if error_if_nonfinite is set and the norm is not finite; the gradients are then as they were.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads and not (error_if_nonfinite or foreach is not None) and _native_cannot(grads, norm_type) is None:
        return native.clip_grad_norm_(grads, float(max_norm))
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def _native_cannot(grads: list[Tensor], norm_type: float) -> str | None:
    """None if the native kernel takes this call, else one clause saying why not."""
    if backends.requested("auto") not in ("auto", "native"):
        return "another backend was asked for"
    if torch.compiler.is_compiling():
        return "compilation needs PyTorch's own operators"
    if float(norm_type) != 2.0:
        return "it computes the 2-norm"
    if any(type(g) is not Tensor for g in grads):
        return "a gradient is not a plain tensor"
    return native.clip_limits(grads)

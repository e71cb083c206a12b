"""Gradient clipping by the global norm.

    g <- min(1, theta / ||g||) g        ||g||: the L2 norm over all parameters together

Source: R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
As in torch.nn.utils.clip_grad_norm_, 1e-6 is added to ||g|| in the quotient.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_grad_norm(params: Iterable[Tensor], theta: float) -> Tensor:
    """Scale the gradients of params in place so that their global norm is at most theta; parameters without one are
    passed over.

    Returns the norm before clipping, a scalar tensor (0 when no parameter has a gradient).
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    norm = torch.stack([(g * g).sum() for g in grads]).sum().sqrt()
    scale = (theta / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        g *= scale
    return norm

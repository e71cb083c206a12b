"""Gradient clipping by the global norm: one pass for the norm, one to scale, over all gradients together.

    g <- min(1, max_norm / (||g|| + 1e-6)) g        ||g||: the norm over all parameters together

Source: R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013; the
1e-6 is torch.nn.utils.clip_grad_norm_'s, whose contract this is.
"""

from collections.abc import Iterable
from types import GeneratorType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from charrnn_fast.kernels import native
from charrnn_fast.kernels.tensors import Survey, survey

from . import backends
from .context import plain, watched


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
        error_if_nonfinite, foreach: as in torch.nn.utils.clip_grad_norm_. The kernels run for the 2-norm of gradients
            on one device whose elements lie side by side: on a GPU in one launch up to 32,768 elements and two beyond,
            on a CPU for fp32 or fp64; everything else is torch's.

    Returns: the norm before clipping, a scalar tensor; zero without gradients. There is no host synchronisation unless
    error_if_nonfinite is set.

    Raises: RuntimeError if error_if_nonfinite is set and the norm is not finite; the gradients are then as they were.
    RuntimeError if ``CHARRNN_BACKEND`` names a backend that cannot run on the gradients' device.
    """
    given, parameters = parameters, [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not parameters and isinstance(given, GeneratorType):
        parameters = given  # of which torch warns: it may have been used up before
    # Not by :=, which torch's compiler does not read in a comprehension.
    grads = [grad for grad in [p.grad for p in parameters] if grad is not None]
    if grads and float(norm_type) == 2.0 and not error_if_nonfinite and foreach is None:
        backend, found = _backend(grads)
        if backend == "triton":
            from charrnn_fast.kernels.triton import clip_grad_norm as kernels

            increment_version(grads)
            return kernels.clip_grad_norm_(grads, float(max_norm), found)
        if backend == "native":
            increment_version(grads)
            return native.clip_grad_norm_(grads, float(max_norm), found)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


@torch.no_grad()
def clip_and_sgd_step_(parameters: Tensor | Iterable[Tensor], max_norm: float | None, lr: float | Tensor) -> Tensor:
    """Clip by the global norm and take a step of plain SGD, in one go: p -= lr * min(1, max_norm / (||g|| + 1e-6)) * g.

    The parameters become those of clip_grad_norm_ followed by torch.optim.SGD's step (no momentum, no weight decay),
    but for rounding. The gradients stay as they were, not clipped: nothing reads them between this step and their
    clearing, and writing them would cost a third of the traffic.

    Args:
        parameters: tensors of any shapes; one without a gradient is passed over.
        max_norm: largest global 2-norm of the gradients; None steps along the gradients as they are.
        lr: learning rate, a number or a scalar floating-point tensor; a tensor on the parameters' device is read when
            the step runs, so a captured CUDA graph follows its changes, while a number is part of the graph.

    Returns: the norm of the gradients, a scalar tensor; zero without gradients. There is no host synchronisation.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    pairs = [(p, grad) for p, grad in [(p, p.grad) for p in parameters] if grad is not None]
    if not pairs:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    params, grads = [p for p, _ in pairs], [g for _, g in pairs]
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and grads[0].device.type != "cpu":
        lr = float(lr)
    backend, found = _backend(grads, params)
    if backend == "triton":
        from charrnn_fast.kernels.triton import clip_grad_norm as kernels

        increment_version(params)
        return kernels.clip_and_sgd_step_(params, grads, max_norm, lr, found)
    norm = torch.nn.utils.get_total_norm(grads)
    step = -lr if max_norm is None else -lr * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p, g in pairs:
        p.add_(g * step if not isinstance(step, Tensor) else g * step.to(g.device))
    return norm


def steps_in_one_launch(parameters: Iterable[Tensor]) -> bool:
    """Whether `clip_and_sgd_step_` has a kernel for these parameters and their gradients."""
    pairs = [(p, p.grad) for p in parameters if p.grad is not None]
    return bool(pairs) and _backend([g for _, g in pairs], [p for p, _ in pairs])[0] == "triton"


def _backend(grads: list[Tensor], params: list[Tensor] | None = None) -> tuple[str, Survey | None]:
    """What clips these gradients, or takes a step with params: triton, native (which takes no step) or torch.

    With it what a kernel has to know of them.
    """
    wanted = backends.requested()
    if wanted == "torch" or watched() is not None:
        return "torch", None
    found = survey(grads, params, plain)
    if found is None or not found.floats:
        return "torch", None
    operation = "clip_grad_norm_" if params is None else "clip_and_sgd_step_"
    chosen = backends.choose(operation, grads[0].device, grads[0].dtype)
    if chosen == "triton":
        from charrnn_fast.kernels.triton import clip_grad_norm as kernels

        if kernels.clip_limits(grads, params, found) is None:
            return chosen, found
    # Torch scales a gradient that it is given twice once for each, and 16-bit ones without a copy.
    if chosen == "native" and found.apart and (wanted == chosen or native.clips_in_place(found)):
        return (chosen, found) if native.clip_limits(grads, found) is None else ("torch", None)
    return "torch", None

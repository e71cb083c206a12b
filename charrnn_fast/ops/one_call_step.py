"""A training step of a one-layer character model on a CPU: loss and all gradients by one call, clip, update.

What language_model_loss.py has as a differentiable operation, without autograd between the gradients and the update: at
the sizes of a small model its bookkeeping takes as long as the kernel.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backends
from .clip_grad_norm import clip_grad_norm_
from .context import addressable
from .language_model_loss import gradients_in_one_call


class OneCallStep:
    """The step, made once for a model and its optimizer.

    Args:
        weights: weight_ih (H, V), weight_hh (H, H), bias_ih (H,), bias_hh (H,), head_weight (V, H) and head_bias (V,),
            leaves on the CPU of one dtype, float32 or float64. Those that the optimizer holds get gradients.
        optimizer: any of torch's, whose step() updates them.
        clip: largest global norm of the gradients of all that the optimizer holds, None for none.
        look: asked with loss and norm, scalars, before an update, which is not made where it says no; or None.
        nonlinearity, backend: the model's.

    Attributes: norm, the gradients' norm before clipping at the last call, a scalar.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        look: Callable[[Tensor, Tensor], bool] | None = None,
        *,
        nonlinearity: str = "tanh",
        backend: str = "auto",
    ):
        self.weights, self.optimizer, self.clip, self.look = list(weights), optimizer, clip, look
        self.nonlinearity, self.backend = nonlinearity, backend
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held = {id(p) for p in self.parameters}
        self._trained = [p.requires_grad and id(p) in held for p in self.weights]
        self.norm: Tensor | None = None

    def why_not(self, tokens: Tensor, targets: Tensor, h0: Tensor | None) -> str | None:
        """None where the step is taken and is faster than the separate operations, else one clause. Ids (T, B)."""
        if not addressable(tokens, targets, h0, *self.weights):
            return "a mode, a compiler or a tensor that is not plain memory needs PyTorch's own operators"
        weight_ih = self.weights[0]
        (hidden, vocab), dtype = weight_ih.shape, weight_ih.dtype
        if tokens.dim() != 2 or not tokens.numel() or tokens.dtype != torch.int64 or targets.shape != tokens.shape:
            return "it takes (T, B) int64 tokens and as many targets"
        if h0 is not None and (h0.requires_grad or h0.dtype != dtype or h0.shape != (tokens.shape[1], hidden)):
            return "the state is not a constant (B, H) of the weights' dtype"
        if torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
            return "there is autocast, or nothing is differentiated"
        sizes = {"hidden_size": hidden, "batch_size": tokens.shape[1], "num_classes": vocab}
        device, backend = weight_ih.device, self.backend
        if backends.choose("language_model_loss", device, dtype, **sizes, backend=backend) == "native":
            return None
        return "the separate operations are faster"

    @torch.no_grad()
    def __call__(self, tokens: Tensor, targets: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step on ids (T, B) int64 and a state (B, H), None for zeros, that `why_not` has no objection to.

        Returns the mean loss in nats before the update, a scalar, and the last state (B, H). Raises IndexError for a
        token or target outside 0..V-1: nothing is updated then.
        """
        loss, h_n, (_, *gradients) = gradients_in_one_call(self.nonlinearity, tokens, targets, h0, *self.weights)
        try:
            for p, gradient, trained in zip(self.weights, gradients, self._trained, strict=True):
                p.grad = gradient.contiguous() if trained and gradient is not None else None
            self.norm = clip_grad_norm_(self.parameters, math.inf if self.clip is None else self.clip)
            if self.look is None or self.look(loss, self.norm):
                with torch.enable_grad():  # as it is where an optimizer's step is called by hand
                    self.optimizer.step()
        finally:
            for p in self.weights:
                p.grad = None
        return loss, h_n

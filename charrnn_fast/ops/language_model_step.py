"""A training step of a one-layer character model on a GPU in three launches, and its loss alone in two.

    h_t = f(W_ih[:, token_t] + b_ih + b_hh + h_{t-1} W_hh^T)      loss = mean of -log softmax(h_t W_q^T + b_q)[target_t]
    g <- min(1, clip / (||g|| + 1e-6)) g, ||g|| over all that is trained;      p <- p - lr g, or Adam's step

The first launch takes each row of the batch from its ids, which it reads where they lie, to the gradients; the second
adds these up; the third clips and updates. No autograd, no other operation, no look at a value: all of it can be
captured in a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from charrnn_fast.kernels.triton.language_model_types import Adam, Batch, Moments, Weights, positions, windows

from . import backends
from .context import addressable

__all__ = ["Batch", "LanguageModelStep", "Weights", "evaluate", "positions", "why_not", "why_not_batch", "windows"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def why_not(weights: Weights, optimizer: torch.optim.Optimizer | None = None, *, backend: str = "auto") -> str | None:
    """None where `evaluate` and, with an optimizer, `LanguageModelStep` run, else one clause. It looks at no value.

    Args:
        weights: weight_ih (H, V), weight_hh (H, H), head_weight (V, H), and bias_ih (H,), bias_hh (H,), head_bias (V,)
            or None.
        optimizer: torch.optim.SGD without momentum or weight decay, or torch.optim.Adam without weight decay or
            amsgrad, of one group, over nothing but these weights; nobody may hook it. Those that it holds are trained.
        backend: the model's.
    """
    if not addressable(*weights):
        return "a transform, a mode, a compiler or a tensor that is not plain memory needs PyTorch's own operators"
    weight_ih = weights.weight_ih
    device, dtype, (hidden, classes) = weight_ih.device, weight_ih.dtype, weight_ih.shape
    shapes = ((hidden, classes), (hidden, hidden), (classes, hidden), (hidden,), (hidden,), (classes,))
    for weight, shape in zip(weights, shapes, strict=True):
        if weight is not None and (weight.device != device or weight.dtype != dtype or weight.shape != shape):
            return "the weights are not those of one layer and a head, of one type on one device"
        if weight is not None and not weight.is_contiguous():
            return "a weight is not contiguous"
    if torch.is_autocast_enabled(device.type):
        return "there is autocast"
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_classes": classes, "backend": backend}
    if backends.choose("language_model_step", device, dtype, **sizes) != "triton":
        found = backends.explain(dtype=dtype, device=device, operation="language_model_step", **sizes)
        return found.why_not["triton"]
    return None if optimizer is None else _why_not_optimizer(weights, optimizer)


def why_not_batch(weights: Weights, batch: Batch, h0: Tensor | None = None) -> str | None:
    """None where a batch and a state can be given to the kernels, else one clause. It looks at no value."""
    if not addressable(batch.tokens, batch.targets, batch.starts, h0):
        return "a mode, a compiler or a tensor that is not plain memory needs PyTorch's own operators"
    device, hidden = weights.weight_ih.device, weights.weight_ih.shape[0]
    if batch.tokens.dtype not in _INTEGERS or batch.targets.dtype not in _INTEGERS:
        return f"ids are {batch.tokens.dtype} and {batch.targets.dtype}"
    if batch.tokens.device != device or batch.targets.device != device:
        return f"the ids are not on {device}"
    if batch.rows < 1 or batch.steps < 1:
        return "the batch is empty"
    starts = batch.starts
    if starts is not None and (starts.device != device or starts.dtype != torch.int64 or not starts.is_contiguous()):
        return f"starts are no int64 side by side on {device}"
    if h0 is not None:
        if h0.requires_grad or h0.shape != (batch.rows, hidden) or h0.dtype != weights.weight_ih.dtype:
            return "the state is not a constant (B, H) of the weights' dtype"
        if h0.device != device or not h0.is_contiguous():
            return f"the state is not contiguous on {device}"
    return None


def _why_not_optimizer(weights: Weights, optimizer: torch.optim.Optimizer) -> str | None:
    name = type(optimizer).__name__
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam):
        return f"it has no step of {name}'s"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer's step has hooks"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} groups of parameters"
    (group,) = optimizer.param_groups
    for option in ("momentum", "weight_decay", "maximize", "differentiable", "amsgrad"):
        if group.get(option):
            return f"{name} has {option}"
    own, device = {id(w) for w in weights if w is not None}, weights.weight_ih.device
    if any(id(p) not in own for p in group["params"] if p.requires_grad):
        return "the optimizer holds other parameters as well"
    if not any(p.requires_grad for p in group["params"]):
        return "nothing is trained"
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.device != device or lr.dim() or not lr.is_floating_point()):
        return f"the learning rate is a tensor, but no number on {device}"
    if name == "Adam":
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "Adam's betas are tensors"
        if device.type != "cpu" and not (group["fused"] or group["capturable"]):
            return "Adam keeps its step counts on the host"
        if not all(_fits(state, p) for p in group["params"] if (state := optimizer.state.get(p))):
            return "Adam's state is not laid out as the parameters are"
    return None


def _fits(state: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter's state of Adam's is what the kernel takes."""
    moments, steps = (state["exp_avg"], state["exp_avg_sq"]), state["step"]
    alike = all(m.shape == p.shape and m.dtype == p.dtype and m.is_contiguous() for m in moments)
    placed = all(t.device == p.device for t in (*moments, steps))
    return alike and placed and addressable(*moments, steps)


class LanguageModelStep:
    """The step, made once for a model and its optimizer, of which `why_not` has nothing to say.

    Args:
        weights: as in `why_not`. Those that require a gradient and that the optimizer holds are trained.
        optimizer: read at each call: its learning rate (a number is part of a captured step, a tensor is read when the
            kernel runs), Adam's betas, eps and state, which is made at the first call as torch makes it.
        clip: largest global norm of the gradients of what is trained, None for none.
        nonlinearity: "tanh" or "relu".

    Attributes: norm, () float32 on the weights' device: the gradients' norm before clipping at the last call, always
    the same tensor.
    """

    def __init__(
        self,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        *,
        nonlinearity: str = "tanh",
    ):
        self.weights, self.optimizer, self.clip, self.nonlinearity = weights, optimizer, clip, nonlinearity
        self.norm = torch.empty((), dtype=torch.float32, device=weights.weight_ih.device)

    @torch.no_grad()
    def __call__(self, batch: Batch, h0: Tensor | None = None, *, h_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step on a batch and a state (B, H), None for zeros, of which `why_not_batch` has nothing to say.

        h_n: where the last state goes, (B, H) contiguous; may be h0; by default a new tensor. Returns the mean loss in
        nats before the update, (), a new tensor, and the last state. Targets of -100 do not count; without any that do
        loss and parameters become NaN. A token outside 0..V-1 counts as a zero row, such a target makes the loss NaN.
        p.grad is neither read nor written.
        """
        from charrnn_fast.kernels.triton import language_model as kernels

        (group,) = self.optimizer.param_groups
        held = {id(p) for p in group["params"]}
        trained = [w is not None and w.requires_grad and id(w) in held for w in self.weights]
        updated = [w for w, t in zip(self.weights, trained, strict=True) if w is not None and t]
        loss, h_n, _ = kernels.language_model_step(
            self.weights,
            batch,
            h0,
            trained=trained,
            lr=group["lr"],
            adam=self._adam(group, trained),
            max_norm=self.clip,
            nonlinearity=self.nonlinearity,
            h_n=h_n,
            norm=self.norm,
        )
        increment_version(updated)
        return loss, h_n

    def _adam(self, group: dict[str, Any], trained: list[bool]) -> Adam | None:
        """Its state and numbers; None for SGD."""
        if "betas" not in group:
            return None
        moments: list[Moments | None] = []
        for p, t in zip(self.weights, trained, strict=True):
            if p is None or not t:
                moments.append(None)
                continue
            state = self.optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            moments.append(Moments(state["exp_avg"], state["exp_avg_sq"], state["step"]))
        beta1, beta2 = group["betas"]
        return Adam(moments, float(beta1), float(beta2), float(group["eps"]))


@torch.no_grad()
def evaluate(
    weights: Weights,
    batch: Batch,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    h_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean loss in nats, (), and the last state (B, H): two launches. Arguments as in `LanguageModelStep`, for
    weights, a batch and a state of which `why_not` and `why_not_batch` have nothing to say.
    """
    from charrnn_fast.kernels.triton import language_model as kernels

    return kernels.language_model_loss(weights, batch, h0, nonlinearity=nonlinearity, h_n=h_n)

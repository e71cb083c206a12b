"""Head and cross-entropy for more classes than the C kernel holds a row of: torch's products, some rows at a time."""

import torch

from .memory import COMPUTE

MAX_FUSED_CLASSES = 1024  # more are this file's
_CHUNK_LOGITS = 1 << 22


def chunked_cross_entropy(hidden, weight, bias, target, ignore_index, reduction, need_grad, grad_loss):
    """The same for many classes: a few rows' logits at a time, by torch's own products."""
    N, V = hidden.shape[0], weight.shape[0]
    compute = hidden.dtype if hidden.dtype in COMPUTE else torch.float32
    valid = target != ignore_index
    outside = valid & ((target < 0) | (target >= V))
    if outside.any():
        raise IndexError(f"Target {int(target[outside][0])} is out of bounds.")
    factor = valid.to(compute) if grad_loss is None else torch.where(valid, grad_loss.to(compute), 0)
    if reduction == "mean":
        factor = factor / valid.sum().clamp(min=1)
    rows = hidden.new_zeros(N, dtype=compute)
    grad_hidden = hidden.new_empty(hidden.shape, dtype=compute) if need_grad else None
    grad_weight = weight.new_zeros(weight.shape, dtype=compute) if need_grad else None
    grad_bias = hidden.new_zeros(V, dtype=compute) if need_grad and bias is not None else None
    wide = weight.to(compute) if need_grad else weight
    step = max(1, _CHUNK_LOGITS // V)
    for chunk in (slice(n, n + step) for n in range(0, N, step)):
        # Which subtracts the largest first: a log-sum-exp of large logits would lose its sum's logarithm.
        logits = torch.nn.functional.linear(hidden[chunk], weight, bias).to(compute).log_softmax(1)
        chosen = torch.where(valid[chunk], target[chunk], 0).unsqueeze(1)
        rows[chunk] = torch.where(valid[chunk], -logits.gather(1, chosen).squeeze(1), 0)
        if not need_grad:
            continue
        # Not exp_(), whose first call in a process, on two threads, is now and then 3e-9 off in float64 (torch 2.13).
        probabilities = logits.softmax(1)
        probabilities.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=compute))
        probabilities *= factor[chunk].unsqueeze(1)
        torch.mm(probabilities, wide, out=grad_hidden[chunk])
        grad_weight.addmm_(probabilities.t(), hidden[chunk].to(compute))
        if grad_bias is not None:
            grad_bias += probabilities.sum(0)
    loss = rows if reduction == "none" else rows.sum() / (valid.sum() if reduction == "mean" else 1)
    return loss.to(hidden.dtype), grad_hidden, grad_weight, grad_bias

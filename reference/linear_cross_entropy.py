"""The output layer and the loss of the language model.

o = h W_hq + b_q,    loss = mean over all positions of -log softmax(o)[target]
"""

from torch import Tensor


def linear(outputs: Tensor, W_hq: Tensor, b_q: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., H), with W_hq (H, V) and b_q (V)."""
    return outputs @ W_hq + b_q


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, a scalar, of targets (...) int64 under logits (..., V)."""
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (logits.logsumexp(-1) - chosen).mean()


def linear_cross_entropy(outputs: Tensor, W_hq: Tensor, b_q: Tensor, targets: Tensor) -> Tensor:
    """Head and loss together: outputs (..., H), targets (...) int64, a scalar in nats."""
    return cross_entropy(linear(outputs, W_hq, b_q), targets)

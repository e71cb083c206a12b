"""The training loop: zero or carried state, truncated backpropagation through time, global-norm clipping, SGD or Adam.

Truncation: the state that enters a batch is detached, so gradients reach back to the start of that batch only. With
`graph_batches` = k > 1 the graph is kept across k batches in a row and one update is made for them, on the mean of
their losses.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .clip_grad_norm import clip_grad_norm


class SGD:
    """p <- p - lr * g"""

    def __init__(self, params: Sequence[Tensor], lr: float):
        self.params, self.lr = params, lr

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p -= self.lr * p.grad
                p.grad = None


class Adam:
    """D. Kingma and J. Ba, "Adam: a method for stochastic optimization", ICLR 2015, with the bias corrections."""

    def __init__(
        self, params: Sequence[Tensor], lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
    ):
        self.params, self.lr, self.beta1, self.beta2, self.eps = params, lr, beta1, beta2, eps
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            if p.grad is None:
                continue
            m += (1 - self.beta1) * (p.grad - m)
            v += (1 - self.beta2) * (p.grad * p.grad - v)
            m_hat = m / (1 - self.beta1**self.steps)
            v_hat = v / (1 - self.beta2**self.steps)
            p -= self.lr * m_hat / (v_hat.sqrt() + self.eps)
            p.grad = None


def train_batches(
    net,
    batches: Iterable[tuple[Tensor, Tensor]],  # X (B, T) and Y (B, T), int64
    updater: SGD | Adam,
    theta: float | None,
    *,
    carry_state: bool = False,
    graph_batches: int = 1,
) -> Iterator[Tensor]:
    """Train on the batches in turn and yield the loss of each, detached.

    carry_state=False starts every batch from the zero state; True takes the state that the batch before ended with.
    theta is the largest global gradient norm; None trains without clipping.
    """
    state = None
    group: list[Tensor] = []

    def update() -> None:
        torch.stack(group).mean().backward()
        if theta is not None:
            clip_grad_norm(updater.params, theta)
        updater.step()
        group.clear()

    for X, Y in batches:
        if not carry_state:
            state = None
        loss, state = net.loss(X, Y, state)
        group.append(loss)
        if len(group) == graph_batches:
            update()
            state = state.detach()
        yield loss.detach()
    if group:
        update()


@torch.no_grad()
def evaluate_batches(
    net, batches: Iterable[tuple[Tensor, Tensor]], *, carry_state: bool = False
) -> Iterator[tuple[Tensor, int]]:
    """Yield the mean loss of each batch, and its number of characters."""
    state = None
    for X, Y in batches:
        loss, state = net.loss(X, Y, state if carry_state else None)
        yield loss, Y.numel()

"""Problems for the kernels of linear cross-entropy, their answers by torch's own operations, and the comparison."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from comparisons import error
from needs import CPU, DEVICE

from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton.linear_cross_entropy import linear_cross_entropy

REDUCTIONS = ("mean", "sum", "none")
NAMES = ("loss", "grad_hidden", "grad_weight", "grad_bias")


@dataclass
class LossProblem:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    grad_loss: torch.Tensor
    reduction: str = "mean"
    ignore_index: int = -100

    def to(self, dtype: torch.dtype) -> "LossProblem":
        floats = (self.hidden, self.weight, self.bias, self.grad_loss)
        hidden, weight, bias, grad_loss = (None if t is None else t.to(dtype) for t in floats)
        return replace(self, hidden=hidden, weight=weight, bias=bias, grad_loss=grad_loss)


def by_torch(p: LossProblem) -> list[torch.Tensor]:
    """Loss and gradients by autograd through torch's operations, in p's dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in (p.hidden, p.weight, p.bias) if t is not None]
    loss = F.cross_entropy(F.linear(*leaves), p.target, reduction=p.reduction, ignore_index=p.ignore_index)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, p.grad_loss)]


def summed_magnitudes(p: LossProblem) -> list[torch.Tensor]:
    """What by_torch's results are sums of, without the signs, which cancel: a sum is rounded at the scale of these."""
    p = p.to(torch.float64)
    logits = F.linear(p.hidden, p.weight, p.bias)
    valid = p.target != p.ignore_index
    target = torch.where(valid, p.target, 0)
    terms = (logits.softmax(1) - F.one_hot(target, len(p.weight))).abs() * valid.unsqueeze(1)
    factor = p.grad_loss.abs() / (valid.sum() if p.reduction == "mean" else 1)
    terms = terms * (factor.unsqueeze(1) if p.reduction == "none" else factor)
    loss = by_torch(p)[0]
    return [loss, terms @ p.weight.abs(), terms.T @ p.hidden.abs(), *([] if p.bias is None else [terms.sum(0)])]


@dataclass(frozen=True)
class LossKernels:
    """linear_cross_entropy of one backend."""

    device: torch.device
    launch: Callable
    upstream: bool  # whether it multiplies by the gradient of a mean or of a sum, as all do by those of rows

    def problem(
        self,
        N,
        H,
        V,
        *,
        dtype=torch.float32,
        bias=True,
        reduction="mean",
        ignored=0.3,
        gain=1.0,
        seed=0,
        ignore_index=-100,
    ) -> LossProblem:
        """Logits of the order of `gain`; `ignored`: share of the rows that do not count, never all of them."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, dtype)

        target = torch.randint(V, (N,), generator=generator)
        target[1:][torch.rand(N - 1, generator=generator) < ignored] = ignore_index
        grad_loss = random(N) if reduction == "none" else random()
        tensors = (random(N, H), random(V, H) * (gain / H**0.5), random(V) if bias else None)
        return LossProblem(*tensors, target.to(self.device), grad_loss, reduction, ignore_index)

    def results(self, p: LossProblem, **options) -> list[torch.Tensor]:
        """As by_torch has them."""
        grad_loss = p.grad_loss if self.upstream or p.reduction == "none" else None
        given = (p.hidden, p.weight, p.bias, p.target, p.ignore_index, p.reduction)
        loss, *gradients = self.launch(*given, grad_loss=grad_loss, **options)
        assert (gradients[2] is None) == (p.bias is None)
        factor = 1 if grad_loss is not None else p.grad_loss
        return [loss, *(g * factor for g in gradients if g is not None)]

    def check(self, p: LossProblem, **options) -> None:
        """At most twice torch's own error, and 4 units of the dtype's precision for where that is next to none."""
        exact, theirs, ours = by_torch(p.to(torch.float64)), by_torch(p), self.results(p, **options)
        slack = (32 if p.hidden.dtype == torch.float64 else 4) * torch.finfo(p.hidden.dtype).eps
        for name, found, other, right, summed in zip(NAMES, ours, theirs, exact, summed_magnitudes(p), strict=False):
            assert found.shape == right.shape
            assert found.dtype == p.hidden.dtype
            assert error(found, right, summed) <= 2 * error(other, right, summed) + slack, name
        assert len(ours) == len(exact)


TRITON = LossKernels(DEVICE, linear_cross_entropy, upstream=True)
NATIVE = LossKernels(CPU, native.linear_cross_entropy, upstream=False)

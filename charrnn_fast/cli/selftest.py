"""Each operation of each backend, at a small size, against the reference in float64: is it right here, and how fast.

The errors are relative to the largest number of the right result.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from charrnn_fast.ops import backends
from charrnn_fast.ops.clip_grad_norm import clip_and_sgd_step_, clip_grad_norm_
from charrnn_fast.ops.elman import elman
from charrnn_fast.ops.generate import generate
from charrnn_fast.ops.language_model_loss import language_model_loss, why_not
from charrnn_fast.ops.linear_cross_entropy import linear_cross_entropy
from charrnn_fast.reference import generate as reference_generate
from charrnn_fast.reference.elman import elman_stack

T, B, H, V = 12, 5, 32, 28
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Outcome:
    """One operation on one backend: its error or what it raised, None for one that does not run here and why."""

    operation: str
    backend: str
    error: float | None
    problem: str | None = None

    def right(self, dtype: torch.dtype) -> bool:
        return self.problem is None and (self.error is None or self.error <= TOLERANCE[dtype])


@contextmanager
def asking_for(backend: str) -> Iterator[None]:
    """CHARRNN_BACKEND for a while."""
    before = os.environ.get("CHARRNN_BACKEND")
    os.environ["CHARRNN_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["CHARRNN_BACKEND"]
        else:
            os.environ["CHARRNN_BACKEND"] = before


class Operands:
    """Operands of all operations: random numbers of a seed, in float64 on the CPU and in a dtype on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu") * 0.3

        self.device, self.dtype = device, dtype
        self.tokens = torch.randint(V, (T, B), generator=g, dtype=torch.int64, device="cpu")
        self.targets = torch.randint(V, (T, B), generator=g, dtype=torch.int64, device="cpu")
        self.uniforms = torch.rand(B, T, generator=g, dtype=torch.float64, device="cpu")
        # weight_ih, weight_hh, bias, head_weight, head_bias; in the dtype's own numbers, so that rounding is no error
        shapes = ((H, V), (H, H), (H,), (V, H), (V,))
        self.weights = [normal(*shape).to(dtype).double().requires_grad_() for shape in shapes]

    def here(self) -> list[Tensor]:
        """The weights on the device in its dtype, as leaves."""
        return [w.detach().to(device=self.device, dtype=self.dtype).requires_grad_() for w in self.weights]

    def reference_states(self) -> Tensor:
        """(T, B, H) in float64."""
        weight_ih, weight_hh, bias, *_ = self.weights
        rows = F.one_hot(self.tokens, V).double()
        zeros = torch.zeros(1, B, H, dtype=torch.float64, device="cpu")
        return elman_stack(rows, zeros, [(weight_ih.T, weight_hh.T, bias)], "tanh")[0]

    def reference_loss(self) -> Tensor:
        logits = F.linear(self.reference_states(), self.weights[3], self.weights[4])
        return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())


def _elman(p: Operands) -> tuple[list[Tensor], list[Tensor]]:
    w = p.here()
    out, last = elman(p.tokens.to(p.device), None, w[0], w[1], w[2])
    right = p.reference_states()
    ours = torch.autograd.grad((out.double() ** 2).sum() + last.double().sum(), w[:3])
    theirs = torch.autograd.grad((right**2).sum() + right[-1].sum(), p.weights[:3])
    return [out, *ours], [right, *theirs]


def _linear_cross_entropy(p: Operands) -> tuple[list[Tensor], list[Tensor]]:
    w, states = p.here(), p.reference_states().detach().to(p.dtype)
    ours = linear_cross_entropy(
        states.flatten(0, 1).to(p.device), w[3], p.targets.flatten().to(p.device), linear_bias=w[4]
    )
    logits = F.linear(states.double().flatten(0, 1), p.weights[3], p.weights[4])
    right = F.cross_entropy(logits, p.targets.flatten())
    return [ours, *torch.autograd.grad(ours, w[3:])], [right, *torch.autograd.grad(right, p.weights[3:])]


def _language_model_loss(p: Operands) -> tuple[list[Tensor], list[Tensor]]:
    w = p.here()
    ours, _ = language_model_loss(p.tokens, p.targets, None, *w)
    right = p.reference_loss()
    return [ours, *torch.autograd.grad(ours, w)], [right, *torch.autograd.grad(right, p.weights)]


def _clip(p: Operands, step: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    w, right = p.here(), [x.detach().clone() for x in p.weights]
    for x in w:
        x.grad = x.detach().clone()
    norm = torch.stack([(x * x).sum() for x in right]).sum().sqrt()
    scale = float((1.0 / (norm + 1e-6)).clamp(max=1.0))
    if step:
        ours = clip_and_sgd_step_(w, 1.0, 0.5)
        return [ours, *(x.detach() for x in w)], [norm, *(x - 0.5 * scale * x for x in right)]
    ours = clip_grad_norm_(w, 1.0)
    return [ours, *(x.grad for x in w if x.grad is not None)], [norm, *(x * scale for x in right)]


def _generate(p: Operands) -> tuple[list[Tensor], list[Tensor]]:
    w = [x.detach() for x in p.here()]
    prompt = p.tokens.T.contiguous()
    ours = []
    for uniforms in (None, p.uniforms.to(p.device)):
        ids, _ = generate(prompt.to(p.device), T, [(w[0], w[1], w[2])], w[3], w[4], uniforms=uniforms)
        ours.append(ids.double())
    weight_ih, weight_hh, bias, head_weight, head_bias = (x.detach() for x in p.weights)

    def step(tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(1, B, H, dtype=torch.float64, device="cpu") if state is None else state
        rows = F.one_hot(tokens.T, V).double()
        out, last = elman_stack(rows, zeros, [(weight_ih.T, weight_hh.T, bias)], "tanh")
        return F.linear(out.transpose(0, 1), head_weight, head_bias), last

    right = [
        reference_generate.generate(step, prompt, T, uniforms=uniforms)[0].double() for uniforms in (None, p.uniforms)
    ]
    return ours, right


OPERATIONS: dict[str, Callable[[Operands], tuple[list[Tensor], list[Tensor]]]] = {
    "elman": _elman,
    "linear_cross_entropy": _linear_cross_entropy,
    "language_model_loss": _language_model_loss,
    "clip_grad_norm_": _clip,
    "clip_and_sgd_step_": lambda p: _clip(p, step=True),
    "generate": _generate,
}


def run(device: torch.device, dtype: torch.dtype, names: list[str]) -> list[Outcome]:
    """Every operation on each of the backends that run here."""
    outcomes, problem = [], Operands(device, dtype)
    for backend in names:
        for operation, compute in OPERATIONS.items():
            with asking_for(backend):
                outcomes.append(_tried(operation, backend, compute, problem))
    return outcomes


def _tried(operation: str, backend: str, compute: Callable[[Operands], Any], p: Operands) -> Outcome:
    if operation == "language_model_loss":
        w = p.here()
        if backend != "native" or why_not(p.tokens, p.targets, None, w) is not None:
            return Outcome(operation, backend, None)
    if operation == "generate" and p.dtype not in (torch.float32, torch.float64):
        return Outcome(operation, backend, None)  # ids depend on the last bit
    try:
        ours, right = compute(p)
        return Outcome(operation, backend, max(_error(a, b) for a, b in zip(ours, right, strict=True)))
    except Exception as error:  # whatever a broken installation raises
        line = (str(error).splitlines() or [""])[0]
        return Outcome(operation, backend, None, f"{type(error).__name__}: {line}")


def _error(ours: Tensor, right: Tensor) -> float:
    ours = ours.detach().double().cpu()
    scale = max(float(right.detach().abs().max()), 1e-12)
    return float((ours - right.detach()).abs().max()) / scale if ours.isfinite().all() else float("inf")


def milliseconds(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Forward and backward of one layer, T=64, B=32, H=128, on token ids: the best of a few."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (64, 32), generator=g, dtype=torch.int64, device="cpu").to(device)
    w = [
        (torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu") * 0.1).to(device, dtype).requires_grad_()
        for shape in ((128, V), (128, 128), (128,))
    ]
    best, rounds, until = float("inf"), 0, time.perf_counter() + 0.3
    while time.perf_counter() < until or rounds < 3:
        rounds += 1
        start = time.perf_counter()
        out, _ = elman(tokens, None, w[0], w[1], w[2], backend=backend)
        out.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def backends_that_run(device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """The backends for which the self-test is made here, and why not for the others."""
    explanation = backends.explain(H, dtype, device)
    others = dict(explanation.why_not)
    names = [explanation.backend]
    sizes = backends.Sizes(hidden_size=H)
    for row in backends.TABLE["elman"]:
        can = row.name in others and row.limits(device, dtype, sizes) is None
        if can and row.slower(device, dtype, sizes) is None:
            names.append(row.name)
            del others[row.name]
    return names, others

"""Parity at sizes that no interpreter reaches: FusedRNN against fp64, and the language model against the reference.

An error is the largest absolute difference over the largest absolute value, of output, final state or any gradient. A
row is in order where ours is at most twice that of torch.nn.RNN in the same dtype and under the same switches, or
within a few roundings of the dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from charrnn_fast import CharRNN, FusedRNN, clip_grad_norm_
from charrnn_fast.bench import grid
from charrnn_fast.bench.problems import ClipProblem
from charrnn_fast.reference import generate as reference_generate
from charrnn_fast.reference.clip_grad_norm import clip_grad_norm
from charrnn_fast.reference.language_model import RNNLM

ROUNDINGS = 8  # of the dtype's own: what counts as exact
NEAR_TIE = 1e-4  # of two logits
EXACT = 1e-12  # what is asked of fp64, whose own roundings the exact results have too
DTYPES = grid.DTYPES | {"fp64": torch.float64}


@dataclass(frozen=True)
class Size:
    T: int
    B: int
    I: int  # noqa: E741 - the field's name for the number of input features
    H: int
    dtype: str = "fp32"
    packed: bool = False
    bidirectional: bool = False
    num_layers: int = 1
    nonlinearity: str = "tanh"

    @property
    def name(self) -> str:
        extras = [word for word in ("packed", "bidirectional") if getattr(self, word)]
        extras += [f"{self.num_layers} layers"] if self.num_layers > 1 else []
        extras += [self.nonlinearity] if self.nonlinearity != "tanh" else []
        return " ".join([f"T={self.T} B={self.B} I={self.I} H={self.H} {self.dtype}", *extras])


LARGE = [
    Size(32, 4096, 28, 32),
    Size(4096, 8, 64, 64),
    Size(1024, 64, 128, 128),
    *(Size(256, 64, 256, 256, dtype) for dtype in ("fp32", "bf16", "fp16")),
    Size(200, 64, 128, 128, packed=True),
    Size(200, 32, 96, 100, bidirectional=True, num_layers=2),
    Size(100, 64, 128, 128, nonlinearity="relu"),
    *(Size(128, 16, 512, 1024, dtype) for dtype in ("fp32", "bf16")),
    Size(64, 32, 64, 64, "fp64"),
    Size(100, 16, 2048, 2048),
]
TINY = [Size(3, 2, 3, 5), Size(3, 2, 3, 5, "fp64", packed=True, bidirectional=True)]


def _results(rnn: nn.Module, x: Tensor, size: Size) -> list[Tensor]:
    """Output, final state, and the gradients of the input and of every parameter, of a loss that uses both results."""
    x = x.detach().clone().requires_grad_()
    lengths = torch.linspace(size.T, 1, size.B).round().long()
    output, h_n = rnn(pack_padded_sequence(x, lengths) if size.packed else x)
    data = output.data if isinstance(output, PackedSequence) else output
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (data, h_n)]
    loss = (data * weights[0]).sum() + (h_n * weights[1]).sum()
    return [data.detach(), h_n.detach(), *torch.autograd.grad(loss, [x, *rnn.parameters()])]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def elman_row(size: Size, device: torch.device, backend: str = "auto") -> dict[str, Any]:
    """Our error and torch.nn.RNN's, in the size's dtype, against torch.nn.RNN in fp64 on the same rounded numbers."""
    dtype = DTYPES[size.dtype]
    torch.manual_seed(0)
    shape: dict[str, Any] = {name: getattr(size, name) for name in ("bidirectional", "num_layers", "nonlinearity")}
    theirs = nn.RNN(size.I, size.H, **shape).to(device, dtype)
    ours = FusedRNN(size.I, size.H, **shape, backend=backend).to(device, dtype)
    exact = nn.RNN(size.I, size.H, **shape).to(device, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(size.T, size.B, size.I, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    wanted = _results(exact, x.double(), size)
    own, other = (_error(_results(rnn, x, size), wanted) for rnn in (ours, theirs))
    allowed = max(2 * other, ROUNDINGS * torch.finfo(dtype).eps, EXACT)
    return {"name": size.name, "error": own, "torch_error": other, "allowed": allowed, "ok": own <= allowed}


def language_model_rows(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Loss, gradients and greedy characters of a CharRNN against the reference's; and a clip of 2,000 tensors."""
    B, T, V, H, chars = (2, 4, 5, 8, 5) if tiny else (1024, 32, 28, 32, 1000)
    torch.manual_seed(0)
    model = CharRNN(V, H).to(device)
    net = model.to_reference()
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    wanted, _ = net.loss(ids[:, :-1], ids[:, 1:])
    recurrent = [p for name, p in model.rnn.named_parameters() if name.startswith("weight")]  # ih, hh
    own = torch.autograd.grad(loss, [*recurrent, model.head.weight])
    theirs = torch.autograd.grad(wanted, [net.cells[0].W_xh, net.cells[0].W_hh, net.W_hq])
    error = _error([loss.detach(), *own], [wanted.detach().double(), *(g.T.double() for g in theirs)])
    tolerance = 5e-3 if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else 1e-4
    yield {"name": f"language model B={B} T={T} V={V} H={H}", "error": error, "ok": error <= tolerance}
    yield _greedy_row(model, net, ids[:1, :4], chars)
    yield _clip_row(device)


@torch.no_grad()
def _greedy_row(model: CharRNN, net: RNNLM, prompt: Tensor, chars: int) -> dict[str, Any]:
    """Greedy characters of both. They may part where two logits are a rounding apart, and there alone."""
    new, _ = model.generate_ids(prompt, chars)
    old, _ = reference_generate.generate(net, prompt, chars)
    differ = (new != old).nonzero()
    row: dict[str, Any] = {"name": f"{chars} greedy characters", "equal_characters": chars, "ok": True}
    if len(differ):
        same = int(differ[0, 1])
        logits = net(torch.cat([prompt, old[:, :same]], 1))[0][0, -1]
        gap = float(logits[old[0, same]] - logits[new[0, same]])
        row |= {"equal_characters": same, "logits_apart": gap, "ok": gap <= NEAR_TIE}
    return row


def _clip_row(device: torch.device) -> dict[str, Any]:
    ours, theirs = (ClipProblem(grid.CLIP[-1], device).parameters() for _ in range(2))
    norms = [clip_grad_norm_(ours, 1.0), clip_grad_norm(theirs, 1.0)]
    grads = [[p.grad for p in parameters if p.grad is not None] for parameters in (ours, theirs)]
    error = _error([norms[0], *grads[0]], [norms[1].double(), *(g.double() for g in grads[1])])
    return {"name": f"clip of {len(ours):,} tensors", "error": error, "ok": error <= 1e-5}


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Every size, with and without TF32 where the device has it; without a device, tiny ones in the interpreter."""
    if device.type != "cuda":
        yield from (elman_row(size, device, "triton") for size in TINY)
        yield from language_model_rows(device, tiny=True)
        return
    allowed = torch.backends.cudnn.allow_tf32
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = tf32
        for size in LARGE:
            if not tf32 or size.dtype == "fp32":
                yield elman_row(size, device) | {"tf32": tf32}
                torch.cuda.empty_cache()
    torch.backends.cudnn.allow_tf32 = False
    yield from language_model_rows(device, tiny=False)
    torch.backends.cudnn.allow_tf32 = allowed

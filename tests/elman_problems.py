"""Problems for the Elman kernels, their answers by an fp64 oracle of plain torch operations, and the comparison."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from comparisons import error
from needs import CPU, DEVICE

from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward
from charrnn_fast.kernels.triton.elman_grid import grid_pass
from charrnn_fast.kernels.triton.elman_grid_tiles import GridTile
from charrnn_fast.kernels.triton.launch import Pass
from charrnn_fast.reference.elman import ACTIVATIONS, walk

DIRECTIONS = ((False,), (True,), (False, True))
V = 5


@dataclass
class ElmanProblem:
    """Arguments of elman_forward and the gradients that elman_backward is given."""

    x: torch.Tensor
    weight_hh: list[torch.Tensor]
    h0: torch.Tensor | None
    bias: torch.Tensor  # (2, D*H): bias_ih, bias_hh
    options: dict
    grad_out: torch.Tensor
    grad_h_n: torch.Tensor

    def to(self, dtype: torch.dtype) -> "ElmanProblem":
        def cast(tensor):
            return None if tensor is None else tensor.to(dtype)

        weights = [cast(w) for w in self.weight_hh]
        gradients = cast(self.grad_out), cast(self.grad_h_n)
        return ElmanProblem(cast(self.x), weights, cast(self.h0), cast(self.bias), self.options, *gradients)


def make_problem(
    T,
    H,
    *,
    dtype=torch.float32,
    B=3,
    tokens=False,
    packed=False,
    with_h0=True,
    reverse=(False,),
    nonlinearity="tanh",
    batch_first=False,
    vocabulary=V,
    seed=0,
    device=DEVICE,
) -> ElmanProblem:
    generator = torch.Generator().manual_seed(seed)
    D = len(reverse)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def rows(tensor):
        """Time-major view of a batch-first buffer, if asked for."""
        return tensor.transpose(0, 1).contiguous().transpose(0, 1) if batch_first and not packed else tensor

    batch_sizes = None
    if packed:
        batch_sizes = torch.randint(1, B + 1, (T,), generator=generator).sort(descending=True).values
        batch_sizes[0] = B
    shape = (int(batch_sizes.sum()),) if packed else (T, B)
    ids = rows(torch.randint(0, vocabulary, shape, generator=generator).to(device)) if tokens else None
    return ElmanProblem(
        x=random(vocabulary, D * H) if tokens else rows(random(*shape, D * H)),
        weight_hh=[random(H, H) / H**0.5 for _ in range(D)],
        h0=random(D, B, H) if with_h0 else None,
        options={"tokens": ids, "batch_sizes": batch_sizes, "nonlinearity": nonlinearity, "reverse": reverse},
        grad_out=rows(random(*shape, D * H)),
        grad_h_n=random(D, B, H),
        bias=random(2, D * H),
    )


def oracle(p: ElmanProblem) -> list[torch.Tensor]:
    """out, h_n, grads of x (or the table), weight_hh, a bias and h0 (if there is one), through plain operations."""
    x, *weights, bias = leaves = [t.detach().clone().requires_grad_() for t in (p.x, *p.weight_hh, p.bias.sum(0))]
    h0 = None if p.h0 is None else p.h0.detach().clone().requires_grad_()
    activation = ACTIVATIONS[p.options["nonlinearity"]]
    batch_sizes, ids = p.options["batch_sizes"], p.options["tokens"]
    inputs = (x if ids is None else x[ids]) + bias
    outs, last = [], []
    for d, backwards in enumerate(p.options["reverse"]):
        H = weights[d].shape[0]
        out, state = walk(
            inputs[..., d * H : (d + 1) * H],
            inputs.new_zeros(p.grad_h_n.shape[1:]) if h0 is None else h0[d],
            lambda x, h, weight=weights[d]: activation(x + h @ weight.T),
            reverse=backwards,
            batch_sizes=batch_sizes,
        )
        outs.append(out)
        last.append(state)
    out, h_n = torch.cat(outs, -1), torch.stack(last)
    loss = (out * p.grad_out).sum() + (h_n * p.grad_h_n).sum()
    return [out.detach(), h_n.detach(), *torch.autograd.grad(loss, leaves if h0 is None else [*leaves, h0])]


def rounded_scales(p: ElmanProblem) -> list[torch.Tensor]:
    """What the errors of gradients from rounded states compare with, in the order of `oracle`: of p in fp64, by tanh.

    That is, with s the gradient of a state, the largest entry of |s|, of the sums of |s_t|^T |h_{t-1}|, of the sum of
    |s| and of |s_1| |W|, for the gradients of x, each weight, a bias and h0.
    """
    of_x, of_weights, of_bias, of_h0 = [], [], [], []
    by_direction = (tensor.chunk(len(p.weight_hh), -1) for tensor in (oracle(p)[0], p.grad_out))
    given = zip(*by_direction, p.weight_hh, p.h0, p.grad_h_n, p.options["reverse"], strict=True)
    for out, grad_out, weight, h0, carried, backwards in given:
        out, grad_out = (t.flip(0) if backwards else t for t in (out, grad_out))
        grads = []
        for h, grad in zip(out.flip(0), grad_out.flip(0), strict=True):
            grads.append((grad + carried).abs())
            carried = ((grad + carried) * (1 - h**2)) @ weight
        s, before = torch.stack(grads).flip(0), torch.cat((h0[None], out[:-1])).abs()
        of_x.append(s.max())
        of_weights.append((s.flatten(0, 1).T @ before.flatten(0, 1)).max())
        of_bias.append(s.sum((0, 1)).max())
        of_h0.append((s[0] @ weight.abs()).max())
    return [max(of_x), *of_weights, max(of_bias), max(of_h0)]


def torch_rnn(p: ElmanProblem) -> list[torch.Tensor]:
    """The same from torch.nn.RNN in p's dtype: both its directions, the input through an identity as weight_ih."""
    D, H = len(p.weight_hh), p.weight_hh[0].shape[0]
    reverse, batch_sizes, ids = p.options["reverse"], p.options["batch_sizes"], p.options["tokens"]
    leaves = [t.detach().clone().requires_grad_() for t in (p.x, *p.weight_hh, p.bias[0])]
    h0 = None if p.h0 is None else p.h0.detach().clone().requires_grad_()
    rnn = torch.nn.RNN(D * H, H, bidirectional=True, nonlinearity=p.options["nonlinearity"])
    rnn.to(p.x.device, p.x.dtype)
    parameters = {name: torch.zeros_like(value) for name, value in rnn.named_parameters()}
    states = [p.x.new_zeros(p.grad_h_n.shape[1:]) for _ in range(2)]
    for d, backwards in enumerate(reverse):
        suffix = "_reverse" if backwards else ""
        identity = torch.eye(D * H, dtype=p.x.dtype, device=p.x.device)[d * H : (d + 1) * H]
        units = slice(d * H, (d + 1) * H)
        parameters |= {f"weight_ih_l0{suffix}": identity, f"weight_hh_l0{suffix}": leaves[1 + d]}
        parameters |= {f"bias_ih_l0{suffix}": leaves[-1][units], f"bias_hh_l0{suffix}": p.bias[1, units]}
        if h0 is not None:
            states[backwards] = h0[d]
    inputs = leaves[0] if ids is None else leaves[0][ids]
    if batch_sizes is not None:
        inputs = torch.nn.utils.rnn.PackedSequence(inputs, batch_sizes)
    out, h_n = torch.func.functional_call(rnn, parameters, (inputs, torch.stack(states)))
    out = out if batch_sizes is None else out.data
    out = torch.cat([out[..., backwards * H : (backwards + 1) * H] for backwards in reverse], -1)
    h_n = torch.stack([h_n[int(backwards)] for backwards in reverse])
    loss = (out * p.grad_out).sum() + (h_n * p.grad_h_n).sum()
    return [out.detach(), h_n.detach(), *torch.autograd.grad(loss, leaves if h0 is None else [*leaves, h0])]


def biases(p: ElmanProblem) -> dict:
    """bias_ih and bias_hh, one tensor a direction."""
    return {name: each.chunk(len(p.weight_hh)) for name, each in zip(("bias_ih", "bias_hh"), p.bias, strict=True)}


def check(p: ElmanProblem, found: list[torch.Tensor]) -> None:
    """At most twice torch.nn.RNN's own error, and 4 units of the dtype's precision for where that is next to none.

    found: out, h_n, gradients of x, weight_hh, a bias and h0, as `oracle` returns them.
    """
    exact = oracle(p.to(torch.float64))
    slack = 4 * torch.finfo(p.x.dtype).eps
    names = ["out", "h_n", "grad_x", *(f"grad_weight_hh[{d}]" for d in range(len(p.weight_hh))), "grad_bias", "grad_h0"]
    if p.x.dtype == torch.float64:
        bounds = [32 * torch.finfo(torch.float64).eps] * len(found)
    else:
        bounds = [2 * error(theirs, right) + slack for theirs, right in zip(torch_rnn(p), exact, strict=True)]
    for name, ours, right, bound in zip(names, found, exact, bounds, strict=False):
        assert ours.shape == right.shape
        assert ours.dtype == p.x.dtype
        assert error(ours, right) <= bound, name


def native_forward(x, weight_hh, h0=None, *, bias_ih=None, bias_hh=None, **options):
    """native.elman_forward with the biases added to the input before it, where on a CPU the projection adds them."""
    if bias_ih is not None:
        x = x + (torch.cat(list(bias_ih)) + torch.cat(list(bias_hh)))
    return native.elman_forward(x, weight_hh, h0, **options)


def native_backward(*arguments, need_bias_grad=True, **options):
    """native.elman_backward with the gradient of a bias, the sum of the input's or of the table's."""
    grads = native.elman_backward(*arguments, **options)
    return *grads, grads[0].flatten(0, -2).sum(0, dtype=torch.float64).to(grads[0]) if need_bias_grad else None


def _on_grid(forward, of_type, weight_hh, tile, steps_per_launch, nonlinearity="tanh", **_) -> Pass | None:
    if tile is None:
        return None
    sizes = (weight_hh[0].shape[0], of_type.dtype, of_type.device, nonlinearity == "tanh")
    return grid_pass(forward, tile, *sizes, steps_per_launch)


def grid_forward(x, weight_hh, h0=None, *, tile=None, steps_per_launch=None, **options):
    """elman_forward across the chip by a tile (None: the chosen one), so many steps a launch."""
    how = _on_grid(True, x, weight_hh, tile, steps_per_launch, **options)
    return elman_forward(x, weight_hh, h0, how=how, **options)


def grid_backward(grad_out, grad_h_n, out, weight_hh, h0=None, *, tile=None, steps_per_launch=None, **options):
    """elman_backward likewise."""
    how = _on_grid(False, out, weight_hh, tile, steps_per_launch, **options)
    return elman_backward(grad_out, grad_h_n, out, weight_hh, h0, how=how, **options)


@dataclass(frozen=True)
class Launchers:
    """elman_forward and elman_backward of one backend, with the signature of kernels/triton/elman.py."""

    name: str
    device: torch.device
    forward: Callable
    backward: Callable
    H: int = 7  # a hidden size that fills no tile; across the chip, two programs
    tiles: Mapping[torch.dtype, GridTile] = field(default_factory=dict)  # across the chip

    def problem(self, *arguments, **options) -> ElmanProblem:
        p = make_problem(*arguments, **options, device=self.device)
        if self.tiles:
            p.options["tile"] = self.tiles[p.x.dtype]
        return p

    def results(self, p: ElmanProblem, **options) -> list[torch.Tensor]:
        """What the launchers make of a problem, in the order of `oracle`."""
        options = p.options | options
        out, h_n = self.forward(p.x, p.weight_hh, p.h0, **biases(p), **options)
        if options["tokens"] is not None:
            options["num_tokens"] = p.x.shape[0]
        grads = self.backward(p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0, **options)
        grad_x, grad_weight, grad_h0, grad_bias = grads
        assert options["tokens"] is not None or grad_x.stride() == out.stride()
        return [out, h_n, grad_x, *grad_weight, grad_bias, *([] if p.h0 is None else [grad_h0])]

    def check(self, p: ElmanProblem, **options) -> None:
        check(p, self.results(p, **options))


MMA = GridTile("mma", 16, 8, 4, 1.0, "test")
MMA3 = GridTile("mma3", 16, 8, 2, 1.0, "test")
FMA = GridTile("fma", 16, 2, 4, 1.0, "test")
NATIVE = Launchers("native", CPU, native_forward, native_backward)
TRITON = Launchers("triton", DEVICE, elman_forward, elman_backward)
GRID_TILE = {torch.float32: MMA3, torch.bfloat16: MMA, torch.float16: MMA, torch.float64: FMA}
GRID = Launchers("grid", DEVICE, grid_forward, grid_backward, 31, GRID_TILE)


def options_of(case: int) -> dict:
    """Options number `case`: each takes every value, in changing company."""
    return {
        "tokens": case % 2 == 1,
        "packed": case // 2 % 2 == 1,
        "with_h0": case % 3 != 0,
        "reverse": DIRECTIONS[(case // 4 + case) % 3],
        "nonlinearity": "relu" if case % 5 in (1, 4) else "tanh",
        "batch_first": case % 7 in (0, 3, 5),
        "seed": case,
    }

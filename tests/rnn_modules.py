"""What the tests of FusedRNN beside torch.nn.RNN share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import FusedRNN

OPTIONS = {"num_layers": 2, "bidirectional": True}
# From contiguous values to the same values behind other strides.
LAYOUTS = {
    "plain": lambda x: x,
    "first two turned": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last two turned": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "all turned": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every other column": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "every other step": lambda x: torch.stack([x, -x], dim=1)[:, 0],
    "columns of a wider tensor": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "one step for all": lambda x: x[:1].expand(x.shape),
    "one sequence for all": lambda x: x[:, :1].expand(x.shape),
    "one column for all": lambda x: x[..., :1].expand(x.shape),
    "an offset": lambda x: torch.cat([x[:1], x])[1:],
}


class OneHotRNN(nn.RNN):
    """forward_tokens by torch."""

    def forward_tokens(self, tokens: Any, hx: Tensor | None = None) -> Any:
        rows = self.rows_of(tokens.data if isinstance(tokens, PackedSequence) else tokens)
        return self(tokens._replace(data=rows) if isinstance(tokens, PackedSequence) else rows, hx)

    def rows_of(self, ids: Tensor) -> Tensor:
        return one_hot(ids, self.input_size, self.weight_ih_l0.dtype)


def one_hot(ids: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """torch.nn.functional.one_hot, which looks at the ids and so cannot be traced."""
    rows = torch.zeros(*ids.shape, classes, dtype=dtype, device=ids.device)
    return rows.scatter(-1, ids.long().unsqueeze(-1), 1)


def pair(*sizes, kind=OneHotRNN, backend="auto", seed=0, checkpoint_steps=None, **options):
    """A torch.nn.RNN and the FusedRNN of the same seed."""
    torch.manual_seed(seed)
    theirs = kind(*sizes, **options)
    torch.manual_seed(seed)
    return theirs, FusedRNN(*sizes, **options, backend=backend, checkpoint_steps=checkpoint_steps)


def drawn(rnn, steps, batch, with_state=True, seed=2):
    """Input and h0 (or None) of a module's type, on its device; both want a gradient."""
    torch.manual_seed(seed)
    like = {"dtype": rnn.weight_ih_l0.dtype, "device": rnn.weight_ih_l0.device, "requires_grad": True}
    x = torch.randn(*((batch, steps) if rnn.batch_first else (steps, batch)), rnn.input_size, **like)
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    return x, torch.randn(layers, batch, rnn.hidden_size, **like) if with_state else None


def plain(result):
    """(output, h_n) as plain tensors, output of a PackedSequence by its data."""
    output, h_n = result
    return (output.data if isinstance(output, PackedSequence) else output), h_n


def loss_of(result):
    """Of both results; no two elements of the output have the same weight."""
    output, h_n = (y.double() for y in plain(result))
    weight = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device)
    return (output * weight.view(output.shape)).sin().sum() + (h_n * h_n.cos()).sum()


def gradients(module, result, *leaves, **options):
    return torch.autograd.grad(loss_of(result), [*leaves, *module.parameters()], **options)


def differentiated(module, result, *leaves, **options):
    """The results as plain tensors, and then the gradients of leaves and of the module's parameters."""
    return [*plain(result), *gradients(module, result, *leaves, **options)]


def assert_same(ours, theirs, *given, **tolerances):
    """Two modules give the same results and gradients, also those of what is given and wants one."""
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    found, expected = (differentiated(module, module(*given), *leaves) for module in (ours, theirs))
    torch.testing.assert_close(found, expected, **tolerances)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

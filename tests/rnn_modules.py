"""What the tests of FusedRNN beside torch.nn.RNN share."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import FusedRNN

OPTIONS = {"num_layers": 2, "bidirectional": True}


def pair(*sizes, backend="auto", seed=0, checkpoint_steps=None, **options):
    """A torch.nn.RNN and the FusedRNN of the same seed."""
    torch.manual_seed(seed)
    theirs = nn.RNN(*sizes, **options)
    torch.manual_seed(seed)
    return theirs, FusedRNN(*sizes, **options, backend=backend, checkpoint_steps=checkpoint_steps)


def drawn(rnn, steps, batch, with_state=True):
    """Input and h0 (or None) of a module's type, on its device; both want a gradient."""
    torch.manual_seed(2)
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


def one_hot(ids, size=3, dtype=torch.float32):
    if isinstance(ids, PackedSequence):
        return ids._replace(data=one_hot(ids.data, size, dtype))
    return F.one_hot(ids.long(), size).to(dtype)


def on_tokens(module, ids, hx=None):
    """A FusedRNN on token ids, a torch.nn.RNN on the rows that they stand for."""
    if isinstance(module, FusedRNN):
        return module.forward_tokens(ids, hx)
    return module(one_hot(ids, module.input_size, module.weight_ih_l0.dtype), hx)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

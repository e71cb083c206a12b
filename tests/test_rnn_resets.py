"""forward_with_resets against torch.nn.RNN, run from reset to reset, and its gradients."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from charrnn_fast import FusedRNN
from charrnn_fast.ops.resets import episodes

T, B = 9, 4
FORMS = {
    "plain": {},
    "deep": {"num_layers": 2, "nonlinearity": "relu"},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True, "bias": False},
}


def mask(probability: float, seed: int = 0) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < probability


def by_stretches(rnn: nn.RNN, x: Tensor, resets: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each sequence alone, one call from each reset to the next; x (T, B, I), resets (T, B)."""
    outputs, states = [], []
    for b in range(x.shape[1]):
        cuts = [0, *(t for t in range(1, len(x)) if resets[t, b]), len(x)]
        state = None if hx is None or resets[0, b] else hx[:, b : b + 1]
        parts = []
        for begin, end in itertools.pairwise(cuts):
            rows = x[begin:end, b : b + 1]
            out, last = rnn(rows.transpose(0, 1) if rnn.batch_first else rows, state)
            parts.append(out.transpose(0, 1) if rnn.batch_first else out)
            state = None
        outputs.append(torch.cat(parts))
        states.append(last)
    return torch.cat(outputs, 1), torch.cat(states, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("with_state", [False, True])
def test_as_torch_run_from_reset_to_reset(backend, device, form, probability, with_state):
    torch.manual_seed(1)
    ours = FusedRNN(3, 5, backend=backend, **FORMS[form]).to(device, torch.float64)
    theirs = nn.RNN(3, 5, **FORMS[form]).to(device, torch.float64)
    theirs.load_state_dict(ours.state_dict())
    resets = mask(probability, seed=len(form)).to(device)
    x = torch.randn(T, B, 3, dtype=torch.float64, device=device, requires_grad=True)
    layers = ours.num_layers * (2 if ours.bidirectional else 1)
    hx = torch.randn(layers, B, 5, dtype=torch.float64, device=device, requires_grad=True) if with_state else None
    leaves = [x] if hx is None else [x, hx]
    turned = (x.transpose(0, 1), resets.t()) if ours.batch_first else (x, resets)
    out, last = ours.forward_with_resets(*turned, hx)
    out = out.transpose(0, 1) if ours.batch_first else out
    results = []
    for rnn, (y, h_n) in ((ours, (out, last)), (theirs, by_stretches(theirs, x, resets, hx))):
        loss = (y * torch.arange(1.0, y.numel() + 1, device=device).view_as(y)).sum() + h_n.cos().sum()
        grads = torch.autograd.grad(loss, [*leaves, *rnn.parameters()], allow_unused=True, materialize_grads=True)
        results.append([y, h_n, *grads])
    torch.testing.assert_close(*results)


def test_gradcheck(backend, device):
    rnn = FusedRNN(2, 3, backend=backend, dtype=torch.float64, device=device)
    x = torch.randn(4, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    hx = torch.randn(1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    resets = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.bool, device=device)
    assert torch.autograd.gradcheck(lambda x, hx: rnn.forward_with_resets(x, resets, hx), (x, hx))


def test_no_resets_is_forward():
    rnn, x, hx = FusedRNN(3, 5), torch.randn(T, B, 3), torch.randn(1, B, 5)
    torch.testing.assert_close(rnn.forward_with_resets(x, torch.zeros(T, B, dtype=torch.bool), hx), rnn(x, hx))


def test_nothing_to_walk():
    rnn = FusedRNN(3, 5)
    output, h_n = rnn.forward_with_resets(torch.randn(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool))
    assert output.shape == (2, 0, 5) and h_n.shape == (1, 0, 5)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        rnn.forward_with_resets(torch.randn(0, 2, 3), torch.zeros(0, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("x", "resets", "message"),
    [
        (torch.randn(T, 3), torch.zeros(T, dtype=torch.bool), "batched 3-D"),
        (torch.randn(T, B, 3), torch.zeros(T, B), r"resets: expected bool \(9, 4\) on cpu, got torch.float32"),
        (torch.randn(T, B, 3), torch.zeros(B, T, dtype=torch.bool), r"got torch.bool \(4, 9\)"),
        (torch.randn(T, B, 3), torch.zeros(T, B, dtype=torch.bool, device="meta"), "on meta"),
    ],
)
def test_what_does_not_fit_is_named(x, resets, message):
    with pytest.raises(ValueError, match=message):
        FusedRNN(3, 5).forward_with_resets(x, resets)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        FusedRNN(3, 5).forward_with_resets(torch.randn(T, B, 3), mask(0.5), torch.zeros(1, B + 1, 5))


def test_episodes_are_every_step_once_longest_first():
    resets = mask(0.3, seed=5)
    found = episodes(resets)
    assert sorted(found.rows.tolist()) == list(range(T * B))
    assert torch.equal(found.rows[found.places], torch.arange(T * B))
    assert int(found.batch_sizes.sum()) == T * B
    assert int(found.batch_sizes[0]) == B + int(resets[1:].sum())
    assert (found.batch_sizes.diff() <= 0).all()

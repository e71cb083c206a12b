"""forward_with_lengths against packed input, and that it asks the device for nothing."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from charrnn_fast import FusedRNN

T, B = 9, 4
LENGTHS = [5, 9, 1, 7]
FORMS = {
    "plain": {},
    "deep": {"num_layers": 2, "nonlinearity": "relu"},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True, "bias": False, "bidirectional": True},
    "checkpointed": {"num_layers": 2, "bidirectional": True, "checkpoint_steps": 3},
}


def by_packing(rnn: nn.RNN, x: Tensor, lengths: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
    packed = pack_padded_sequence(x, lengths.cpu(), rnn.batch_first, enforce_sorted=False)
    output, h_n = rnn(packed, hx)
    return pad_packed_sequence(output, rnn.batch_first, total_length=x.shape[1 if rnn.batch_first else 0])[0], h_n


def problem(rnn: nn.RNN, with_state: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(2)
    weight = rnn.weight_ih_l0
    x = weight.new_empty(*((B, T) if rnn.batch_first else (T, B)), 3).normal_().requires_grad_()
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    hx = weight.new_empty(layers, B, 5).normal_().requires_grad_() if with_state else None
    return x, torch.tensor(LENGTHS, device=weight.device), hx


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [False, True])
def test_as_torch_on_packed_input(backend, device, form, with_state):
    options = dict(FORMS[form])
    torch.manual_seed(1)
    ours = FusedRNN(3, 5, backend=backend, **options).to(device, torch.float64)
    options.pop("checkpoint_steps", None)
    theirs = nn.RNN(3, 5, **options).to(device, torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x, lengths, hx = problem(ours, with_state)
    leaves = [x] if hx is None else [x, hx]
    results = []
    for rnn, (y, h_n) in (
        (ours, ours.forward_with_lengths(x, lengths, hx)),
        (theirs, by_packing(theirs, x, lengths, hx)),
    ):
        weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=device).view(y.shape)
        loss = (y * weight).sin().sum() + h_n.cos().sum()
        results.append([y, h_n, *torch.autograd.grad(loss, [*leaves, *rnn.parameters()])])
    torch.testing.assert_close(*results)


def test_gradcheck(backend, device):
    rnn = FusedRNN(2, 3, backend=backend, dtype=torch.float64, device=device, bidirectional=True)
    x = torch.randn(4, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    hx = torch.randn(2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    lengths = torch.tensor([2, 4], device=device)
    check = torch.autograd.gradcheck
    assert check(lambda x, hx: rnn.forward_with_lengths(x, lengths, hx), (x, hx), fast_mode=True)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_lies_beyond_a_length_is_not_read(bidirectional):
    rnn = FusedRNN(3, 5, bidirectional=bidirectional)
    x, lengths, hx = problem(rnn)
    spoilt = x.detach().clone()
    for b, length in enumerate(LENGTHS):
        spoilt[length:, b] = float("nan")
    spoilt.requires_grad_()
    found = []
    for given in (x, spoilt):
        results = rnn.forward_with_lengths(given, lengths, hx)
        loss = sum(y.sin().sum() for y in results)
        found.append([*results, *torch.autograd.grad(loss, [given, hx, *rnn.parameters()])])
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize("with_state", [False, True])
def test_an_empty_sequence_ends_as_it_began(with_state):
    rnn = FusedRNN(3, 5, 2, bidirectional=True)
    x, lengths, hx = problem(rnn, with_state)
    lengths[2] = 0
    output, h_n = rnn.forward_with_lengths(x, lengths, hx)
    assert torch.equal(output[:, 2], torch.zeros(T, 10))
    assert torch.equal(h_n[:, 2], torch.zeros(4, 5) if hx is None else hx[:, 2])
    others = rnn.forward_with_lengths(x[:, :2], lengths[:2], None if hx is None else hx[:, :2])
    torch.testing.assert_close((output[:, :2], h_n[:, :2]), others)
    sum(y.sum() for y in (output, h_n)).backward()
    assert all(p.grad.isfinite().all() for p in rnn.parameters())


class NoHost(TorchDispatchMode):
    """Refuses what waits for a device: a number read, a copy to another device, sizes that depend on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_to_copy",
            "copy_",
            "repeat_interleave",
            "is_nonzero",
        )
        name = func.overloadpacket.__name__
        moved = name in ("_to_copy", "copy_") and (kwargs or {}).get("device") is None
        assert name not in waits or moved, name
        assert (kwargs or {}).get("device") in (None, torch.device("meta"))
        return func(*args, **(kwargs or {}))


def test_nothing_is_asked_of_the_device():
    """On a device without numbers; and the mode notices what packing does."""
    rnn = FusedRNN(3, 5, 2, bidirectional=True, device="meta")
    x, lengths = torch.empty(T, B, 3, device="meta"), torch.empty(B, dtype=torch.int64, device="meta")
    with NoHost():
        output, h_n = rnn.forward_with_lengths(x, lengths)
        (output.sum() + h_n.sum()).backward()
    with pytest.raises(AssertionError), NoHost():
        rnn.forward_with_resets(x, torch.empty(T, B, dtype=torch.bool, device="meta"))


@pytest.mark.filterwarnings("ignore")
def test_one_compiled_graph():
    """With the kernels; a number that is read, or a size that depends on lengths, would break it."""
    torch._dynamo.reset()
    rnn = FusedRNN(3, 5, 2, bidirectional=True, backend="native", checkpoint_steps=4)
    run = torch.compile(rnn.forward_with_lengths, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, lengths in ((9, [5, 9, 1, 7]), (12, [3, 12, 12, 5, 6])):
        x, lengths = torch.randn(steps, len(lengths), 3), torch.tensor(lengths)
        found, expected = run(x, lengths), rnn.forward_with_lengths(x, lengths)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(sum(y.sum() for y in of), list(rnn.parameters())) for of in (found, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        (torch.randn(T, 3), torch.tensor([3]), "batched 3-D"),
        (torch.randn(T, B, 3), torch.ones(B), r"lengths: expected int64 \(4,\) on cpu, got torch.float32 \(4,\)"),
        (torch.randn(T, B, 3), torch.ones(B + 1, dtype=torch.int64), r"got torch.int64 \(5,\)"),
        (torch.randn(T, B, 3), torch.ones(B, dtype=torch.int64, device="meta"), "on meta"),
        (torch.randn(T, B, 3), torch.tensor([1, 2, 10, 3]), "lengths: expected 0 to 9, got 10"),
        (torch.randn(T, B, 3), torch.tensor([1, -2, 9, 3]), "lengths: expected 0 to 9, got -2"),
    ],
)
def test_what_does_not_fit_is_named(x, lengths, message):
    with pytest.raises(ValueError, match=message):
        FusedRNN(3, 5).forward_with_lengths(x, lengths)


def test_nothing_to_walk():
    rnn = FusedRNN(3, 5)
    output, h_n = rnn.forward_with_lengths(torch.randn(2, 0, 3), torch.zeros(0, dtype=torch.int64))
    assert output.shape == (2, 0, 5) and h_n.shape == (1, 0, 5)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        rnn.forward_with_lengths(torch.randn(0, 2, 3), torch.zeros(2, dtype=torch.int64))

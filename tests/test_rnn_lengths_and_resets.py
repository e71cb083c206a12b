"""forward_with_lengths against torch.nn.RNN on packed input, and that it asks the device for nothing; and
forward_with_resets against torch.nn.RNN run from reset to reset.
"""

import itertools

import pytest
import torch
from rnn_modules import differentiated, drawn, pair
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from charrnn_fast import FusedRNN
from charrnn_fast.ops.resets import episodes

T, B = 9, 4
LENGTHS = [5, 9, 1, 7]
FORMS = {
    "plain": {},
    "deep": {"num_layers": 2, "nonlinearity": "relu"},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True, "bias": False, "bidirectional": True},
    "checkpointed": {"num_layers": 2, "bidirectional": True, "checkpoint_steps": 3},
}


def mask(probability: float, seed: int = 0) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < probability


def by_packing(rnn: nn.RNN, x: Tensor, lengths: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
    packed = pack_padded_sequence(x, lengths.cpu(), rnn.batch_first, enforce_sorted=False)
    output, h_n = rnn(packed, hx)
    return pad_packed_sequence(output, rnn.batch_first, total_length=x.shape[1 if rnn.batch_first else 0])[0], h_n


def by_stretches(rnn: nn.RNN, x: Tensor, resets: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each sequence alone, one call from each reset to the next."""
    outputs, states = [], []
    for b, row in enumerate(resets if rnn.batch_first else resets.T):
        cuts = [0, *(t for t in range(1, len(row)) if row[t]), len(row)]
        state = None if hx is None or row[0] else hx[:, b]
        parts = []
        for begin, end in itertools.pairwise(cuts):
            out, last = rnn((x[b] if rnn.batch_first else x[:, b])[begin:end], state)
            parts.append(out)
            state = None
        outputs.append(torch.cat(parts))
        states.append(last)
    return torch.stack(outputs, 0 if rnn.batch_first else 1), torch.stack(states, 1)


def check_alike(backend, device, form, with_state, method, by_torch, more) -> None:
    """A method of ours and torch's module run in its stead: results and gradients."""
    theirs, ours = pair(3, 5, backend=backend, device=device, dtype=torch.float64, **FORMS[form])
    more = (more.T if more.dim() == 2 and ours.batch_first else more).to(device)
    x, hx = drawn(ours, T, B, with_state)
    leaves = [x] if hx is None else [x, hx]
    results = []
    for rnn, result in ((ours, getattr(ours, method)(x, more, hx)), (theirs, by_torch(theirs, x, more, hx))):
        results.append(differentiated(rnn, result, *leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [False, True])
def test_lengths_as_torch_on_packed_input(backend, device, form, with_state):
    check_alike(backend, device, form, with_state, "forward_with_lengths", by_packing, torch.tensor(LENGTHS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("with_state", [False, True])
def test_resets_as_torch_run_from_reset_to_reset(backend, device, form, probability, with_state):
    resets = mask(probability, seed=len(form))
    check_alike(backend, device, form, with_state, "forward_with_resets", by_stretches, resets)


LENGTHS_OR_RESETS = [
    ("forward_with_lengths", torch.tensor([2, 4])),
    ("forward_with_resets", torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.bool)),
]


@pytest.mark.parametrize(("method", "more"), LENGTHS_OR_RESETS)
def test_gradcheck(backend, device, method, more):
    rnn = FusedRNN(2, 3, backend=backend, dtype=torch.float64, device=device, bidirectional=True)
    more, call = more.to(device), getattr(rnn, method)
    assert torch.autograd.gradcheck(lambda x, hx: call(x, more, hx), drawn(rnn, 4, 2), fast_mode=True)


@pytest.mark.parametrize(
    ("method", "x", "more", "message"),
    [
        ("lengths", (T, 3), torch.tensor([3]), "batched 3-D"),
        ("lengths", (T, B, 3), torch.ones(B), r"lengths: expected int64 \(4,\) on cpu, got torch.float32 \(4,\)"),
        ("lengths", (T, B, 3), torch.ones(B + 1, dtype=torch.int64), r"got torch.int64 \(5,\)"),
        ("lengths", (T, B, 3), torch.ones(B, dtype=torch.int64, device="meta"), "on meta"),
        ("lengths", (T, B, 3), torch.tensor([1, 2, 10, 3]), "lengths: expected 0 to 9, got 10"),
        ("lengths", (T, B, 3), torch.tensor([1, -2, 9, 3]), "lengths: expected 0 to 9, got -2"),
        ("resets", (T, 3), torch.zeros(T, dtype=torch.bool), "batched 3-D"),
        ("resets", (T, B, 3), torch.zeros(T, B), r"resets: expected bool \(9, 4\) on cpu, got torch.float32"),
        ("resets", (T, B, 3), torch.zeros(B, T, dtype=torch.bool), r"got torch.bool \(4, 9\)"),
        ("resets", (T, B, 3), torch.zeros(T, B, dtype=torch.bool, device="meta"), "on meta"),
    ],
)
def test_what_does_not_fit_is_named(method, x, more, message):
    with pytest.raises(ValueError, match=message):
        getattr(FusedRNN(3, 5), f"forward_with_{method}")(torch.randn(x), more)


def test_a_state_that_does_not_fit_is_named():
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        FusedRNN(3, 5).forward_with_resets(torch.randn(T, B, 3), mask(0.5), torch.zeros(1, B + 1, 5))


@pytest.mark.parametrize(("method", "more"), LENGTHS_OR_RESETS)
def test_nothing_to_walk(method, more):
    rnn = FusedRNN(3, 5)
    output, h_n = getattr(rnn, method)(torch.randn(4, 0, 3), more[..., :0])
    assert output.shape == (4, 0, 5) and h_n.shape == (1, 0, 5)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        getattr(rnn, method)(torch.randn(0, 2, 3), torch.zeros_like(more) if more.dim() == 1 else more[:0])


# ---- lengths alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_lies_beyond_a_length_is_not_read(bidirectional):
    rnn = FusedRNN(3, 5, bidirectional=bidirectional)
    (x, hx), lengths = drawn(rnn, T, B), torch.tensor(LENGTHS)
    spoilt = x.detach().clone()
    for b, length in enumerate(LENGTHS):
        spoilt[length:, b] = float("nan")
    spoilt.requires_grad_()
    found = []
    for given in (x, spoilt):
        output, h_n = rnn.forward_with_lengths(given, lengths, hx)
        found.append(differentiated(rnn, (output, h_n), given, hx))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("with_state", [False, True])
def test_an_empty_sequence_ends_as_it_began(with_state):
    rnn = FusedRNN(3, 5, 2, bidirectional=True)
    (x, hx), lengths = drawn(rnn, T, B, with_state), torch.tensor(LENGTHS)
    lengths[2] = 0
    output, h_n = rnn.forward_with_lengths(x, lengths, hx)
    assert torch.equal(output[:, 2], torch.zeros(T, 10))
    assert torch.equal(h_n[:, 2], torch.zeros(4, 5) if hx is None else hx[:, 2])
    others = rnn.forward_with_lengths(x[:, :2], lengths[:2], None if hx is None else hx[:, :2])
    torch.testing.assert_close((output[:, :2], h_n[:, :2]), others)
    sum(y.sum() for y in (output, h_n)).backward()
    assert all(p.grad.isfinite().all() for p in rnn.parameters())


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_to_copy", "copy_", "repeat_interleave", "is_nonzero"}


class NoHost(TorchDispatchMode):
    """Refuses what waits for a device: a number read, a copy to another device, sizes that depend on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        moved = name in ("_to_copy", "copy_") and (kwargs or {}).get("device") is None
        assert name not in WAITS or moved, name
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
        results = run(x, lengths), rnn.forward_with_lengths(x, lengths)
        torch.testing.assert_close(*(differentiated(rnn, result) for result in results))


# ---- resets alone -------------------------------------------------------------------------------------------------


def test_no_resets_is_forward():
    rnn, x, hx = FusedRNN(3, 5), torch.randn(T, B, 3), torch.randn(1, B, 5)
    torch.testing.assert_close(rnn.forward_with_resets(x, torch.zeros(T, B, dtype=torch.bool), hx), rnn(x, hx))


def test_episodes_are_every_step_once_longest_first():
    resets = mask(0.3, seed=5)
    found = episodes(resets)
    assert sorted(found.rows.tolist()) == list(range(T * B))
    assert torch.equal(found.rows[found.places], torch.arange(T * B))
    assert int(found.batch_sizes.sum()) == T * B
    assert int(found.batch_sizes[0]) == B + int(resets[1:].sum())
    assert (found.batch_sizes.diff() <= 0).all()

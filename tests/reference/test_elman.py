"""The reference recurrence against torch.nn.RNN in fp64: outputs, states, every gradient."""

import pytest
import torch

from charrnn_fast.reference.elman import elman, elman_stack


def _cells_of(rnn: torch.nn.RNN) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """W_xh, W_hh, b_h of each layer as functions of torch.nn.RNN's parameters, so that gradients reach those."""
    return [
        (
            getattr(rnn, f"weight_ih_l{layer}").T,
            getattr(rnn, f"weight_hh_l{layer}").T,
            getattr(rnn, f"bias_ih_l{layer}") + getattr(rnn, f"bias_hh_l{layer}"),
        )
        for layer in range(rnn.num_layers)
    ]


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(("T", "B", "I", "H", "L"), [(5, 3, 4, 6, 1), (7, 2, 5, 3, 3), (1, 1, 1, 1, 2)])
def test_matches_torch_rnn(nonlinearity, T, B, I, H, L):  # noqa: E741 - the field's names
    torch.manual_seed(T)
    rnn = torch.nn.RNN(I, H, L, nonlinearity=nonlinearity, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(L, B, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(T, B, H, dtype=torch.float64), torch.randn(L, B, H, dtype=torch.float64)
    inputs = [x, h0, *rnn.parameters()]

    def results(outputs, states):
        loss = (outputs * weight[0]).sum() + (states * weight[1]).sum()
        return [outputs, states, *torch.autograd.grad(loss, inputs)]

    ours = results(*elman_stack(x, h0, _cells_of(rnn), nonlinearity))
    theirs = results(*rnn(x, h0))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_no_steps_returns_the_state_it_was_given():
    state = torch.randn(2, 3)
    outputs, last = elman(torch.empty(0, 2, 4), state, torch.randn(4, 3), torch.randn(3, 3), torch.randn(3))
    assert outputs.shape == (0, 2, 3)
    assert torch.equal(last, state)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_packed_rows_and_token_ids_either_way(reverse, tokens):
    """Against torch.nn.RNN's two directions, and against each sequence walked alone."""
    torch.manual_seed(3)
    rnn = torch.nn.RNN(4, 5, bidirectional=True, dtype=torch.float64)
    ids = [torch.randint(4, (n,)) for n in (6, 4, 4, 1)]
    sequences = [torch.nn.functional.one_hot(i, 4).double() for i in ids]
    packed = torch.nn.utils.rnn.pack_sequence(sequences)
    h0 = torch.randn(2, 4, 5, dtype=torch.float64)
    output, h_n = rnn(packed, h0)
    suffix = "_l0_reverse" if reverse else "_l0"
    weights = [getattr(rnn, f"weight_ih{suffix}").T, getattr(rnn, f"weight_hh{suffix}").T]
    bias = getattr(rnn, f"bias_ih{suffix}") + getattr(rnn, f"bias_hh{suffix}")
    given = torch.nn.utils.rnn.pack_sequence(ids) if tokens else packed
    ours, last = elman(given.data, h0[int(reverse)], *weights, bias, reverse=reverse, batch_sizes=packed.batch_sizes)
    torch.testing.assert_close(ours, output.data[:, 5 * reverse : 5 * reverse + 5])
    torch.testing.assert_close(last, h_n[int(reverse)])
    for row, sequence in enumerate(ids if tokens else sequences):
        alone, end = elman(sequence[:, None], h0[int(reverse), row : row + 1], *weights, bias, reverse=reverse)
        torch.testing.assert_close(end[0], last[row])
        assert len(alone) == len(sequence)

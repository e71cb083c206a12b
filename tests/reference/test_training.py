"""The reference training loop: its optimisers against torch.optim, carried state, and the graph kept across batches."""

import pytest
import torch

from charrnn_fast.reference import training
from charrnn_fast.reference.language_model import RNNLM


def _net() -> RNNLM:
    return RNNLM.from_scratch(6, 4, 2, sigma=0.5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _batches(count: int, B: int = 3, T: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens = torch.randint(6, (B, count * T + 1), generator=torch.Generator().manual_seed(1))
    return [(tokens[:, i * T : i * T + T], tokens[:, i * T + 1 : i * T + T + 1]) for i in range(count)]


@pytest.mark.parametrize(("ours", "theirs"), [(training.SGD, torch.optim.SGD), (training.Adam, torch.optim.Adam)])
def test_optimisers_match_torch(ours, theirs):
    a = [torch.ones(3, dtype=torch.float64), torch.full((2, 2), -1.0, dtype=torch.float64)]
    b = [p.clone() for p in a]
    first, second = ours(a, 0.1), theirs(b, 0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert p.grad is None


def test_carried_state_continues_and_zero_state_does_not():
    batches = _batches(2)
    whole = torch.cat([X for X, _ in batches], 1), torch.cat([Y for _, Y in batches], 1)
    net = _net()
    carried = [loss for loss, _ in training.evaluate_batches(net, batches, carry_state=True)]
    separate = [loss for loss, _ in training.evaluate_batches(net, batches)]
    expected = net.loss(*whole)[0]
    torch.testing.assert_close(sum(carried) / 2, expected)
    assert carried[0] == separate[0] and carried[1] != separate[1]


def test_graph_across_batches_is_one_long_window():
    batches = _batches(4)
    kept, long = _net(), _net()
    list(
        training.train_batches(
            kept, batches, training.SGD(kept.parameters(), 0.5), None, carry_state=True, graph_batches=2
        )
    )
    joined = [
        (torch.cat([batches[i][0], batches[i + 1][0]], 1), torch.cat([batches[i][1], batches[i + 1][1]], 1))
        for i in (0, 2)
    ]
    list(training.train_batches(long, joined, training.SGD(long.parameters(), 0.5), None, carry_state=True))
    for p, q in zip(kept.parameters(), long.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_detached_state_stops_gradients_at_the_batch():
    batches = _batches(2)
    detached, kept = _net(), _net()
    list(training.train_batches(detached, batches, training.SGD(detached.parameters(), 0.5), None, carry_state=True))
    list(
        training.train_batches(
            kept, batches, training.SGD(kept.parameters(), 0.5), None, carry_state=True, graph_batches=2
        )
    )
    assert not torch.allclose(detached.W_hq, kept.W_hq)


def test_a_rest_of_a_group_is_trained_on():
    net = _net()
    before = net.W_hq.detach().clone()
    list(
        training.train_batches(
            net, _batches(1), training.SGD(net.parameters(), 0.5), 1.0, carry_state=True, graph_batches=4
        )
    )
    assert not torch.equal(before, net.W_hq)

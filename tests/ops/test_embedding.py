"""The embedding whose gradient is bitwise repeatable, and the sums of rows by id that it is made of."""

import pytest
import torch
from torch import nn

from charrnn_fast.kernels import sums_by_id
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.ops import embedding as module
from charrnn_fast.ops.embedding import _Lookup, embedding


def by_loop(rows, ids, num_ids):
    total = torch.zeros(num_ids, rows.shape[-1], dtype=torch.float64)
    for row, i in zip(rows.reshape(-1, rows.shape[-1]).double(), ids.flatten().tolist(), strict=True):
        if 0 <= i < num_ids:
            total[i] += row
    return total


@pytest.mark.parametrize("sums", [sums_by_id.sum_by_id, sums_by_id._by_products])
@pytest.mark.parametrize(("shape", "num_ids"), [((40,), 7), ((6, 9), 28), ((0,), 3), ((5,), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_by_id(sums, shape, num_ids, dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-2, num_ids + 2, shape, generator=generator)
    rows = torch.randn(*shape, 5, generator=generator, dtype=torch.float64).to(dtype)
    found = sums(rows, ids, num_ids)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found.double(), by_loop(rows, ids, num_ids), rtol=tolerance, atol=tolerance)


def test_sums_by_id_a_few_rows_at_a_time(monkeypatch):
    ids, rows = torch.arange(50) % 7, torch.ones(50, 3, dtype=torch.bfloat16)
    monkeypatch.setattr(sums_by_id, "MOST_ENTRIES", 7 * 4)
    found = sums_by_id._by_products(rows, ids.int(), 7)
    assert found.tolist() == [[8.0] * 3] + [[7.0] * 3] * 6


def test_gradients_of_the_lookup():
    ids = torch.tensor([[0, 2, 2], [1, 0, 2]])
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(_Lookup.apply(ids, weight), nn.functional.embedding(ids, weight))
    assert torch.autograd.gradcheck(lambda w: _Lookup.apply(ids, w).tanh(), weight)
    assert torch.autograd.gradgradcheck(lambda w: _Lookup.apply(ids, w).tanh(), weight)
    gradient = torch.autograd.grad(_Lookup.apply(ids, weight).sum(), weight)[0]
    assert gradient[:, 0].tolist() == [2.0, 1.0, 3.0, 0.0]


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"sparse": True}, {"scale_grad_by_freq": True}, {}])
def test_a_module_with_other_gradients_is_called(options, monkeypatch):
    """Of a device that is not there: what would be taken on it."""
    looked_up = []
    monkeypatch.setattr(_Lookup, "apply", lambda *arguments: looked_up.append(arguments) or torch.zeros(2, 3))
    monkeypatch.setattr(module, "addressable", lambda *tensors: True)

    class Ids:
        device = torch.device("cuda")

    table = nn.Embedding(5, 3, **options)
    monkeypatch.setattr(table, "forward", lambda ids: torch.ones(2, 3))
    assert bool(embedding(table, Ids()).any()) == bool(options)
    assert len(looked_up) == (not options)


def test_on_a_cpu_the_module_is_called():
    table = nn.Embedding(5, 3)
    table.register_forward_hook(lambda *arguments: torch.full((2, 3), 7.0))
    assert torch.equal(embedding(table, torch.tensor([0, 4])), torch.full((2, 3), 7.0))


def test_a_watched_embedding_of_a_model_is_called():
    model, calls = CharRNN(5, 4, embedding=3), []
    model.embed.register_forward_hook(lambda *arguments: calls.append(1))
    model(torch.tensor([[0, 1, 4]]))
    assert calls == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_few_ids_are_bitwise_equal_in_every_run(dtype):
    """The shape of recipe scratch with an embedding, where torch adds by atomics."""
    table = nn.Embedding(28, 16, device="cuda", dtype=dtype)
    ids = torch.randint(28, (1024, 32), device="cuda")
    grad = torch.randn(1024, 32, 16, device="cuda").to(dtype)
    first, *others = (torch.autograd.grad(embedding(table, ids), table.weight, grad)[0] for _ in range(30))
    assert all(torch.equal(first, other) for other in others)
    exact = by_loop(grad.cpu(), ids.cpu(), 28)
    assert (first.cpu().double() - exact).abs().max() <= 2e-2 * exact.abs().max()

"""What the C loss and decoder have alone: threads, errors; the tests of each operation have what all kernels have."""

import random

import needs
import pytest
import torch
from comparisons import by_one_thread_and_by_two, same
from generate_problems import Decoder
from loss_problems import NATIVE, REDUCTIONS
from torch import Tensor

from charrnn_fast.kernels import native

pytestmark = needs.NATIVE


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(5, 7, 28), (200, 33, 31), (777, 100, 129), (33, 256, 700), (9, 33, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_of_many_blocks_by_one_thread_and_by_two(isa, reduction, sizes, dtype):
    p = NATIVE.problem(*sizes, reduction=reduction, dtype=dtype, seed=sizes[0])
    p.target[0] = sizes[2] - 1
    NATIVE.check(p)
    results = by_one_thread_and_by_two(lambda: NATIVE.results(p))
    if sizes[2] <= 1024:  # beyond that the products are torch's
        assert same(*results)


@pytest.mark.parametrize("V", (5, 2000))
@pytest.mark.parametrize("bad", (-1, 5000))
def test_cross_entropy_target_out_of_bounds(V, bad):
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        native.linear_cross_entropy(torch.randn(3, 4), torch.randn(V, 4), None, torch.tensor([0, bad, 1]))


def decode(decoder: Decoder, *arguments, **options) -> tuple[Tensor, Tensor]:
    return decoder.run(native.generate, *arguments, device=needs.CPU, **options)


@pytest.mark.parametrize("seed", range(25))
def test_generate(isa, seed):
    rng = random.Random(seed)
    count, sizes = rng.choice((1, 2, 20)), {"B": rng.choice((1, 2, 5, 13, 30)), "P": rng.choice((1, 6)), "seed": seed}
    sizes |= {"H": rng.choice((1, 7, 32, 33, 100, 256)), "V": rng.choice((2, 28, 90)), "L": rng.choice((1, 2, 3))}
    decoder = Decoder(**sizes, nonlinearity=rng.choice(("tanh", "relu")))
    sampled, options = bool(seed % 3), {}
    if sampled:
        options = {"temperature": rng.choice((0.3, 1.0)), "alpha": rng.choice((1.0, 2.0))}
        options["top_k"] = rng.choice((None, 1, 3, 1000))
    ids, state = decoder.reference(count, sampled, **options)
    for found, last in by_one_thread_and_by_two(lambda: decode(decoder, count, sampled, **options)):
        assert torch.equal(found, ids)
        torch.testing.assert_close(last, state, rtol=1e-9, atol=1e-9)
    assert same(*by_one_thread_and_by_two(lambda: decode(decoder, count, sampled, torch.float32, **options)))


def test_generate_nothing():
    decoder = Decoder(8, 5, 2, 3, 4)
    ids, state = decode(decoder, 0, False, torch.float32)
    assert ids.shape == (3, 0) and torch.equal(state, decoder.state.float())


def test_generate_after_an_id_out_of_range():
    decoder = Decoder(8, 5, 1, 1, 2)
    decoder.prompt[0, 1] = 5
    with pytest.raises(IndexError, match="out of range"):
        decode(decoder, 3, False, torch.float32)


def test_tensors_of_two_types_are_refused_and_not_read_as_one():
    """A kernel that read the wider as the narrower would give numbers, and wrong ones."""
    x, weight, ids = torch.randn(4, 2, 3), torch.randn(3, 3), torch.zeros(4, 2, dtype=torch.int64)
    rows, head, bias = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    out, h_n = native.elman_forward(x.clone(), [weight])
    calls = [
        lambda: native.elman_forward(x, [weight.double()]),
        lambda: native.elman_forward(x, [weight], h_n.double()),
        lambda: native.elman_backward(out.double(), None, out, [weight]),
        lambda: native.elman_backward(None, h_n.double(), out, [weight]),
        lambda: native.linear_cross_entropy(rows, head, bias.double(), ids[:, 0]),
        lambda: native.linear_cross_entropy(rows.double(), head, None, ids[:, 0]),
        lambda: native.language_model_loss(ids, ids, head, weight.double(), head),
        lambda: native.language_model_loss(ids, ids, head, weight, head, bias.double()),
        lambda: native.generate(ids.t(), 3, head, [None], [weight.double()], [None], head),
        lambda: native.generate(ids.t(), 3, head, [None], [weight], [None], head, bias.double()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected tensors of one type"):
            call()

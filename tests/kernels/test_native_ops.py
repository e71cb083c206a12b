"""The C loss, decoder and clipping against torch and the reference."""

import random

import pytest
import torch
from generate_problems import Decoder
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from charrnn_fast.kernels import native

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"native: {native.available()}")

ISAS = native._native.isas() if native.available() is None else []
BOUNDS = ((torch.float32, 3e-6), (torch.float64, 1e-14))


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.set_isa(None)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize(
    "sizes", ((1, 1, 2), (5, 7, 28), (200, 33, 31), (777, 100, 129), (33, 256, 700), (9, 33, 3000))
)
def test_cross_entropy(isa, reduction, sizes):
    native.set_isa(isa)
    N, H, V = sizes
    torch.manual_seed(N)
    hidden, weight, bias = (t.double() for t in (torch.randn(N, H), torch.randn(V, H) / H**0.5, torch.randn(V)))
    target = torch.randint(0, V, (N,))
    target[torch.rand(N) < 0.2] = -100
    target[0] = V - 1
    grad_loss = torch.rand(N).double() if reduction == "none" else None
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = cross_entropy(linear(hidden, weight, bias), target, reduction=reduction)
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves, grad_loss)]
    for dtype, bound in BOUNDS:
        args = [t.detach().to(dtype) for t in leaves]
        upstream = None if grad_loss is None else grad_loss.to(dtype)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(native.linear_cross_entropy(*args, target, reduction=reduction, grad_loss=upstream))
        for one, two, exact in zip(*results, expected, strict=True):
            assert error(one, exact) < bound
            assert torch.equal(one, two) or V > 1024
        alone, *none = native.linear_cross_entropy(*args, target, reduction=reduction, need_grad=False)
        assert torch.equal(alone, results[0][0]) and none == [None] * 3


def test_cross_entropy_without_bias_strided_and_ignoring():
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(40, 20)[:, :16], torch.randn(9, 30)[:, :16], torch.randint(0, 9, (40,))
    loss, grad_hidden, grad_weight, grad_bias = native.linear_cross_entropy(
        hidden, weight, None, target, ignore_index=3
    )
    torch.testing.assert_close(loss, cross_entropy(hidden @ weight.T, target, ignore_index=3))
    assert grad_bias is None and grad_weight.shape == (9, 16)
    assert not grad_hidden[target == 3].any()
    assert native.linear_cross_entropy(hidden, weight, None, torch.full((40,), -100))[0].isnan()


def test_cross_entropy_of_large_logits_is_finite():
    loss, *grads = native.linear_cross_entropy(
        torch.full((3, 4), 100.0), torch.eye(4)[:2] * 50, None, torch.tensor([0, 1, 0])
    )
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("V", (5, 2000))
@pytest.mark.parametrize("bad", (-1, 5000))
def test_cross_entropy_target_out_of_bounds(V, bad):
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        native.linear_cross_entropy(torch.randn(3, 4), torch.randn(V, 4), None, torch.tensor([0, bad, 1]))


def decode(decoder: Decoder, *arguments, **options) -> tuple[Tensor, Tensor]:
    return decoder.run(native.generate, *arguments, device=torch.device("cpu"), **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(25))
def test_generate(isa, seed):
    native.set_isa(isa)
    rng = random.Random(seed)
    count, sizes = rng.choice((1, 2, 20)), {"B": rng.choice((1, 2, 5, 13, 30)), "P": rng.choice((1, 6)), "seed": seed}
    sizes |= {"H": rng.choice((1, 7, 32, 33, 100, 256)), "V": rng.choice((2, 28, 90)), "L": rng.choice((1, 2, 3))}
    decoder = Decoder(**sizes, nonlinearity=rng.choice(("tanh", "relu")))
    sampled, options = bool(seed % 3), {}
    if sampled:
        options = {"temperature": rng.choice((0.3, 1.0)), "alpha": rng.choice((1.0, 2.0))}
        options["top_k"] = rng.choice((None, 1, 3, 1000))
    ids, state = decoder.reference(count, sampled, **options)
    single = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got_ids, got_state = decode(decoder, count, sampled, **options)
        assert torch.equal(got_ids, ids)
        torch.testing.assert_close(got_state, state, rtol=1e-9, atol=1e-9)
        single.append(decode(decoder, count, sampled, torch.float32, **options))
    assert torch.equal(single[0][0], single[1][0]) and torch.equal(single[0][1], single[1][1])


def test_generate_nothing_and_defaults():
    decoder = Decoder(8, 5, 2, 3, 4)
    ids, state = decode(decoder, 0, False, torch.float32)
    assert ids.shape == (3, 0) and torch.equal(state, decoder.state.float())
    decoder.state.zero_()
    expected = decode(decoder, 6, False)
    decoder.state = None
    got = decode(decoder, 6, False)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_generate_rejects():
    decoder = Decoder(8, 5, 1, 1, 2)
    for options in ({"temperature": 0.0}, {"alpha": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="expected"):
            decode(decoder, 3, True, torch.float32, **options)
    decoder.prompt[0, 1] = 5
    with pytest.raises(IndexError, match="out of range"):
        decode(decoder, 3, False, torch.float32)
    decoder.prompt = decoder.prompt[:, :0]
    with pytest.raises(ValueError, match="prompt"):
        decode(decoder, 3, False, torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("max_norm", (0.1, 1e9))
def test_clip(isa, dtype, max_norm):
    native.set_isa(isa)
    torch.manual_seed(0)
    grads = [torch.randn(shape, dtype=dtype) for shape in ((1,), (7, 3), (100, 1000), (), (20000,), (0,))]
    parameters = [torch.nn.Parameter(g.clone()) for g in grads]
    for p in parameters:
        p.grad = p.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    copies = [g.clone() for g in grads]
    for threads, tensors in ((1, grads), (2, copies)):
        torch.set_num_threads(threads)
        torch.testing.assert_close(native.clip_grad_norm_(tensors, max_norm), expected)
    for p, one, two in zip(parameters, grads, copies, strict=True):
        torch.testing.assert_close(one, p.grad)
        assert torch.equal(one, two)


def test_clip_of_nothing_and_of_infinities():
    assert native.clip_grad_norm_([], 1.0) == 0
    grads = [torch.tensor([float("inf"), 1.0])]
    assert native.clip_grad_norm_(grads, 1.0).isinf()
    assert grads[0][0].isnan() and grads[0][1] == 0
    assert native.clip_limits([torch.randn(3, 4).t()]) is None
    assert "side by side" in native.clip_limits([torch.randn(3, 4)[:, :2]])


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

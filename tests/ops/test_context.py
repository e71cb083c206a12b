"""Tensors that are not plain memory, and modes around a call: torch's operators run, with torch's results."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from charrnn_fast import FusedRNN, linear_cross_entropy
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.ops.context import addressable, plain


class Subclass(torch.Tensor):
    pass


KINDS = {
    "negative": torch._neg_view,
    "imaginary": lambda x: torch.complex(x, x).conj().imag,
    "sparse": lambda x: x.to_sparse(),
    "subclass": lambda x: x.as_subclass(Subclass),
}


def operands():
    torch.manual_seed(0)
    return torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (6,))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_unusual_weights_is_torchs(kind):
    h, w, t = operands()
    assert plain(h, w, t) and addressable(h, w, t) and not plain(KINDS[kind](w))
    results = []
    for loss in (linear_cross_entropy(h, KINDS[kind](w), t), F.cross_entropy(F.linear(h, KINDS[kind](w)), t)):
        results.append((loss, torch.autograd.grad(loss, h)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_freed_memory_is_an_error():
    h, w, t = operands()
    w.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        linear_cross_entropy(h, w, t)


def test_fake_tensors_give_shapes():
    with FakeTensorMode(allow_non_fake_inputs=True):
        h, w, t = operands()
        assert linear_cross_entropy(h, w, t).shape == ()
        model, ids = CharRNN(11, 8), torch.zeros(3, 5, dtype=torch.long)
        assert model.loss(ids, ids)[0].shape == ()
        assert model.generate_ids(ids, 4)[0].shape == (3, 4)


def test_make_fx_keeps_operations():
    h, w, t = operands()
    h, other = h.detach(), torch.randn(6, 4)
    graph = make_fx(lambda h, w, t: linear_cross_entropy(h, w, t))(h, w, t)
    torch.testing.assert_close(graph(other, w, t), linear_cross_entropy(other, w, t))


def test_gradients_are_handed_out_once():
    h, w, t = operands()
    y = h * 1
    y.register_hook(lambda g: g.mul_(2))
    loss, norms = linear_cross_entropy(y, w, t), []
    for _ in range(3):
        h.grad = None
        loss.backward(retain_graph=True)
        norms.append(h.grad.norm())
    torch.testing.assert_close(norms, norms[:1] * 3)


def test_batched_gradients():
    rnn, x = FusedRNN(5, 7), torch.randn(9, 3, 5)
    h, w, t = operands()
    for function, given in (
        (lambda x: rnn(x)[0], x),
        (lambda h: linear_cross_entropy(h, w, t, reduction="none"), h),
    ):
        expected = torch.autograd.functional.jacobian(function, given)
        torch.testing.assert_close(torch.autograd.functional.jacobian(function, given, vectorize=True), expected)

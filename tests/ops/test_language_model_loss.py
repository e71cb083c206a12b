"""language_model_loss against elman and linear_cross_entropy: values, gradients, second gradients, carried states."""

import pytest
import torch

from charrnn_fast.kernels import native
from charrnn_fast.ops.elman import elman
from charrnn_fast.ops.language_model_loss import language_model_loss, why_not
from charrnn_fast.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"native: {native.available()}")


def _operands(T, B, H, V, dtype=torch.float64, h0=True, bias=True, head_bias=True):
    generator = torch.Generator().manual_seed(T + 10 * B)
    shapes = ((B, H), (H, V), (H, H), (H,), (V, H), (V,))
    present = (h0, True, True, bias, True, head_bias)
    leaves = [
        (torch.randn(shape, generator=generator, dtype=dtype) * 0.5).requires_grad_() if given else None
        for shape, given in zip(shapes, present, strict=True)
    ]
    tokens, targets = (torch.randint(V, (B, T), generator=generator).t() for _ in range(2))
    return tokens, targets, leaves


def _separate(tokens, targets, h0, weight_ih, weight_hh, bias, head_weight, head_bias, *, nonlinearity="tanh"):
    states, h_n = elman(tokens, h0, weight_ih, weight_hh, bias, nonlinearity=nonlinearity)
    return linear_cross_entropy(states.flatten(0, 1), head_weight, targets.flatten(), linear_bias=head_bias), h_n


def _assert_alike(run, rtol=1e-10, atol=1e-14):
    torch.testing.assert_close(run(language_model_loss), run(_separate), rtol=rtol, atol=atol)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("optional", [(True, True, True), (False, False, False), (False, True, True)])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_matches_the_separate_operations(nonlinearity, optional, factor):
    tokens, targets, leaves = _operands(9, 20, 33, 30, torch.float64, *optional)
    targets[2, 3] = -100

    def run(function):
        loss, h_n = function(tokens, targets, *leaves, nonlinearity=nonlinearity)
        return [loss, h_n, *torch.autograd.grad(factor * loss, [t for t in leaves if t is not None])]

    _assert_alike(run)


@pytest.mark.parametrize("optional", [(True, True, True), (False, False, False)])
def test_gradcheck_and_gradgradcheck(optional):
    tokens, targets, leaves = _operands(3, 2, 3, 4, torch.float64, *optional)
    wanted = [t for t in leaves if t is not None]

    def function(*tensors):
        given = iter(tensors)
        loss, h_n = language_model_loss(tokens, targets, *(None if t is None else next(given) for t in leaves))
        return loss, h_n.sin()

    assert torch.autograd.gradcheck(function, wanted)
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors)[0], wanted)
    assert torch.autograd.gradgradcheck(function, wanted)


def test_state_carried_with_its_graph():
    tokens, targets, leaves = _operands(6, 18, 5, 7)

    def run(function):
        state, losses = leaves[0], []
        for part in range(3):
            loss, state = function(tokens.roll(part, 0), targets, state, *leaves[1:])
            losses.append(loss)
        return [state, *losses, *torch.autograd.grad(sum(losses), leaves)]

    _assert_alike(run)


def test_state_alone():
    tokens, targets, leaves = _operands(4, 3, 5, 7)

    def run(function):
        _, h_n = function(tokens, targets, *leaves)
        *gradients, of_weight, of_bias = torch.autograd.grad(h_n.sum(), leaves, allow_unused=True)
        assert of_weight is None and of_bias is None, "the head's"
        return gradients

    _assert_alike(run)


def test_frozen_parameters_get_no_gradient():
    tokens, targets, leaves = _operands(4, 17, 5, 7, torch.float32)
    for frozen in (leaves[0], leaves[2], leaves[5]):
        frozen.requires_grad_(False)
    for used in (lambda loss, h_n: loss, lambda loss, h_n: loss + h_n.sum()):
        used(*language_model_loss(tokens, targets, *leaves)).backward()
        assert [t.grad is None for t in leaves] == [True, False, True, False, False, True]


def test_backward_twice_adds_the_gradient_twice():
    tokens, targets, leaves = _operands(4, 17, 5, 7)
    loss, _ = language_model_loss(tokens, targets, *leaves)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient)


def test_bad_ids_are_reported_as_by_the_separate_operations():
    tokens, targets, leaves = _operands(4, 17, 5, 7)
    for ids, bad in ((tokens, 7), (tokens, -1), (tokens, -(2**63)), (targets, 7), (targets, -1)):
        before, ids[1, 2] = ids[1, 2].item(), bad
        messages = []
        for function in (language_model_loss, _separate):
            with pytest.raises(IndexError) as error:
                function(tokens, targets, *leaves)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        ids[1, 2] = before


def test_why_not(monkeypatch):
    tokens, targets, (h0, *weights) = _operands(4, 64, 32, 28, torch.float32)
    state = h0.detach()
    assert why_not(tokens, targets, state, weights) is None
    assert why_not(tokens, targets, None, weights) is None
    assert "constant" in why_not(tokens, targets, h0, weights)
    assert "constant" in why_not(tokens, targets, state.double(), weights)
    assert "int64" in why_not(tokens.int(), targets, state, weights)
    assert "as many" in why_not(tokens, targets[1:], state, weights)
    assert "one dtype" in why_not(tokens, targets, None, [*weights[:-1], weights[-1].double()])
    assert "gradients" in why_not(tokens, targets, state, [w.detach() for w in weights])
    assert why_not(tokens, targets, state, weights, "torch") == "'torch' was asked for"
    with torch.no_grad():
        assert "gradients" in why_not(tokens, targets, state, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in why_not(tokens, targets, state, weights)
    assert "vocabulary" in why_not(tokens, targets, state, [torch.zeros(32, 513, requires_grad=True), *weights[1:]])
    monkeypatch.setenv("CHARRNN_BACKEND", "torch")
    assert why_not(tokens, targets, state, weights) == "'torch' was asked for"

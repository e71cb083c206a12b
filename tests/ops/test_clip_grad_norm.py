"""clip_grad_norm_ against torch.nn.utils.clip_grad_norm_."""

import pytest
import torch

from charrnn_fast import clip_grad_norm_


def _parameters(sizes, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.zeros(size, dtype=dtype) for size in sizes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype) * scale
    return parameters


def _both(make, *arguments, rtol=1e-5, **options):
    ours, theirs = make(), make()
    norm = clip_grad_norm_(ours, *arguments, **options)
    expected = torch.nn.utils.clip_grad_norm_(theirs, *arguments, **options)
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=0, equal_nan=True)
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=1e-12, equal_nan=True)


SIZES = [(3, 4), (5,), (), (0,), (2, 1, 2), (257,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 0.0])
def test_matches_torch(dtype, scale):
    rtol = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    _both(lambda: _parameters(SIZES, dtype, scale), 1.0, rtol=rtol)


def test_two_thousand_tensors():
    sizes = [(int(n),) for n in torch.randint(1, 400, (2000,), generator=torch.Generator().manual_seed(3))]
    _both(lambda: _parameters(sizes), 0.5)


@pytest.mark.parametrize(
    "options", [{"norm_type": torch.inf}, {"norm_type": 3.0}, {"norm_type": 1}, {"foreach": False}]
)
def test_options(options):
    _both(lambda: _parameters(SIZES[:3]), 0.5, **options)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_values_that_are_not_finite(value):
    def make():
        parameters = _parameters(SIZES[:3])
        parameters[1].grad[2] = value
        return parameters

    _both(make, 1.0)
    parameters = make()
    before = [p.grad.clone() for p in parameters]
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    for p, grad in zip(parameters, before, strict=True):
        assert torch.equal(p.grad.nan_to_num(7.0), grad.nan_to_num(7.0))


def test_mixed_missing_strided_and_single():
    def make():
        parameters = [*_parameters([(3, 4), (2,)]), *_parameters([(4,)], torch.float64), torch.zeros(3)]
        parameters[0].grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).T
        return parameters

    _both(make, 0.1)
    assert clip_grad_norm_([], 1.0) == 0 and clip_grad_norm_([torch.zeros(2)], 1.0) == 0
    (single,) = _parameters([(100,)])
    clip_grad_norm_(single, 1.0)
    assert single.grad.norm() == pytest.approx(1.0, rel=1e-5)
    generator = (p for p in _parameters([(100,), (3,)]))
    assert clip_grad_norm_(generator, 1.0) > 1

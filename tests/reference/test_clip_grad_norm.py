"""The reference clip against torch.nn.utils.clip_grad_norm_."""

import pytest
import torch

from charrnn_fast.reference.clip_grad_norm import clip_grad_norm


def _parameters(scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(shape, dtype=torch.float64) for shape in [(3, 4), (5,), (), (2, 1, 2)]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
    return [*params, torch.zeros(3)]  # the last one has no gradient


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4, 0.0])
def test_matches_torch(scale):
    ours, theirs = _parameters(scale), _parameters(scale)
    norm = clip_grad_norm(ours, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0), rtol=1e-14, atol=0)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)
    assert ours[-1].grad is None
    total = sum(float((p.grad**2).sum()) for p in ours[:-1]) ** 0.5
    assert total <= 1.0 + 1e-12


def test_nothing_to_clip():
    assert clip_grad_norm([torch.zeros(2)], 1.0) == 0
    assert clip_grad_norm([], 1.0) == 0

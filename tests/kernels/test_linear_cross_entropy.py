"""Linear cross-entropy by every backend's kernels against torch's own operations in fp64.

Without a GPU the Triton kernels are interpreted (tests/conftest.py), with one they run on it; C runs by each
instruction set. What one alone has is in test_triton_linear_cross_entropy.py and test_native_ops.py.
"""

from dataclasses import replace

import needs
import pytest
import torch
from comparisons import error, same
from loss_problems import NAMES, NATIVE, REDUCTIONS, TRITON, by_torch

SIZES = (1, 2, 31, 33, 100)
# One tile; several of classes; H beyond a tile: GEMMs, and of the C kernel several blocks.
SHAPES = pytest.mark.parametrize(("H", "V"), [(16, 28), (16, 130), (300, 28)])


kernels = needs.each_backend(triton=TRITON, native=NATIVE)


@pytest.mark.parametrize("V", (2, *SIZES[2:]))
@pytest.mark.parametrize("N", SIZES)
def test_fp32_error_is_at_most_twice_that_of_torch(kernels, N, V):
    """Every H and option, in changing company."""
    case = SIZES.index(N) + len(SIZES) * SIZES.index(V)
    for H in (SIZES[case % 5], SIZES[(case + 2 + case // 5) % 5]):
        options = {"bias": case % 3 != 0, "reduction": REDUCTIONS[(case + H) % 3], "seed": case}
        kernels.check(kernels.problem(N, H, V, **options))


def test_one_class(kernels):
    """The only class is certain: no loss and no gradient."""
    loss, *gradients = kernels.results(kernels.problem(3, 5, 1))
    assert loss == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("N", "H", "V"), [(33, 31, 28), (5, 7, 130), (2, 100, 33)])
def test_fp64(kernels, N, H, V, reduction):
    kernels.check(kernels.problem(N, H, V, dtype=torch.float64, reduction=reduction))


@pytest.mark.parametrize("H", [31, 300])
def test_a_thousand_classes(kernels, H):
    kernels.check(kernels.problem(2, H, 1000))


@pytest.mark.parametrize("gain", [1e-30, 1e2, 1e4])
@pytest.mark.parametrize(("H", "V"), [(16, 28), (16, 130), (300, 130)])
def test_tiny_and_huge_logits(kernels, H, V, gain):
    """Nothing overflows. Where logits reach 10^4, their own rounding in fp32 is all of the error."""
    for dtype in (torch.float64, torch.float32):
        p = kernels.problem(9, H, V, gain=gain, dtype=dtype)
        bound = 64 * torch.finfo(dtype).eps * max(1.0, gain)
        for name, found, right in zip(NAMES, kernels.results(p), by_torch(p.to(torch.float64)), strict=True):
            assert error(found, right) <= bound, name


@pytest.mark.parametrize("V", [28, 130])
def test_classes_ruled_out_by_their_bias(kernels, V):
    """-inf as a bias, of a whole tile of classes too, is a probability of 0."""
    p = kernels.problem(9, 16, V, ignored=0)
    p.bias[: V - 5] = -torch.inf
    p.target = p.target % 5 + V - 5
    torch.testing.assert_close(kernels.results(p), by_torch(p), rtol=1e-4, atol=1e-6)


@SHAPES
def test_all_rows_ignored(kernels, H, V):
    for reduction in REDUCTIONS:
        p = kernels.problem(3, H, V, reduction=reduction)
        p.target[:] = -100
        loss, *gradients = kernels.results(p)
        torch.testing.assert_close(loss, by_torch(p)[0], equal_nan=True)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert not any(g.any() for g in gradients)


def test_ignored_class_may_be_one_of_the_classes(kernels):
    kernels.check(kernels.problem(40, 16, 28, ignore_index=3))
    kernels.check(kernels.problem(9, 16, 130, ignore_index=2**40))


@pytest.mark.parametrize(("H", "V"), [(7, 28), (7, 130), (300, 28)])
def test_strided_arguments(kernels, H, V):
    """Columns of wider buffers, every second row, a transposed weight, an expanded gradient of the loss."""
    p = kernels.problem(6, H, V, reduction="none")
    p.grad_loss = p.grad_loss[:1].expand(6)
    wide = torch.full((12, H + 9), torch.nan, device=kernels.device)
    strided = replace(
        p,
        hidden=wide[::2, 3 : 3 + H].copy_(p.hidden),
        weight=p.weight.t().contiguous().t(),
        bias=torch.full((2 * V,), torch.nan, device=kernels.device)[::2].copy_(p.bias),
        target=torch.full((18,), 2**40, device=kernels.device)[::3].copy_(p.target),
    )
    by_columns = replace(p, weight=torch.full((V, H + 9), torch.nan, device=kernels.device)[:, :H].copy_(p.weight))
    for other in (strided, by_columns):
        assert same(kernels.results(other), kernels.results(p))


@pytest.mark.parametrize(("N", "H", "V"), [(70, 16, 28), (5, 16, 300), (9, 300, 28)])
def test_results_are_bitwise_repeatable(kernels, N, H, V):
    p = kernels.problem(N, H, V)
    assert same(kernels.results(p), kernels.results(p))


def test_the_loss_alone_and_gradients_for_one(kernels):
    p = kernels.problem(9, 16, 28, reduction="sum")
    given = (p.hidden, p.weight, p.bias, p.target, -100, "sum")
    wanted = kernels.results(replace(p, grad_loss=torch.ones_like(p.grad_loss)))
    assert same(kernels.launch(*given, True), wanted)
    alone, *none = kernels.launch(*given, False)
    assert torch.equal(alone, wanted[0]) and none == [None] * 3


def test_a_reduction_that_there_is_not(kernels):
    p = kernels.problem(3, 4, 5)
    with pytest.raises(ValueError, match="reduction: expected 'mean', 'sum' or 'none', got 'median'"):
        kernels.results(replace(p, reduction="median"))

"""kernels/triton/linear_cross_entropy.py against torch's own operations in fp64.

Without a GPU the kernels are interpreted (tests/conftest.py), with one they run on it.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton import linear_cross_entropy as kernels
from charrnn_fast.kernels.triton.linear_cross_entropy_tiles import TILES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (1, 2, 31, 33, 100)
REDUCTIONS = ("mean", "sum", "none")
NAMES = ("loss", "grad_hidden", "grad_weight", "grad_bias")


@dataclass
class LossProblem:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    grad_loss: torch.Tensor
    reduction: str = "mean"
    ignore_index: int = -100

    def to(self, dtype: torch.dtype) -> "LossProblem":
        floats = (self.hidden, self.weight, self.bias, self.grad_loss)
        hidden, weight, bias, grad_loss = (None if t is None else t.to(dtype) for t in floats)
        return replace(self, hidden=hidden, weight=weight, bias=bias, grad_loss=grad_loss)


def make_problem(
    N, H, V, *, dtype=torch.float32, bias=True, reduction="mean", ignored=0.3, gain=1.0, seed=0, ignore_index=-100
) -> LossProblem:
    """Logits of the order of `gain`; `ignored`: share of the rows that do not count, never all of them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    target = torch.randint(V, (N,), generator=generator)
    target[1:][torch.rand(N - 1, generator=generator) < ignored] = ignore_index
    grad_loss = random(N) if reduction == "none" else random()
    tensors = (random(N, H), random(V, H) * (gain / H**0.5), random(V) if bias else None)
    return LossProblem(*tensors, target.to(DEVICE), grad_loss, reduction, ignore_index)


def by_torch(p: LossProblem) -> list[torch.Tensor]:
    """Loss and gradients by autograd through torch's operations, in p's dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in (p.hidden, p.weight, p.bias) if t is not None]
    loss = F.cross_entropy(F.linear(*leaves), p.target, reduction=p.reduction, ignore_index=p.ignore_index)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, p.grad_loss)]


def by_kernels(p: LossProblem, precision="ieee") -> list[torch.Tensor]:
    found = kernels.linear_cross_entropy(
        *(p.hidden, p.weight, p.bias, p.target, p.ignore_index, p.reduction),
        grad_loss=p.grad_loss,
        precision=precision,
    )
    assert (found[3] is None) == (p.bias is None)
    return [t for t in found if t is not None]


def error(found: torch.Tensor, exact: torch.Tensor, summed: torch.Tensor | None = None) -> float:
    """Largest error, relative to the largest entry, or to the largest sum of magnitudes."""
    return (
        (found.double() - exact).abs().max() / (exact if summed is None else summed).abs().max().clamp(min=1e-30)
    ).item()


def summed_magnitudes(p: LossProblem) -> list[torch.Tensor]:
    """What by_torch's results are sums of, without the signs, which cancel: a sum is rounded at the scale of these."""
    p = p.to(torch.float64)
    logits = F.linear(p.hidden, p.weight, p.bias)
    valid = p.target != p.ignore_index
    target = torch.where(valid, p.target, 0)
    terms = (logits.softmax(1) - F.one_hot(target, len(p.weight))).abs() * valid.unsqueeze(1)
    factor = p.grad_loss.abs() / (valid.sum() if p.reduction == "mean" else 1)
    terms = terms * (factor.unsqueeze(1) if p.reduction == "none" else factor)
    loss = by_torch(p)[0]
    return [loss, terms @ p.weight.abs(), terms.T @ p.hidden.abs(), *([] if p.bias is None else [terms.sum(0)])]


def check(p: LossProblem, precision="ieee") -> None:
    """At most twice torch's own error, and 4 units of the dtype's precision for where that is next to none."""
    exact, theirs, ours = by_torch(p.to(torch.float64)), by_torch(p), by_kernels(p, precision)
    slack = (32 if p.hidden.dtype == torch.float64 else 4) * torch.finfo(p.hidden.dtype).eps
    for name, found, other, right, summed in zip(NAMES, ours, theirs, exact, summed_magnitudes(p), strict=False):
        assert found.shape == right.shape
        assert found.dtype == p.hidden.dtype
        assert error(found, right, summed) <= 2 * error(other, right, summed) + slack, name
    assert len(ours) == len(exact)


@pytest.mark.parametrize("V", (2, *SIZES[2:]))
@pytest.mark.parametrize("N", SIZES)
def test_fp32_error_is_at_most_twice_that_of_torch(N, V):
    """Every H and option, in changing company."""
    case = SIZES.index(N) + len(SIZES) * SIZES.index(V)
    for H in (SIZES[case % 5], SIZES[(case + 2 + case // 5) % 5]):
        check(make_problem(N, H, V, bias=case % 3 != 0, reduction=REDUCTIONS[(case + H) % 3], seed=case))


def test_one_class():
    """The only class is certain: no loss and no gradient."""
    loss, *gradients = by_kernels(make_problem(3, 5, 1))
    assert loss == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("N", "H", "V"), [(33, 31, 28), (5, 7, 130), (2, 100, 33)])
def test_fp64(N, H, V, reduction):
    check(make_problem(N, H, V, dtype=torch.float64, reduction=reduction))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "H", "V"), [(100, 33, 28), (3, 31, 200), (33, 200, 31)])
def test_16_bit_error_is_at_most_twice_that_of_torch(N, H, V, dtype):
    for reduction in REDUCTIONS:
        check(make_problem(N, H, V, dtype=dtype, reduction=reduction))


@pytest.mark.skipif(
    DEVICE.type == "cuda", reason="a GPU's tf32 is not exact, as the interpreter's is: test_gpu_linear_cross_entropy.py"
)
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
@pytest.mark.parametrize(("N", "H", "V"), [(70, 32, 28), (7, 64, 130), (3, 128, 130), (3, 200, 130)])
def test_tiles_of_the_tensor_core_precisions(N, H, V, precision):
    check(make_problem(N, H, V), precision)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="test_gpu_linear_cross_entropy.py has the tolerances of a GPU")
@pytest.mark.parametrize(("N", "V", "gain"), [(70, 28, 1.0), (5, 32, 30.0), (1, 1, 1.0)])
def test_three_products_of_halves_are_as_exact_as_fp32(N, V, gain):
    """H=32 has a tile that splits tf32x3's operands itself; the interpreter multiplies the halves in fp32."""
    tile = kernels.find_tile("classes", "tf32x3", 32, V, "sm_90")
    assert tile.halves
    p = make_problem(N, 32, V, gain=gain)
    exact, theirs = by_torch(p.to(torch.float64)), by_torch(p)
    for found, right, other in zip(by_kernels(p, "tf32x3"), exact, theirs, strict=True):
        assert error(found, right) <= max(2 * error(other, right), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [31, 300])
def test_a_thousand_classes(H, dtype):
    check(make_problem(2, H, 1000, dtype=dtype))


@pytest.mark.parametrize("cores", [1, 64])
@pytest.mark.parametrize(("N", "H", "V"), [(70, 16, 28), (3, 16, 600)])
def test_work_for_few_and_for_many_programs(monkeypatch, N, H, V, cores):
    """One program sums a gradient alone, or many do for the next kernel; the classes of a row are split or are not."""
    monkeypatch.setattr(kernels, "_cores", lambda device: cores)
    kernels._plan.cache_clear()
    for reduction in REDUCTIONS:
        check(make_problem(N, H, V, reduction=reduction))
    kernels._plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gemms_over_several_chunks_of_rows(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "MIN_ROWS", 16)
    monkeypatch.setattr(kernels, "MAX_LOGITS", 1)
    for reduction in REDUCTIONS:
        check(make_problem(37, 300, 70, dtype=dtype, reduction=reduction))


@pytest.mark.parametrize("gain", [1e-30, 1e2, 1e4])
@pytest.mark.parametrize(("H", "V"), [(16, 28), (16, 130), (300, 130)])
def test_tiny_and_huge_logits(H, V, gain):
    """Nothing overflows. Where logits reach 10^4, their own rounding in fp32 is all of the error."""
    for dtype in (torch.float64, torch.float32):
        p = make_problem(9, H, V, gain=gain, dtype=dtype)
        bound = 64 * torch.finfo(dtype).eps * max(1.0, gain)
        for name, found, right in zip(NAMES, by_kernels(p), by_torch(p.to(torch.float64)), strict=True):
            assert error(found, right) <= bound, name


@pytest.mark.parametrize("V", [28, 130])
def test_classes_ruled_out_by_their_bias(V):
    """-inf as a bias, of a whole tile of classes too, is a probability of 0."""
    p = make_problem(9, 16, V, ignored=0)
    p.bias[: V - 5] = -torch.inf
    p.target = p.target % 5 + V - 5
    torch.testing.assert_close(by_kernels(p), by_torch(p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("H", "V"), [(16, 28), (16, 130), (300, 28)])
def test_all_rows_ignored(H, V):
    for reduction in REDUCTIONS:
        p = make_problem(3, H, V, reduction=reduction)
        p.target[:] = -100
        loss, *gradients = by_kernels(p)
        torch.testing.assert_close(loss, by_torch(p)[0], equal_nan=True)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert not any(g.any() for g in gradients)


def test_ignored_class_may_be_one_of_the_classes():
    check(make_problem(40, 16, 28, ignore_index=3))
    check(make_problem(9, 16, 130, ignore_index=2**40))


@pytest.mark.parametrize(("H", "V"), [(16, 28), (16, 130), (300, 28)])
def test_a_target_that_is_no_class_spoils_its_own_loss_alone(H, V):
    if DEVICE.type == "cuda":
        pytest.skip("a GPU asserts that there is none: test_gpu_linear_cross_entropy.py")
    p = make_problem(5, H, V, reduction="none", ignored=0)
    right = by_torch(p)[0]
    p.target[1], p.target[3] = V, -1
    loss, *gradients = by_kernels(p)
    assert loss.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(loss[::2], right[::2])
    assert all(g.isfinite().all() for g in gradients)
    assert by_kernels(replace(p, reduction="sum", grad_loss=p.grad_loss[0]))[0].isnan()


@pytest.mark.parametrize(("H", "V"), [(7, 28), (7, 130), (300, 28)])
def test_strided_arguments(H, V):
    """Columns of wider buffers, every second row, a transposed weight, an expanded gradient of the loss."""
    p = make_problem(6, H, V, reduction="none")
    p.grad_loss = p.grad_loss[:1].expand(6)
    wide = torch.full((12, H + 9), torch.nan, device=DEVICE)
    strided = replace(
        p,
        hidden=wide[::2, 3 : 3 + H].copy_(p.hidden),
        weight=p.weight.t().contiguous().t(),
        bias=torch.full((2 * V,), torch.nan, device=DEVICE)[::2].copy_(p.bias),
        target=torch.full((18,), 2**40, device=DEVICE)[::3].copy_(p.target),
    )
    assert all(torch.equal(a, b) for a, b in zip(by_kernels(strided), by_kernels(p), strict=True))


def test_rows_too_far_apart_for_int32_are_copied():
    near = torch.empty_strided((2, 4), (1 << 22, 1), device="meta")
    far = torch.empty_strided((2, 4), (1 << 23, 1), device="meta")
    assert kernels._within_reach(near) is near
    assert kernels._within_reach(far).stride() == (4, 1)


@pytest.mark.parametrize(("N", "H", "V"), [(70, 16, 28), (5, 16, 300), (9, 300, 28)])
def test_results_are_bitwise_repeatable(N, H, V):
    p = make_problem(N, H, V)
    assert all(torch.equal(a, b) for a, b in zip(by_kernels(p), by_kernels(p), strict=True))


@pytest.mark.parametrize(("H", "V"), [(16, 28), (16, 130), (300, 28)])
def test_only_the_gradients_that_are_needed(H, V):
    p = make_problem(9, H, V)
    arguments = (p.hidden, p.weight, p.bias, p.target, -100, "mean")
    _, lse, count = kernels.linear_cross_entropy_forward(*arguments)
    _, *right = by_kernels(p)
    for need_hidden, need_weight in ((True, False), (False, True), (True, True)):
        found = kernels.linear_cross_entropy_backward(
            p.grad_loss, *arguments, lse, count, need_hidden=need_hidden, need_weight=need_weight
        )
        assert [g is not None for g in found] == [need_hidden, need_weight, need_weight]
        for ours, wanted in zip(found, right, strict=True):
            assert ours is None or error(ours, wanted.double()) <= 1e-5


def test_loss_in_another_dtype():
    """Under autocast it is float32: here a sum that float16 has no room for."""
    p = make_problem(9, 16, 28, dtype=torch.float16, ignored=0)
    p.bias[:] = -30_000
    p.bias[0] = 30_000
    p.target[:] = 1
    arguments = (p.hidden, p.weight, p.bias, p.target, -100, "sum")
    loss, lse, count = kernels.linear_cross_entropy_forward(*arguments, loss_dtype=torch.float32)
    assert (loss.dtype, lse.dtype, count) == (torch.float32, torch.float32, 9)
    assert loss.isfinite() and kernels.linear_cross_entropy_forward(*arguments)[0].isinf()


@pytest.mark.skipif(native.available() is not None, reason=f"native: {native.available()}")
def test_arguments_and_results_are_those_of_the_native_kernel():
    p = make_problem(9, 16, 28).to(torch.float32)
    arguments = tuple(None if t is None else t.cpu() for t in (p.hidden, p.weight, p.bias, p.target))
    ours = kernels.linear_cross_entropy(*(t.to(DEVICE) for t in arguments), -100, "sum", True)
    for found, wanted in zip(ours, native.linear_cross_entropy(*arguments, -100, "sum", True), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)
    loss, *none = kernels.linear_cross_entropy(*(t.to(DEVICE) for t in arguments), need_grad=False)
    assert loss.isfinite() and none == [None] * 3


def test_what_the_kernels_do_not_take():
    p = make_problem(3, 4, 5)
    arguments = (p.hidden, p.weight, p.bias, p.target)
    with pytest.raises(ValueError, match="reduction: expected 'mean', 'sum' or 'none', got 'median'"):
        kernels.linear_cross_entropy(*arguments, reduction="median")
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: no kernel for torch\.int32"):
        kernels.linear_cross_entropy(*(t.int() for t in arguments))
    assert kernels.linear_cross_entropy_limits(torch.float16, DEVICE) is None
    assert "device type meta" in kernels.linear_cross_entropy_limits(torch.float32, "meta")


def test_every_target_has_tiles_for_all_sizes_of_the_loss():
    """Where tiles for the gradients end, the GEMMs take over; the loss and they have no other way."""
    for step in ("loss", "logits"):
        for kind in ("ieee", "tf32x3", "tf32", "16bit", "fp64"):
            for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
                if target != "gfx942" or not kind.startswith("tf32"):
                    assert kernels.find_tile(step, kind, 10**5, 10**6, target) is not None, (step, kind, target)
    assert {step for step, _ in TILES} == {"loss", "logits", "classes", "rows"}

"""What linear cross-entropy's Triton kernels have alone: tiles, precisions, programs, limits;
test_linear_cross_entropy.py has what all kernels have.
"""

from dataclasses import replace

import pytest
import torch
from comparisons import error
from loss_problems import REDUCTIONS, TRITON, by_torch
from needs import DEVICE

from charrnn_fast.kernels.triton import linear_cross_entropy as kernels
from charrnn_fast.kernels.triton.linear_cross_entropy_tiles import TILES

make_problem, check, by_kernels = TRITON.problem, TRITON.check, TRITON.results


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
    check(make_problem(N, H, V), precision=precision)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="test_gpu_linear_cross_entropy.py has the tolerances of a GPU")
@pytest.mark.parametrize(("N", "V", "gain"), [(70, 28, 1.0), (5, 32, 30.0), (1, 1, 1.0)])
def test_three_products_of_halves_are_as_exact_as_fp32(N, V, gain):
    """H=32 has a tile that splits tf32x3's operands itself; the interpreter multiplies the halves in fp32."""
    tile = kernels.find_tile("classes", "tf32x3", 32, V, "sm_90")
    assert tile.halves
    p = make_problem(N, 32, V, gain=gain)
    exact, theirs = by_torch(p.to(torch.float64)), by_torch(p)
    for found, right, other in zip(by_kernels(p, precision="tf32x3"), exact, theirs, strict=True):
        assert error(found, right) <= max(2 * error(other, right), 2e-6)


@pytest.mark.parametrize("H", [31, 300])
def test_a_thousand_classes_in_16_bits(H):
    check(make_problem(2, H, 1000, dtype=torch.bfloat16))


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


def test_rows_too_far_apart_for_int32_are_copied():
    near = torch.empty_strided((2, 4), (1 << 22, 1), device="meta")
    far = torch.empty_strided((2, 4), (1 << 23, 1), device="meta")
    assert kernels._within_reach(near) is near
    assert kernels._within_reach(far).stride() == (4, 1)


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


def test_what_the_kernels_do_not_take():
    p = make_problem(3, 4, 5)
    arguments = (p.hidden, p.weight, p.bias, p.target)
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

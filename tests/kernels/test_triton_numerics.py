"""kernels/triton/numerics.py, and C's tanh, against long double, in ulps."""

import needs
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from needs import DEVICE

from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton.numerics import activation, activation_backward, tanh


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tanh(tl.load(x_ptr + offs, mask=offs < n)), mask=offs < n)


@triton.jit
def _activation_kernel(x_ptr, grad_ptr, y_ptr, dx_ptr, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    y = activation(tl.load(x_ptr + offs, mask=offs < n), TANH)
    dx = activation_backward(tl.load(grad_ptr + offs, mask=offs < n), y, TANH)
    tl.store(y_ptr + offs, y, mask=offs < n)
    tl.store(dx_ptr + offs, dx, mask=offs < n)


def run_tanh(x: torch.Tensor) -> torch.Tensor:
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    _tanh_kernel[(triton.cdiv(x.numel(), 65536),)](x, y, x.numel(), BLOCK=65536)
    return y.cpu()


def tanh_by_c(x: torch.Tensor) -> torch.Tensor:
    """As a step of the recurrence from nothing."""
    return native.elman_forward(x.view(1, -1, 1), [x.new_zeros(1, 1)])[0].view(-1)


run = needs.each_backend(triton=run_tanh, native=tanh_by_c)


def ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Error of y in units of the last place of the exact value, rounded to y's type."""
    spacing = np.spacing(np.abs(exact).astype(y.dtype)).astype(np.longdouble)
    return np.abs(y.astype(np.longdouble) - exact) / spacing


def sweep(dtype: torch.dtype) -> torch.Tensor:
    """Dense over the curved part and the seams at 0.625 and 1, logarithmic from the denormals to beyond saturation."""
    generator = torch.Generator().manual_seed(0)
    smallest = -45 if dtype == torch.float32 else -323
    return torch.cat(
        (
            torch.linspace(-20, 20, 400_001, dtype=torch.float64),
            torch.linspace(0.6, 1.05, 200_001, dtype=torch.float64),
            torch.logspace(smallest, 2, 200_001, dtype=torch.float64),
            torch.randn(200_000, dtype=torch.float64, generator=generator),
        )
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_is_of_two_ulp_class_everywhere(run, dtype):
    x = sweep(dtype)
    x = x[x != 0]
    exact = np.tanh(x.numpy().astype(np.longdouble))
    assert ulps(run(x).numpy(), exact).max() < (2 if run is run_tanh else 2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_is_odd_and_bounded(run, dtype):
    x = sweep(dtype)
    y = run(x)
    assert torch.equal(run(-x), -y)
    assert y.abs().max() == 1


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_of_special_values(run, dtype):
    big = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 44.4, big, -big, tiny, -tiny], dtype=dtype)
    y = run(x)
    assert torch.equal(y.isnan(), x.isnan())
    keep = ~x.isnan()
    assert torch.equal(y[keep], torch.tensor([0.0, -0.0, 1, -1, 1, 1, -1, tiny, -tiny], dtype=dtype))
    keep &= (x != 0) | (run is run_tanh)  # C adds the state's product, which is 0, to -0
    assert torch.equal(y.signbit()[keep], x.signbit()[keep])


def test_tanh_holds_its_bound_with_the_hardware_exponential():
    """The branch from 1 on with e and the quotient each moved by the 2 ulp that ex2.approx and div.full may be off."""
    a = np.linspace(1, 12, 400_001).astype(np.float32)
    exact = np.tanh(a.astype(np.longdouble))
    worst = 0.0
    for e_shift in (-2, 2):
        for quotient_shift in (-2, 2):
            e = np.exp2(a * np.float32(-2.8853900817779268))
            e = e + np.float32(e_shift) * np.spacing(e)
            quotient = 2 * e / (1 + e)
            quotient = quotient + np.float32(quotient_shift) * np.spacing(quotient)
            worst = max(worst, ulps(np.float32(1) - quotient, exact).max())
    assert worst < 3


@pytest.mark.parametrize("is_tanh", [True, False], ids=["tanh", "relu"])
def test_activation_and_its_derivative_follow_torch(is_tanh):
    x = torch.tensor([-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, torch.nan], dtype=torch.float64, device=DEVICE)
    grad = torch.tensor([1.0, -2.0, 3.0, 4.0, -5.0, 6.0, 7.0], dtype=torch.float64, device=DEVICE)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    _activation_kernel[(1,)](x, grad, y, dx, len(x), TANH=is_tanh, BLOCK=8)
    wanted = x.clone().requires_grad_()
    result = torch.tanh(wanted) if is_tanh else torch.relu(wanted)
    result.backward(grad)
    torch.testing.assert_close(y, result.detach(), equal_nan=True, rtol=4e-16, atol=0)
    torch.testing.assert_close(dx, wanted.grad, equal_nan=True, rtol=4e-16, atol=4e-16)

"""What 16-bit states do to gradients: a bound from roundings, at sizes where sums cancel and states saturate.

A state is kept rounded, to u of it, and backward takes the derivative from it: 1 - h^2 is then off by 2u, however small
it is. So the gradient of a pre-activation, d = s (1 - h^2) with s that of the state, is off by 2u |s|, and not by so
much of d; rounding d adds u |d|, and h in d h as much. What is summed from it, grad_W = sum d_t h_{t-1}, is off by a
few u of sum |s_t| |h_{t-1}|. Against grad_W itself the error has no bound: with H = 1 it is one number, the sum of
terms of both signs, and in one of 25 problems over 6 % off in bf16.
"""

import pytest
import torch

from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward

U = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # half the distance of two numbers below 1
ROUNDINGS = 8  # 2 of the derivative, 3 of d, h and the result, the rest for what earlier steps pass on
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(T, B, H, dtype, seed, gain=0.5):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = numbers(H, H) * (gain / H**0.5)
    return numbers(T, B, H), weight, numbers(1, B, H), numbers(T, B, H), numbers(1, B, H)


def exact_and_scales(x, weight, h0, grad_out, grad_h_n):
    """In fp64: gradients of x, the weight and h0, and what the error of each is to be compared with."""
    x, weight, h0, grad_out, grad_h_n = (t.double() for t in (x, weight, h0, grad_out, grad_h_n))
    states = [h0[0]]
    for x_t in x:
        states.append(torch.tanh(x_t + states[-1] @ weight.T))
    carried, grad_x, of_states = grad_h_n[0], [], []
    grad_weight, scale = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in reversed(range(len(x))):
        s = grad_out[t] + carried
        d = s * (1 - states[t + 1] ** 2)
        grad_weight += d.T @ states[t]
        scale += s.abs().T @ states[t].abs()
        carried = d @ weight
        grad_x.insert(0, d)
        of_states.insert(0, s.abs())
    exact = (torch.stack(grad_x), grad_weight, carried[None])
    return exact, (torch.stack(of_states), scale, (of_states[0] @ weight.abs())[None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize(("T", "B", "H", "problems"), [(1, 1, 1, 30), (12, 9, 1, 4), (6, 3, 16, 2)])
def test_gradients_are_within_a_few_roundings_of_the_sum_of_absolute_values(T, B, H, problems, dtype, device):
    worst = 0.0
    for seed in range(problems):
        arguments = problem(T, B, H, dtype, seed)
        x, weight, h0, grad_out, grad_h_n = (t.to(device) for t in arguments)
        out, _ = elman_forward(x, [weight], h0)
        grads = elman_backward(grad_out, grad_h_n, out, [weight], h0)
        exact, scales = exact_and_scales(*arguments)
        for found, right, scale in zip((grads[0], grads[1][0], grads[2]), exact, scales, strict=True):
            error = (found.double().cpu() - right).abs().max()
            assert error <= ROUNDINGS * U[dtype] * scale.max()
            worst = max(worst, float(error / right.abs().max()))
    if (T, B, H) == (1, 1, 1):
        assert worst > ROUNDINGS * U[dtype]  # relative to the gradient there is no such bound

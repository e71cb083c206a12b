"""The Elman kernels on a device: large sizes, every dtype and precision, repeatability, memory safety."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward, elman_limits

pytestmark = pytest.mark.gpu

# Largest error of forward and backward results, relative to the largest entry, by dtype or precision.
TOLERANCE = {"fp64": 1e-12, "ieee": 4e-5, "tf32": 2e-2, "bf16": 6e-2, "fp16": 1e-2}
# Gradients from 16-bit states are off by this many roundings of the sums of absolute values that they are made of:
# test_elman_sixteen_bits.py has the derivation. Sums that cancel are off by any share of themselves.
ROUNDINGS = {"bf16": 8 * 2.0**-9, "fp16": 8 * 2.0**-12}
KINDS = {
    "fp64": (torch.float64, "ieee"),
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}


def problem(T, B, H, dtype, D=1, seed=0, gain=0.5):
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64).to(dtype)

    weights = [random(H, H) * (gain / H**0.5) for _ in range(D)]
    return random(T, B, D * H), weights, random(D, B, H), random(T, B, D * H), random(D, B, H)


def exact(x, weights, h0, grad_out, grad_h_n, reverse):
    """Results of forward and backward in fp64, by plain operations, and what a rounded gradient's error compares with.

    That is, with s the gradient of a state, the largest entry of |s|, of the sums of |s_t|^T |h_{t-1}|, of |s_1| |W|
    and of the sum of |s|, for the gradients of x, the weights, h0 and the bias.
    """
    x, *weights = leaves = [t.double().requires_grad_() for t in (x, *weights)]
    bias = x.new_zeros(x.shape[-1], requires_grad=True)
    x = x + bias
    h0 = h0.double().requires_grad_()
    H = h0.shape[2]
    outs, last, states = [], [], []
    for d, backwards in enumerate(reverse):
        h, steps = h0[d], []
        columns = x[..., d * H : (d + 1) * H]
        for x_t in columns.flip(0) if backwards else columns:
            h = torch.tanh(x_t + h @ weights[d].T)
            steps.append(h)
        states.append([h0[d], *steps])
        steps = torch.stack(steps)
        outs.append(steps.flip(0) if backwards else steps)
        last.append(h)
    out, h_n = torch.cat(outs, -1), torch.stack(last)
    loss = (out * grad_out.double()).sum() + (h_n * grad_h_n.double()).sum()
    results = [out.detach(), h_n.detach(), *torch.autograd.grad(loss, [*leaves, h0, bias], retain_graph=True)]
    of_states = [[s.abs() for s in torch.autograd.grad(loss, steps, retain_graph=True)] for _, *steps in states]
    of_weights = [
        sum(s.T @ h.abs() for s, h in zip(of, steps, strict=False)).max()
        for of, steps in zip(of_states, states, strict=True)
    ]
    scales = [max(s.max() for of in of_states for s in of), *of_weights]
    scales.append(max((of[0] @ weight.abs()).max() for of, weight in zip(of_states, weights, strict=True)))
    scales.append(max(sum(of).sum(0).max() for of in of_states))
    return results, scales


def run(x, weights, h0, grad_out, grad_h_n, reverse, precision):
    out, h_n = elman_forward(x, weights, h0, reverse=reverse, precision=precision)
    grads = elman_backward(grad_out, grad_h_n, out, weights, h0, reverse=reverse, precision=precision)
    return [out, h_n, grads[0], *grads[1], grads[2], grads[3]]


def assert_close(found, wanted, tolerance, roundings=None):
    results, scales = wanted
    for index, (ours, right) in enumerate(zip(found, results, strict=True)):
        error = (ours.double() - right).abs().max()
        if roundings is None or index < 2:
            assert error <= tolerance * right.abs().max()
        else:
            assert error <= roundings * scales[index - 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("H", [1, 16, 31, 32, 33, 64, 100, 128, 200, 256])
def test_every_tile_against_fp64(H, kind):
    dtype, precision = KINDS[kind]
    if elman_limits(H, dtype, precision, "cuda") is not None:
        pytest.skip(f"beyond one program: {elman_limits(H, dtype, precision, 'cuda')}")
    for T, B, reverse in ((1, 1, (False,)), (33, 37, (False, True)), (150, 5, (True,)), (9, 2000, (False,))):
        arguments = problem(T, B, H, dtype, len(reverse))
        found = run(*arguments, reverse, precision)
        assert_close(found, exact(*arguments, reverse), TOLERANCE[kind], ROUNDINGS.get(kind))


@pytest.mark.parametrize(("T", "B", "H"), [(4096, 8, 64), (4096, 1, 128), (32, 4096, 32), (16, 4096, 128)])
def test_large_sizes(T, B, H):
    arguments = problem(T, B, H, torch.float32)
    found = run(*arguments, (False,), "ieee")
    assert_close(found, exact(*arguments, (False,)), 2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "B", "H"), [(32, 1024, 32), (100, 64, 128)])
def test_twenty_runs_are_bitwise_equal(T, B, H, kind):
    dtype, precision = KINDS[kind]
    arguments = problem(T, B, H, dtype, 2)
    first = run(*arguments, (False, True), precision)
    for _ in range(20):
        again = run(*arguments, (False, True), precision)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_many_lengths_use_one_compiled_kernel():
    """T is no compile-time constant: a sequence length seen for the first time starts at once."""
    from charrnn_fast.kernels.triton.elman_kernels import elman_forward_kernel

    arguments = problem(64, 8, 32, torch.float32)
    elman_forward(arguments[0][:2], arguments[1], arguments[2])
    compiled = sum(len(cache[0]) for cache in elman_forward_kernel.device_caches.values())
    for T in (1, 3, 16, 17, 64):
        elman_forward(arguments[0][:T], arguments[1], arguments[2])
    assert sum(len(cache[0]) for cache in elman_forward_kernel.device_caches.values()) == compiled


@pytest.mark.parametrize("H", [32, 128])
def test_wild_token_ids_do_not_fault(H):
    generator = torch.Generator("cuda").manual_seed(0)
    table = torch.randn(28, H, generator=generator, device="cuda")
    weight = torch.randn(H, H, generator=generator, device="cuda") / H**0.5
    ids = torch.randint(-(2**62), 2**62, (32, 64), generator=generator, device="cuda")
    out, h_n = elman_forward(table, [weight], tokens=ids)
    grad_table, *_ = elman_backward(torch.ones_like(out), h_n, out, [weight], tokens=ids, num_tokens=28)
    torch.cuda.synchronize()
    assert not out.any()
    assert not grad_table.any()


def test_offsets_beyond_int32():
    """Rows so far apart that those of one tile are more than 2^31 entries apart."""
    H, stride = 32, 2**29
    if torch.cuda.mem_get_info()[0] < 4 * 5 * stride:
        pytest.skip("needs 10 GB of device memory")
    buffer = torch.empty(4 * stride + 4 * H, device="cuda")
    x = buffer.as_strided((4, 5, H), (H, stride, 1)).normal_()
    weight = torch.randn(H, H, device="cuda") / H**0.5
    out, _ = elman_forward(x, [weight], out=torch.empty(4, 5, H, device="cuda"), precision="tf32")
    wanted, _ = elman_forward(x.contiguous(), [weight], precision="tf32")
    assert torch.equal(out, wanted)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    script = textwrap.dedent("""
        import torch
        from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward

        for H in (7, 33, 128):
            x, weight = torch.randn(5, 3, H, device="cuda"), torch.randn(H, H, device="cuda") / H**0.5
            for precision in ("ieee", "tf32"):
                out, h_n = elman_forward(x, [weight], precision=precision)
                elman_backward(out, h_n, out, [weight], precision=precision)
                ids = torch.randint(-2, 9, (5, 3), device="cuda")
                out, h_n = elman_forward(x[0], [weight], tokens=ids, precision=precision)
                elman_backward(out, h_n, out, [weight], tokens=ids, num_tokens=3, precision=precision)
        torch.cuda.synchronize()
    """)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", script]
    result = subprocess.run(
        command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]

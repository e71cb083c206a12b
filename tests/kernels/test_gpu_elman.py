"""The Elman kernels on a device: large sizes, every dtype and precision, repeatability, memory safety."""

import pytest
import torch
from comparisons import same
from elman_problems import TRITON, ElmanProblem, oracle, rounded_scales
from on_gpu import KINDS, compilations, sanitized

from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward, elman_limits
from charrnn_fast.kernels.triton.elman_kernels import elman_forward_kernel

pytestmark = pytest.mark.gpu

# Largest error of forward and backward results, relative to the largest entry, by dtype or precision.
TOLERANCE = {"fp64": 1e-12, "ieee": 4e-5, "tf32": 2e-2, "bf16": 6e-2, "fp16": 1e-2}
# Gradients from 16-bit states are off by this many roundings of the sums of absolute values that they are made of:
# test_elman_sixteen_bits.py has the derivation. Sums that cancel are off by any share of themselves.
ROUNDINGS = {"bf16": 8 * 2.0**-9, "fp16": 8 * 2.0**-12}


def problem(T, B, H, dtype, reverse=(False,), seed=0, gain=0.5) -> ElmanProblem:
    """Drawn on the device, without a bias."""
    generator, D = torch.Generator("cuda").manual_seed(seed), len(reverse)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64).to(dtype)

    weights = [random(H, H) * (gain / H**0.5) for _ in range(D)]
    x, h0, *gradients = random(T, B, D * H), random(D, B, H), random(T, B, D * H), random(D, B, H)
    options = {"tokens": None, "batch_sizes": None, "nonlinearity": "tanh", "reverse": reverse}
    return ElmanProblem(x, weights, h0, x.new_zeros(2, D * H), options, *gradients)


def assert_close(p: ElmanProblem, precision: str, tolerance: float, roundings: float | None = None) -> None:
    """Against fp64; roundings: of gradients, in place of the tolerance."""
    exact = p.to(torch.float64)
    wanted = oracle(exact)
    bounds = [tolerance * right.abs().max() for right in wanted]
    if roundings is not None:
        bounds[2:] = [roundings * scale for scale in rounded_scales(exact)]
    for ours, right, bound in zip(TRITON.results(p, precision=precision), wanted, bounds, strict=True):
        assert (ours.double() - right).abs().max() <= bound


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("H", [1, 16, 31, 32, 33, 64, 100, 128, 200, 256])
def test_every_tile_against_fp64(H, kind):
    dtype, precision = KINDS[kind]
    if (why := elman_limits(H, dtype, precision, "cuda")) is not None:
        pytest.skip(f"beyond one program: {why}")
    for T, B, reverse in ((1, 1, (False,)), (33, 37, (False, True)), (150, 5, (True,)), (9, 2000, (False,))):
        assert_close(problem(T, B, H, dtype, reverse), precision, TOLERANCE[kind], ROUNDINGS.get(kind))


@pytest.mark.parametrize(("T", "B", "H"), [(4096, 8, 64), (4096, 1, 128), (32, 4096, 32), (16, 4096, 128)])
def test_large_sizes(T, B, H):
    assert_close(problem(T, B, H, torch.float32), "ieee", 2e-4)


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(("T", "B", "H"), [(32, 1024, 32), (100, 64, 128)])
def test_twenty_runs_are_bitwise_equal(T, B, H, kind):
    dtype, precision = KINDS[kind]
    p = problem(T, B, H, dtype, (False, True))
    first = TRITON.results(p, precision=precision)
    for _ in range(20):
        assert same(first, TRITON.results(p, precision=precision))


def test_many_lengths_use_one_compiled_kernel():
    """T is no compile-time constant: a sequence length seen for the first time starts at once."""
    p = problem(64, 8, 32, torch.float32)
    elman_forward(p.x[:2], p.weight_hh, p.h0)
    compiled = compilations(elman_forward_kernel)
    for T in (1, 3, 16, 17, 64):
        elman_forward(p.x[:T], p.weight_hh, p.h0)
    assert compilations(elman_forward_kernel) == compiled


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


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    script = """
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
    """
    sanitized(tool, script)

"""Clipping by every backend that has kernels, and the Triton kernels' step, against fp64 and against torch.

Without a GPU the Triton kernels are interpreted (tests/conftest.py), with one they run on it; C runs by each
instruction set.
"""

import math

import needs
import pytest
import torch
from comparisons import by_one_thread_and_by_two, same
from needs import DEVICE
from on_gpu import nobody_waits

from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton import clip_grad_norm as kernels
from charrnn_fast.kernels.triton.clip_grad_norm import clip_and_sgd_step_, clip_grad_norm_, clip_limits

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# One launch, two with pointer arguments, two with a table; a chunk that is full, and one that is not.
SIZES = {
    "small": (896, 1024, 32, 5, 0, 1),
    "large": (2 * kernels.SMALL, 3, 0, kernels.BLOCK),
    "many": (*range(1, kernels.MAX_ARGUMENTS + 2), kernels.BLOCK + 1),
}
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
clip = needs.each_backend(triton=clip_grad_norm_, native=native.clip_grad_norm_)


def device_of(clip) -> torch.device:
    return DEVICE if clip is clip_grad_norm_ else needs.CPU


def random_tensors(sizes, dtypes, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtypes[i % len(dtypes)])
        for i, n in enumerate(sizes)
    ]


def exact(grads, max_norm):
    """Norm, its squares added without rounding unless there are very many, and clipped gradients in fp64."""
    flat = torch.cat([g.double().flatten() for g in grads])
    norm = flat.norm() if flat.numel() > 10**6 else flat.new_tensor(math.sqrt(math.fsum(flat.square().tolist())))
    return norm, [g.double() * min(1.0, max_norm / (float(norm) + 1e-6)) for g in grads]


def assert_rounded(found, wanted, roundings):
    """Equal to fp64 values but for some roundings to found's dtype, each of half a unit in the last place."""
    tolerance = roundings * EPS[found.dtype] / 2 * wanted.abs() + torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - wanted).abs() <= tolerance).all()


def check(clip, grads, roundings):
    """Clip to 1 and compare with fp64. Returns the norm."""
    wanted, clipped = exact(grads, 1.0)
    norm = clip(grads, 1.0)
    for found, right in zip((norm, *grads), (wanted, *clipped), strict=True):
        assert_rounded(found, right, roundings)
    return norm


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES, DTYPES[2:]], ids=str)
@pytest.mark.parametrize("kind", SIZES)
def test_against_fp64(clip, kind, dtypes):
    max_norm, roundings = 0.5, 4 if clip is clip_grad_norm_ else 16  # C adds a chunk's squares in their own type
    grads = random_tensors(SIZES[kind], dtypes, device=device_of(clip))
    norm, clipped = exact(grads, max_norm)
    before = [g.clone() for g in grads]
    found = clip(grads, max_norm)
    assert found.shape == () and found.dtype == torch.nn.utils.get_total_norm(before).dtype
    assert_rounded(found, norm, roundings)
    coarse = roundings / 2 * EPS[found.dtype]
    for got, wanted in zip(grads, clipped, strict=True):
        # The scale is as exact as the norm's dtype, each product rounded once more.
        assert ((got.double() - wanted).abs() <= (coarse + EPS[got.dtype]) * wanted.abs() + 1e-7).all()


@pytest.mark.parametrize("kind", SIZES)
def test_a_norm_below_the_threshold_leaves_every_bit(clip, kind):
    grads = random_tensors(SIZES[kind], DTYPES, device=device_of(clip))
    before = [g.clone() for g in grads]
    clip(grads, 1e4)
    assert same(grads, before)


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(("max_norm", "lr"), [(0.5, torch.tensor(0.25)), (None, 0.25)], ids=["clip", "no clip"])
def test_step_against_fp64(kind, dtypes, max_norm, lr):
    grads, params = random_tensors(SIZES[kind], dtypes), random_tensors(SIZES[kind], dtypes, seed=1)
    norm, clipped = exact(grads, float("inf") if max_norm is None else max_norm)
    stepped = [p.double() - 0.25 * g for p, g in zip(params, clipped, strict=True)]
    before = [g.clone() for g in grads]
    found = clip_and_sgd_step_(params, grads, max_norm, lr.to(DEVICE) if isinstance(lr, torch.Tensor) else lr)
    assert_rounded(found, norm, 4)
    for got, wanted, grad, start in zip(params, stepped, grads, before, strict=True):
        bound = EPS[got.dtype] * wanted.abs() + 2 * EPS[found.dtype] * start.double().abs() + 1e-7
        assert ((got.double() - wanted).abs() <= bound).all()
        assert torch.equal(grad, start)


@pytest.mark.parametrize("kind", SIZES)
def test_the_same_bits_each_time_and_for_any_layout(kind, monkeypatch):
    """The table and the pointer arguments lead to the same chunks in the same order."""
    results = []
    for arguments in (kernels.MAX_ARGUMENTS, kernels.MAX_ARGUMENTS, 0 if kind == "large" else 1000):
        monkeypatch.setattr(kernels, "MAX_ARGUMENTS", arguments)
        monkeypatch.setattr(kernels, "SMALL", 4096 if kind == "small" else 1)
        grads = random_tensors(SIZES[kind], (torch.float32,))
        results.append([clip_grad_norm_(grads, 1.0), *grads])
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_more_chunks_than_programs(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 3)
    grads = random_tensors((5 * kernels.BLOCK + 7, kernels.BLOCK, 2 * kernels.BLOCK + 1), (torch.float64,))
    check(clip_grad_norm_, grads, 4)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_addresses_that_are_not_multiples_of_16(kind):
    sizes = SIZES[kind]
    buffer = random_tensors((sum(sizes) + 1,), (torch.float32,))[0]
    check(clip_grad_norm_, list(buffer[1:].split(sizes)), 8)


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_torchs(clip, kind, value):
    grads = random_tensors(SIZES[kind], (torch.float32,), device=device_of(clip))
    grads[0][3] = value
    parameters = [torch.zeros_like(g) for g in grads]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.clone()
    wanted = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.testing.assert_close(clip(grads, 1.0), wanted, equal_nan=True)
    for p, g in zip(parameters, grads, strict=True):
        torch.testing.assert_close(g, p.grad, equal_nan=True)


def test_a_norm_beyond_fp16_clips_to_zero_as_in_torch(clip):
    grads = [torch.full((100,), 3e4, dtype=torch.float16, device=device_of(clip)) for _ in range(2)]
    assert clip(grads, 1.0).isinf() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_c_by_one_thread_and_by_two(isa, dtype):
    def clipped():
        grads = random_tensors((1, 21, 100_000, 1, 20_000, 0), (dtype,), device=needs.CPU)
        return [check(native.clip_grad_norm_, grads, 16), *grads]

    assert same(*by_one_thread_and_by_two(clipped))
    assert native.clip_grad_norm_([], 1.0) == 0


@needs.NATIVE
def test_limits_of_c():
    assert native.clip_limits([torch.randn(3, 4).t()]) is None
    assert "side by side" in native.clip_limits([torch.randn(3, 4)[:, :2]])


def test_limits():
    x = torch.randn(4, 6, device=DEVICE)
    assert clip_limits([x]) is None and clip_limits([x.t()]) is None and clip_limits([x, x[:0]]) is None
    assert clip_limits([x[0], x[1]]) is None
    assert "elements" in clip_limits([x[:0]])
    assert "side by side" in clip_limits([x[:, :3]])
    assert "side by side" in clip_limits([x[0].expand(3, 6)])
    assert "share" in clip_limits([x, x[0]])
    assert "dense" in clip_limits([x, x.to(torch.complex64)])
    assert "dense" in clip_limits([x, x.to("meta")])
    assert "dense" in clip_limits([x.to_sparse()])
    y = torch.randn(6, 4, device=DEVICE)
    assert clip_limits([x], [y.t().contiguous()]) is None
    assert clip_limits([x, x], [y.t().contiguous(), torch.randn_like(x)]) is None
    assert "dense" in clip_limits([x], [x.to("meta")])
    for other in (y.t(), y, x.double()):
        assert "laid out" in clip_limits([x], [other])


@pytest.mark.gpu
class TestOnDevice:
    def test_a_captured_graph_follows_gradients_and_learning_rate(self):
        """Replayed after the gradients have changed in place, with 64 tensors that go as arguments."""
        for sizes in (SIZES["small"], SIZES["large"], (700,) * kernels.MAX_ARGUMENTS):
            grads, params = random_tensors(sizes, (torch.float32,)), random_tensors(sizes, (torch.float32,), seed=1)
            lr = torch.tensor(0.5, device=DEVICE)
            clip_and_sgd_step_(params, grads, 1.0, lr)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                assert clip_limits(grads, params) is None
                norm = clip_and_sgd_step_(params, grads, 1.0, lr)
            for seed in (2, 3):
                for g, new in zip(grads, random_tensors(sizes, (torch.float32,), seed), strict=True):
                    g.copy_(new)
                lr.fill_(0.1 * seed)
                wanted_norm, clipped = exact(grads, 1.0)
                wanted = [p.double() - float(lr) * g for p, g in zip(params, clipped, strict=True)]
                graph.replay()
                assert_rounded(norm, wanted_norm, 8)
                for p, right in zip(params, wanted, strict=True):
                    torch.testing.assert_close(p.double(), right, rtol=1e-6, atol=1e-6)

    def test_a_table_is_not_captured(self):
        grads = random_tensors(SIZES["many"], (torch.float32,))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert "host memory" in clip_limits(grads)

    @pytest.mark.parametrize("kind", SIZES)
    def test_the_host_does_not_wait(self, kind):
        grads, params = random_tensors(SIZES[kind], DTYPES), random_tensors(SIZES[kind], DTYPES, seed=1)
        torch.cuda.synchronize()
        with nobody_waits():
            clip_grad_norm_(grads, 1.0)
            clip_and_sgd_step_(params, grads, 1.0, 0.1)

    def test_a_hundred_million_elements(self):
        grads = random_tensors((50_000_000, 1_000_003, 49_000_000), (torch.float32,))
        check(clip_grad_norm_, grads, 8)

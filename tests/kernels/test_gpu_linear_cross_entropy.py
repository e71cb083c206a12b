"""Linear cross-entropy on a device: large sizes, memory, repeatability, CUDA graphs, no waiting, wild targets."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from comparisons import same
from on_gpu import KINDS, compilations, nobody_waits, sanitized

from charrnn_fast import linear_cross_entropy
from charrnn_fast.kernels.triton import linear_cross_entropy as kernels
from charrnn_fast.kernels.triton.linear_cross_entropy_kernels import loss_kernel

pytestmark = pytest.mark.gpu

# Largest error of the loss and its gradients, relative to the largest entry, by dtype or precision.
TOLERANCE = {"fp64": 1e-12, "ieee": 2e-5, "tf32x3": 4e-5, "tf32": 2e-2, "bf16": 6e-2, "fp16": 1e-2}


def problem(N, H, V, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    target = torch.randint(V, (N,), generator=generator, device="cuda")
    target[1::7] = -100
    return random(N, H), random(V, H) / H**0.5, random(V), target


def exact(hidden, weight, bias, target, rows=1024):
    """Mean loss and gradients in fp64, some rows at a time."""
    weight, bias = weight.double(), bias.double()
    loss, grad_weight, grad_bias = 0.0, torch.zeros_like(weight), torch.zeros_like(bias)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float64)
    count = (target != -100).sum()
    for chunk in (slice(n, n + rows) for n in range(0, len(target), rows)):
        leaf = (hidden[chunk].double() @ weight.T + bias).requires_grad_()
        part = F.cross_entropy(leaf, target[chunk], reduction="sum") / count
        (grad,) = torch.autograd.grad(part, leaf)
        loss += part.detach()
        grad_hidden[chunk] = grad @ weight
        grad_weight += grad.T @ hidden[chunk].double()
        grad_bias += grad.sum(0)
    return [loss, grad_hidden, grad_weight, grad_bias]


def assert_close(found, wanted, tolerance):
    for ours, right in zip(found, wanted, strict=True):
        assert (ours.double() - right).abs().max() <= tolerance * right.abs().max()


def check(kind, N, H, V):
    dtype, precision = KINDS[kind]
    arguments = problem(N, H, V, dtype)
    assert_close(kernels.linear_cross_entropy(*arguments, precision=precision), exact(*arguments), TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("H", [1, 31, 32, 33, 64, 100, 128, 200])
def test_every_tile_against_fp64(H, kind):
    for N, V in ((1, 2), (37, 28), (1000, 90), (64, 3000)):
        check(kind, N, H, V)


@pytest.mark.parametrize("kind", ["tf32x3", "tf32", "bf16"])
@pytest.mark.parametrize(
    ("H", "V"), [(32, 28), (512, 28), (256, 256), (32, 50257), (128, 50257), (1024, 50257), (64, 100_000)]
)
def test_large_sizes(H, V, kind):
    check(kind, 32768, H, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "H", "V"), [(32768, 32, 28), (4096, 128, 3000), (4096, 512, 3000)])
def test_error_is_at_most_twice_that_of_torch(N, H, V, dtype):
    hidden, weight, bias, target = problem(N, H, V, dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    wanted = exact(*(t.detach() for t in leaves), target)
    ours = linear_cross_entropy(hidden, weight, target, linear_bias=bias)
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), target)
    results = [[loss.detach(), *torch.autograd.grad(loss, leaves)] for loss in (ours, theirs)]
    for found, other, right in zip(*results, wanted, strict=True):
        slack = 8 * torch.finfo(dtype).eps * right.abs().max()
        assert (found.double() - right).abs().max() <= 2 * (other.double() - right).abs().max() + slack


@pytest.mark.parametrize(("H", "V"), [(32, 50257), (1024, 50257), (256, 100_000)])
def test_no_logits_in_memory(H, V):
    """Beside the gradients, and a float32 sum of the weight's, there is room for MIN_ROWS rows of logits, not for N."""
    N = 32768
    hidden, weight, bias, target = problem(N, H, V, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, linear_bias=bias), leaves)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in gradients)
    logits = 2 * V * max(kernels.MIN_ROWS, kernels.MAX_LOGITS // V)
    assert extra <= logits + 3 * 4 * weight.numel() + (64 << 20)
    assert extra < 2 * N * V / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "H", "V"), [(32768, 32, 28), (1000, 100, 3000), (2000, 300, 3000)])
def test_twenty_runs_are_bitwise_equal(N, H, V, kind):
    dtype, precision = KINDS[kind]
    arguments = problem(N, H, V, dtype)
    first = kernels.linear_cross_entropy(*arguments, precision=precision)
    for _ in range(20):
        assert same(first, kernels.linear_cross_entropy(*arguments, precision=precision))


def step(hidden, weight, bias, target):
    """A loss and its gradients as a training step has them, with an upstream gradient that is not 1."""
    loss = linear_cross_entropy(hidden, weight, target, linear_bias=bias)
    return [loss.detach(), *torch.autograd.grad(0.5 * loss, (hidden, weight, bias))]


@pytest.mark.parametrize(("N", "H", "V"), [(1024, 32, 28), (64, 32, 3000), (700, 300, 3000)])
def test_a_graph_holds_it(N, H, V):
    *floats, target = problem(N, H, V)
    leaves = [t.requires_grad_() for t in floats]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*leaves, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*leaves, target)
    *others, other_target = problem(N, H, V, seed=1)
    other_target[: N // 2] = -100
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
        target.copy_(other_target)
    graph.replay()
    assert same(captured, step(*leaves, target))


@pytest.mark.parametrize(("N", "H", "V"), [(1024, 32, 28), (64, 32, 3000), (700, 300, 3000)])
def test_nobody_waits_for_the_device(N, H, V):
    *floats, target = problem(N, H, V)
    leaves = [t.requires_grad_() for t in floats]
    step(*leaves, target)  # compiled here
    with nobody_waits():
        step(*leaves, target)


def test_many_row_counts_use_one_compiled_kernel():
    arguments = problem(64, 32, 28)
    kernels.linear_cross_entropy(*arguments)
    before = compilations(loss_kernel)
    for N in (1, 3, 16, 17, 64):
        kernels.linear_cross_entropy(arguments[0][:N], *arguments[1:3], arguments[3][:N])
    assert compilations(loss_kernel) == before


def test_offsets_beyond_int32():
    """More than 2^31 elements of the input, its last rows against the same rows alone."""
    N, H = (1 << 20) + 1024, 2048
    if torch.cuda.mem_get_info()[0] < 6 * N * H:
        pytest.skip("needs 13 GB of device memory")
    hidden = torch.zeros(N, H, device="cuda", dtype=torch.bfloat16)
    last, weight, bias, target = problem(1024, H, 28, torch.bfloat16)
    hidden[-1024:] = last
    targets = torch.full((N,), -100, device="cuda")
    targets[-1024:] = target
    found = kernels.linear_cross_entropy(hidden, weight, bias, targets)
    wanted = exact(last, weight, bias, target)
    assert not found[1][:-1024].any()
    assert_close([found[0], found[1][-1024:], *found[2:]], wanted, TOLERANCE["bf16"])


@pytest.mark.parametrize("bad", [28, -1, 2**62])
def test_a_target_that_is_no_class_is_reported(bad):
    """NVIDIA: a device assertion, as torch's cross_entropy, which is the end of the process. ROCm: NaN."""
    script = textwrap.dedent(f"""
        import torch
        from charrnn_fast import linear_cross_entropy

        target = torch.zeros(100, dtype=torch.int64, device="cuda")
        target[50] = {bad}
        loss = linear_cross_entropy(torch.randn(100, 32, device="cuda"), torch.randn(28, 32, device="cuda"), target)
        print("loss", loss.item())
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if torch.version.hip is None:
        assert result.returncode != 0
        assert "device-side assert" in result.stderr
        assert "a target is out of bounds" in result.stdout + result.stderr
    else:
        assert result.stdout.strip() == "loss nan"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    script = """
        import torch
        from charrnn_fast.kernels.triton.linear_cross_entropy import linear_cross_entropy

        for N, H, V in ((37, 31, 28), (5, 64, 300), (37, 130, 300)):
            hidden, weight = torch.randn(N, H, device="cuda"), torch.randn(V, H, device="cuda")
            target = torch.randint(V, (N,), device="cuda")
            for precision in ("ieee", "tf32x3", "tf32"):
                linear_cross_entropy(hidden, weight, weight[:, 0], target, precision=precision)
        torch.cuda.synchronize()
    """
    sanitized(tool, script)

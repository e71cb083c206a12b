"""Launches by the driver on a device: the same bits as by Triton's dispatch, on the current stream, in a graph too."""

import pytest
import torch
from comparisons import same

from charrnn_fast.kernels.triton import launch
from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward
from charrnn_fast.kernels.triton.elman_kernels import elman_backward_kernel, elman_forward_kernel

pytestmark = pytest.mark.gpu
KERNELS = (elman_forward_kernel, elman_backward_kernel)


@pytest.fixture
def only_by_the_driver(monkeypatch):
    """From here on Triton's dispatch of the recurrence's kernels is an error."""

    def forbid():
        for kernel in KERNELS:
            monkeypatch.setattr(type(kernel), "run", _forbidden)

    if (why := launch.driver_missing()) is not None:
        pytest.skip(f"no launches by the driver: {why}")
    return forbid


def _forbidden(*arguments, **options):
    raise AssertionError("launched by Triton")


def operands(T=16, B=8, H=32, offset=0):
    """offset: elements by which the input's memory begins behind a multiple of 16 bytes."""
    generator = torch.Generator("cuda").manual_seed(T)
    numbers = torch.randn(T * B * H + offset, generator=generator, device="cuda")
    x = numbers[offset:].view(T, B, H)
    return x, [torch.randn(H, H, generator=generator, device="cuda") / H**0.5]


def run(x, weights):
    out, h_n = elman_forward(x, weights)
    grads = elman_backward(torch.ones_like(out), h_n, out, weights)
    return [out, h_n, grads[0], *grads[1], *grads[2:]]


@pytest.mark.parametrize("offset", [0, 1])
def test_the_second_call_is_the_drivers_with_the_same_bits(only_by_the_driver, offset):
    arguments = operands(offset=offset)
    first = run(*arguments)
    only_by_the_driver()
    assert same(first, run(*arguments))
    shorter = [t[:5] if i == 0 else t for i, t in enumerate(arguments)]  # T is not specialized
    torch.testing.assert_close(run(*shorter)[0], first[0][:5], rtol=0, atol=0)


def test_other_alignment_is_another_form(only_by_the_driver):
    right = run(*operands())[0]
    shifted, weights = operands(offset=1)
    aligned = shifted.clone()
    assert torch.equal(run(shifted, weights)[0], run(aligned, weights)[0])
    assert right.shape == shifted.shape


def test_on_another_stream_and_in_a_graph(only_by_the_driver):
    arguments = operands(T=32)
    first = run(*arguments)
    only_by_the_driver()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = run(*arguments)
    stream.synchronize()
    assert same(first, again)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*arguments)
    arguments[0].neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, run(*arguments))

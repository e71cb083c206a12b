"""kernels/triton/gluon_interpreter.py: Gluon kernels in Triton's interpreter, against torch."""

import pytest
import torch
import triton.language as tl

from charrnn_fast.kernels.triton import gluon_interpreter
from charrnn_fast.kernels.triton.gluon_interpreter import barrier, gl, jit, mma_v2

pytestmark = pytest.mark.skipif(
    not gluon_interpreter.INTERPRETED.value, reason="with a GPU the kernels are compiled and there is no stand-in"
)


@jit
def product_kernel(x_ptr, w_ptr, out_ptr, R: tl.constexpr, N: tl.constexpr, PIECE: tl.constexpr):
    """x @ w^T, x by way of shared memory and in pieces along the sum, as the recurrence's kernels go."""
    layout: tl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 32, 1], [1, 1, 1], [2, 1, 0])
    rows = gl.arange(0, R, layout=gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, N, layout=gl.SliceLayout(0, layout))[None, :]
    buffer = gl.allocate_shared_memory(gl.float32, [R, N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    buffer.store(gl.load(x_ptr + rows * N + cols))
    barrier()
    total = gl.zeros([R, N, PIECE], gl.float32, layout=layout)
    for first in gl.static_range(0, N, PIECE):
        k = first + gl.arange(0, PIECE)
        w = gl.load(w_ptr + gl.arange(0, N)[:, None] * N + k[None, :])
        x = buffer.slice(first, PIECE, dim=1).load(gl.SliceLayout(1, layout))
        total += w.expand_dims(0) * x.expand_dims(1)
    gl.store(out_ptr + rows * N + cols, gl.sum(total, axis=2))


@jit
def matrix_kernel(x_ptr, w_ptr, out_ptr, N: tl.constexpr, B: tl.constexpr):
    """w @ x by the matrix instructions' stand-in."""
    n, b = gl.arange(0, N), gl.arange(0, B)
    w = gl.load(w_ptr + n[:, None] * N + n[None, :])
    x = gl.load(x_ptr + n[:, None] * B + b[None, :])
    total = mma_v2(w, x, gl.zeros([N, B], gl.float32))
    gl.store(out_ptr + n[:, None] * B + b[None, :], total)


@jit
def unwritten_kernel(out_ptr, N: tl.constexpr):
    buffer = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.store(out_ptr + gl.arange(0, N), buffer.load(None))


def test_product_through_shared_memory():
    x, w = torch.randn(3 + 1, 16), torch.randn(16, 16)
    out = torch.full_like(x, torch.nan)
    product_kernel[(1,)](x, w, out, R=4, N=16, PIECE=4)
    torch.testing.assert_close(out, x @ w.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matrix_instructions(dtype):
    x, w = torch.randn(16, 8).to(dtype), torch.randn(16, 16).to(dtype)
    out = torch.full((16, 8), torch.nan)
    matrix_kernel[(1,)](x, w, out, N=16, B=8)
    torch.testing.assert_close(out, w.float() @ x.float())


def test_shared_memory_read_before_it_is_written_is_nan():
    out = torch.zeros(8)
    unwritten_kernel[(1,)](out, N=8)
    assert out.isnan().all()


def test_views_share_their_buffer_and_stay_within_it():
    buffer = gl.allocate_shared_memory(tl.float32, [2, 8])
    view = buffer.slice(4, 4, dim=1)
    view.array[...] = 1.0
    assert (buffer.array[:, 4:] == 1.0).all()
    assert view.shape == [2, 4]
    with pytest.raises(ValueError, match="4:12 is not within 8"):
        buffer.slice(4, 8, dim=1)


def test_a_store_of_another_shape_or_type_is_refused():
    buffer = gl.allocate_shared_memory(tl.float32, [8])
    for value in (gl_tensor(torch.zeros(4)), gl_tensor(torch.zeros(8, dtype=torch.float64))):
        with pytest.raises(ValueError, match="stored to fp32"):
            buffer.store(value)


def gl_tensor(tensor: torch.Tensor) -> tl.tensor:
    dtype = {torch.float32: tl.float32, torch.float64: tl.float64}[tensor.dtype]
    buffer = gl.allocate_shared_memory(dtype, list(tensor.shape))
    buffer.array[...] = tensor.numpy()
    return buffer.load()

"""clip_grad_norm_ against torch.nn.utils.clip_grad_norm_, clip_and_sgd_step_ against that and torch.optim.SGD."""

import copy
import sys

import pytest
import torch
from torch import nn

from charrnn_fast import clip_grad_norm_
from charrnn_fast.kernels import native
from charrnn_fast.ops.clip_grad_norm import _backend, clip_and_sgd_step_


@pytest.fixture(autouse=True)
def asked_for(backend, monkeypatch):
    """Every test with every backend; what one cannot take it hands to torch."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("these gradients are on a CPU; tests/kernels and bench/gate.py have the GPU's")
    monkeypatch.setenv("CHARRNN_BACKEND", backend)


def _parameters(sizes, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype) * scale
    return parameters


def _both(make, *arguments, rtol=1e-5, **options):
    ours, theirs = make(), make()
    norm = clip_grad_norm_(ours, *arguments, **options)
    expected = torch.nn.utils.clip_grad_norm_(theirs, *arguments, **options)
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=0, equal_nan=True)  # and of one dtype
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=1e-12, equal_nan=True)


SIZES = [(3, 4), (5,), (), (0,), (2, 1, 2), (257,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 0.0])
def test_matches_torch(dtype, scale):
    # In bf16 torch rounds the norm, the scale and the product, the kernel all but the scale: 5 roundings of 2^-8.
    rtol = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 5 * 2**-8}[dtype]
    _both(lambda: _parameters(SIZES, dtype, scale), 1.0, rtol=rtol)


# The interpreter takes some 10 ms for a tensor.
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_hundreds_of_tensors(count):
    sizes = [(int(n),) for n in torch.randint(1, 400, (count,), generator=torch.Generator().manual_seed(3))]
    _both(lambda: _parameters(sizes), 0.5)


@pytest.mark.parametrize(
    "options", [{"norm_type": torch.inf}, {"norm_type": 3.0}, {"norm_type": 1}, {"foreach": False}]
)
def test_options(options):
    _both(lambda: _parameters(SIZES[:3]), 0.5, **options)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_values_that_are_not_finite(value):
    def make():
        parameters = _parameters(SIZES[:3])
        parameters[1].grad[2] = value
        return parameters

    _both(make, 1.0)
    parameters = make()
    before = [p.grad.clone() for p in parameters]
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    for p, grad in zip(parameters, before, strict=True):
        assert torch.equal(p.grad.nan_to_num(7.0), grad.nan_to_num(7.0))


def _mixed():
    """One laid out unlike its parameter, of two types, and a parameter without one."""
    parameters = [*_parameters([(3, 4), (2,)]), *_parameters([(4,)], torch.float64), torch.ones(3)]
    parameters[0].grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).T
    return parameters


def test_mixed_missing_strided_and_single():
    _both(_mixed, 0.1)
    assert clip_grad_norm_([], 1.0) == 0 and clip_grad_norm_([torch.zeros(2)], 1.0) == 0
    (single,) = _parameters([(100,)])
    clip_grad_norm_(single, 1.0)
    assert single.grad.norm() == pytest.approx(1.0, rel=1e-5)
    generator = (p for p in _parameters([(100,), (3,)]))
    assert clip_grad_norm_(generator, 1.0) > 1


def test_autograd_notices(backend):
    """What autograd has saved must not change unseen."""
    parameters = _parameters([(3,), (4,)])
    leaf = torch.ones(3, requires_grad=True)
    product = (leaf * parameters[0].grad).sum()
    clip_grad_norm_(parameters, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    product = (leaf * parameters[0]).sum()
    clip_and_sgd_step_(parameters, None, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


STEP_SIZES = {"small": SIZES, "large": [(33000,), (7,)], "many": [(3,)] * 70}


def _step_both(make, max_norm, lr, rtol):
    ours, theirs = make(), make()
    norm = clip_and_sgd_step_(ours, max_norm, lr)
    grads = [None if p.grad is None else p.grad.clone() for p in theirs]
    expected = torch.nn.utils.clip_grad_norm_(theirs, torch.inf if max_norm is None else max_norm)
    torch.optim.SGD(theirs, float(lr)).step()
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=0)
    for p, q, grad in zip(ours, theirs, grads, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)
        assert p.grad is grad is None or torch.equal(p.grad, grad)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize(("kind", "dtype"), [*((k, torch.float64) for k in STEP_SIZES), ("small", torch.float32)])
def test_step_is_clip_and_sgd(kind, dtype, lr, max_norm):
    rtol = 1e-13 if dtype == torch.float64 else 1e-5
    _step_both(lambda: [*_parameters(STEP_SIZES[kind], dtype), torch.ones(3, dtype=dtype)], max_norm, lr, rtol)


def test_step_of_what_the_kernel_does_not_take():
    """Gradients laid out unlike their parameters, mixed dtypes, no gradients; and what is not finite."""
    _step_both(_mixed, 0.1, 0.5, 1e-5)
    assert clip_and_sgd_step_([], 1.0, 0.1) == 0 and clip_and_sgd_step_([torch.zeros(2)], 1.0, 0.1) == 0
    (single,) = _parameters([(100,)])
    start = single.clone()
    clip_and_sgd_step_(single, 1.0, 1.0)
    assert (single - start).norm() == pytest.approx(1.0, rel=1e-5)
    single.grad[3] = torch.nan
    assert clip_and_sgd_step_(single, 1.0, 1.0).isnan() and single.isnan().all()


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_parameter_listed_twice_is_clipped_as_torch_clips_it(backend, size):
    drawn = _parameters([(size,)])
    if backend == "triton":  # whose programs the interpreter runs one after the other
        assert _backend([p.grad for p in 2 * drawn])[0] == "torch"
    for _ in range(10):  # two threads that scale one gradient lose some of the products, now and then
        _both(lambda: 2 * copy.deepcopy(drawn), 1.0)


def test_gradients_that_overlap_are_clipped_as_torch_clips_them():
    def make():
        memory, *parameters = _parameters([(100_001,), (100_000,), (100_000,)])
        for i, parameter in enumerate(parameters):
            parameter.grad = memory[i : i + 100_000]
        return parameters

    _both(make, 1.0)


def test_a_generator_that_was_used_up_is_warned_of():
    used = (p for p in [nn.Parameter(torch.zeros(3))])
    list(used)
    with pytest.warns(UserWarning, match="empty generator"):
        assert clip_grad_norm_(used, 1.0) == 0


def test_the_norm_is_on_the_gradients_device_whatever_the_default():
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    with torch.device("meta"):
        norm = clip_grad_norm_([parameter], 1.0)
    assert norm.device.type == "cpu" and norm == 2


def _calls(run) -> int:
    """Calls of functions, in Python and from Python, while run runs."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


class _Launch:
    """Stands for a kernel: what it is given."""

    def __init__(self):
        self.arguments = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.arguments.append(arguments)


@pytest.mark.skipif(native.available() is not None, reason=f"native: {native.available()}")
def test_python_calls_no_function_for_each_tensor(backend, monkeypatch):
    """With 2,000 tensors as many calls as with 200; and the table of a GPU's kernels is kept while the tensors stay."""
    if backend == "torch":
        return
    kernels = pytest.importorskip("charrnn_fast.kernels.triton.clip_grad_norm") if backend == "triton" else None
    norm, scale = _Launch(), _Launch()
    if kernels is not None:
        monkeypatch.setattr(kernels, "norm_kernel", norm)
        monkeypatch.setattr(kernels, "scale_kernel", scale)
    counts = []
    for number in (200, 2000):
        parameters = _parameters([(3,)] * number)
        clip_grad_norm_(parameters, 0.5)  # the first imports, compiles and makes tables
        counts.append(_calls(lambda parameters=parameters: clip_grad_norm_(parameters, 0.5)))
    assert counts[0] == counts[1] < 150, counts
    if kernels is not None:
        tables = [arguments[1] for arguments in norm.arguments]
        assert tables[0] is tables[1] and tables[2] is tables[3] and len(tables[3]) == 2000
        assert tables[3][:, 0].tolist() == [p.grad.data_ptr() for p in parameters]
        parameters[5].grad = torch.ones(3)
        clip_grad_norm_(parameters, 0.5)
        assert norm.arguments[-1][1][:, 0].tolist() == [p.grad.data_ptr() for p in parameters]


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], [torch.bfloat16, torch.float32, torch.float64]])
def test_types_that_are_copied_to_a_wider_one(dtypes, backend):
    def make():
        return [p for dtype in dtypes for p in _parameters(SIZES, dtype)]

    for max_norm in (0.5, 1e6):
        _both(make, max_norm, rtol=5 * 2**-8)
    if backend == "native":
        assert _backend([p.grad for p in make()])[0] == "native"
    parameters = make()
    parameters[0].grad[0] = torch.nan
    assert clip_grad_norm_(parameters, 1.0).isnan() and all(p.grad.isnan().all() for p in parameters)

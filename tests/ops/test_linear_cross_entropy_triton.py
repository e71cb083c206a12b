"""linear_cross_entropy by the Triton kernels: the operation's contract around them.

Without a GPU they are interpreted, and asked for by CHARRNN_BACKEND; tests/kernels has the many sizes.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F

from charrnn_fast import linear_cross_entropy
from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton import linear_cross_entropy as kernels
from charrnn_fast.ops import backends
from charrnn_fast.ops import linear_cross_entropy as operation
from charrnn_fast.ops.precision import matmul_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(5, 4, 3), (3, 4, 70), (3, 70, 4)]  # one tile; several tiles of classes; H beyond a tile: GEMMs


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """The backend asked for by name; the native kernel out of reach."""
    monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    monkeypatch.setattr(native, "linear_cross_entropy", None)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the kernels' launchers."""
    counts = {"forward": 0, "backward": 0}

    def counting(name):
        launcher = getattr(kernels, f"linear_cross_entropy_{name}")

        def count(*args, **options):
            counts[name] += 1
            return launcher(*args, **options)

        return count

    for name in counts:
        monkeypatch.setattr(kernels, f"linear_cross_entropy_{name}", counting(name))
    return counts


def operands_of(N, H, V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, H), (V, H), (V,))]
    target = torch.randint(V, (N,), generator=generator)
    target[1::3] = -100
    return [t.to(DEVICE, dtype).requires_grad_() for t in tensors], target.to(DEVICE)


def expected(input, weight, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(input, weight, linear_bias), target, **options)


def call(function, operands, target, **options):
    bias = operands[2] if len(operands) == 3 else None
    return function(operands[0], operands[1], target, linear_bias=bias, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(calls, shape, reduction):
    operands, target = operands_of(*shape)
    upstream = torch.randn(shape[0] if reduction == "none" else (), dtype=torch.float64, device=DEVICE)
    for used in (operands, operands[:2]):
        ours, theirs = (call(f, used, target, reduction=reduction) for f in (linear_cross_entropy, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(loss, used, upstream) for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert calls == {"forward": 2, "backward": 2}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 1, 70), (2, 70, 2)])
def test_gradcheck_and_gradgradcheck(shape, reduction):
    operands, target = operands_of(*shape)

    def function(*tensors):
        return call(linear_cross_entropy, tensors, target, reduction=reduction)

    assert torch.autograd.gradcheck(function, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, operands, fast_mode=True)


def test_only_what_is_wanted(calls):
    operands, target = operands_of(5, 4, 3)
    with torch.no_grad():
        assert not call(linear_cross_entropy, operands, target).requires_grad
    assert not call(linear_cross_entropy, [t.detach() for t in operands], target).requires_grad
    for wanted in (0, 1, 2):
        for i, t in enumerate(operands):
            t.requires_grad_(i == wanted)
            t.grad = None
        call(linear_cross_entropy, operands, target).backward()
        assert [t.grad is not None for t in operands] == [i == wanted for i in range(3)]
    assert calls == {"forward": 5, "backward": 3}


def test_two_backward_passes_add_up():
    operands, target = operands_of(5, 4, 3)
    loss = call(linear_cross_entropy, operands, target)
    loss.backward(retain_graph=True)
    once = operands[1].grad.clone()
    loss.backward()
    assert torch.equal(operands[1].grad, 2 * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_under_compile_it_is_one_registered_operator(calls, reduction, bias):
    operands, target = operands_of(5, 4, 3)
    operands = operands if bias else operands[:2]
    operands[0].requires_grad_(False)
    compiled = torch.compile(
        lambda *tensors: call(linear_cross_entropy, tensors, target, reduction=reduction).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    gradients = torch.autograd.grad(compiled(*operands), operands[1:])
    right = torch.autograd.grad(call(expected, operands, target, reduction=reduction).square().sum(), operands[1:])
    torch.testing.assert_close(gradients, right)
    assert calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registered_operators_say_what_they_return(reduction):
    for dtype in (torch.float64, torch.bfloat16):
        operands, target = operands_of(5, 4, 3, dtype)
        torch.library.opcheck(
            operation._loss_op,
            (*operands, target, reduction, -100, torch.float32),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
        with torch.no_grad():
            loss, lse, count = operation._loss_op(*operands, target, reduction, -100, dtype)
        for needs_grad in ([True, True, True], [False, True, False]):
            torch.library.opcheck(
                operation._loss_backward_op,
                (loss, *(t.detach() for t in operands), target, lse, count, reduction, -100, needs_grad),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_autocast_multiplies_in_16_bit_and_returns_float32(calls):
    operands, target = operands_of(5, 4, 3, torch.float32)
    results = []
    for function in (linear_cross_entropy, expected):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = call(function, operands, target)
        results.append([loss, *torch.autograd.grad(loss, operands)])
    assert results[0][0].dtype == results[1][0].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=3e-2, atol=3e-2)
    assert calls == {"forward": 1, "backward": 1}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        double, _ = operands_of(5, 4, 3)
        assert call(linear_cross_entropy, double, target).dtype == torch.float64


def test_a_second_derivative_under_autocast():
    operands, target = operands_of(5, 4, 3, torch.float32)
    results = []
    for function in (linear_cross_entropy, expected):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = call(function, operands, target)
        (gradient,) = torch.autograd.grad(loss, operands[1], create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), operands))
    torch.testing.assert_close(*results, rtol=5e-2, atol=5e-2)


def test_what_the_kernels_do_not_take_goes_to_torch(calls):
    operands, target = operands_of(5, 4, 3)
    probabilities = torch.rand(5, 3, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(
        linear_cross_entropy(operands[0], operands[1], probabilities),
        expected(operands[0], operands[1], probabilities),
    )
    one = linear_cross_entropy(operands[0][0], operands[1], target[0])
    torch.testing.assert_close(one, expected(operands[0][0], operands[1], target[0]))
    assert linear_cross_entropy(operands[0][:0], operands[1], target[:0], reduction="sum") == 0
    derivative = torch.func.grad(lambda w: linear_cross_entropy(operands[0], w, target))(operands[1])
    torch.testing.assert_close(derivative, torch.autograd.grad(call(expected, operands[:2], target), operands[1])[0])
    assert calls == {"forward": 0, "backward": 0}


def test_bad_input_is_refused_in_torchs_words():
    operands, target = operands_of(4, 3, 2)
    bad = [(target[:3], {}), (target, {"reduction": "median"}), (target.int(), {})]
    if DEVICE.type == "cpu":  # a GPU asserts: tests/kernels/test_gpu_linear_cross_entropy.py
        bad += [(target + 5, {}), (target - 50, {"ignore_index": 1})]
    for wrong, options in bad:
        errors = []
        for function in (expected, linear_cross_entropy):
            with pytest.raises((IndexError, ValueError, RuntimeError)) as caught:
                call(function, operands, wrong, **options)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
    for mixed in ([operands[0].float(), *operands[1:]], [operands[0][:, :2], *operands[1:]]):
        with pytest.raises(RuntimeError):
            call(linear_cross_entropy, mixed, target)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_contract_of_torchs_function_of_this_name():
    ours, theirs = (inspect.signature(f).parameters for f in (linear_cross_entropy, F.linear_cross_entropy))
    assert all(theirs[name].kind == parameter.kind for name, parameter in ours.items())
    assert [name for name in theirs if name in ours] == list(ours)
    operands, target = operands_of(5, 4, 3)
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 1}, {"ignore_index": None}):
        targets = target.clamp(min=0) if options.get("ignore_index") else target
        results = [call(f, operands, targets, **options) for f in (linear_cross_entropy, F.linear_cross_entropy)]
        torch.testing.assert_close(*results)
    x = operands[0]
    head, bias, classes = torch.randn(3, 2, 7, x.shape[1]), torch.randn(3, 2, 7), torch.tensor([0.5, 1.0, 2.0])
    several = torch.randint(3, (len(x), 2, 7))
    for arguments, options in (
        ((x, operands[1], target), {"weight": classes, "label_smoothing": 0.1}),
        ((x, operands[1], target), {"label_smoothing": 0.3, "reduction": "none"}),
        ((x, operands[1], torch.rand(len(x), 3)), {"linear_bias": bias[:, 0, 0]}),
        ((x, head.to(x), several), {"linear_bias": bias.to(x)}),
    ):
        tensors = {k: v.to(x) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        arguments = [a.to(x) if a.is_floating_point() else a.to(x.device) for a in arguments]
        torch.testing.assert_close(
            linear_cross_entropy(*arguments, **tensors), F.linear_cross_entropy(*arguments, **tensors)
        )
    for wrong in (target[:3], target.int()):
        errors = []
        for function in (linear_cross_entropy, F.linear_cross_entropy):
            with pytest.raises((IndexError, ValueError, RuntimeError)) as caught:
                call(function, operands, wrong)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]


def test_the_backend_is_chosen_by_device_and_environment(monkeypatch):
    assert backends.choose("linear_cross_entropy", DEVICE, torch.float32) == "triton"
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.complex64"):
        backends.choose("linear_cross_entropy", DEVICE, torch.complex64)
    monkeypatch.setenv("CHARRNN_BACKEND", "torch")
    assert backends.choose("linear_cross_entropy", DEVICE, torch.float32) == "torch"
    monkeypatch.setenv("CHARRNN_BACKEND", "auto")
    on_cpu = "native" if native.available() is None else "torch"
    assert backends.choose("linear_cross_entropy", DEVICE, torch.float32) == (
        "triton" if DEVICE.type == "cuda" else on_cpu
    )
    assert backends.choose("linear_cross_entropy", torch.device("meta"), torch.float32) == "torch"


def test_float32_follows_torchs_switch_for_matrix_products():
    gpu, before = torch.device("cuda"), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert matmul_precision(gpu, torch.float32) == ("ieee" if torch.version.hip else "tf32")
        assert matmul_precision(gpu, torch.bfloat16) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert matmul_precision(gpu, torch.float32) == ("ieee" if torch.version.hip else "tf32x3")
        assert matmul_precision(torch.device("cpu"), torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

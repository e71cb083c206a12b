"""linear_cross_entropy against F.cross_entropy(F.linear(...)), by each backend that has kernels: values, gradients,
second gradients, what surrounds a call, errors. tests/kernels has the many sizes.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F

from charrnn_fast import linear_cross_entropy
from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton import linear_cross_entropy as kernels
from charrnn_fast.ops import backends
from charrnn_fast.ops.precision import matmul_precision

pytestmark = pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
# One tile; several tiles of classes; H beyond a tile: GEMMs. Of the C kernel: also many classes.
SHAPES = [(1, 1, 2), (5, 4, 3), (3, 4, 70), (3, 70, 4), (33, 31, 100), (5, 16, 1500)]
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(autouse=True)
def asked_for(backend, monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", backend)


@pytest.fixture
def calls(backend, monkeypatch):
    """The names of the launchers that were called, in their order, of this backend; the other's are out of reach."""
    found = []

    def noted(module, name):
        launcher = getattr(module, name)

        def note(*args, **options):
            found.append(name)
            return launcher(*args, **options)

        monkeypatch.setattr(module, name, note)

    if backend == "native":
        noted(native, "linear_cross_entropy")
        monkeypatch.setattr(kernels, "linear_cross_entropy_forward", None)
    else:
        noted(kernels, "linear_cross_entropy_forward")
        noted(kernels, "linear_cross_entropy_backward")
        monkeypatch.setattr(native, "linear_cross_entropy", None)
    return found


@pytest.fixture
def operands_of(device):
    """Makes operands (N, H), (V, H), (V,), which want gradients, and a target in which every third row is ignored."""

    def make(N, H, V, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, H), (V, H), (V,))]
        target = torch.randint(V, (N,), generator=generator)
        target[1::3] = -100
        return [t.to(device, dtype).requires_grad_() for t in tensors], target.to(device)

    return make


def expected(input, weight, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(input, weight, linear_bias), target, **options)


def call(function, operands, target, **options):
    bias = operands[2] if len(operands) == 3 else None
    return function(operands[0], operands[1], target, linear_bias=bias, **options)


def both(operands, target, upstream=None, wanted=None, **options):
    """Loss and gradients of ours and of torch's."""
    results = []
    for function in (linear_cross_entropy, expected):
        loss = call(function, operands, target, **options)
        gradients = torch.autograd.grad(loss, operands if wanted is None else wanted, upstream)
        results.append([loss, *gradients])
    return results


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(operands_of, calls, shape, reduction):
    operands, target = operands_of(*shape)
    upstream = torch.randn(shape[0] if reduction == "none" else (), dtype=torch.float64).to(target.device)
    for used in (operands, operands[:2]):
        ours, theirs = both(used, target, upstream, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert len(calls) in (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_torchs(operands_of, dtype):
    operands, target = operands_of(200, 64, 28, dtype)
    exact = [t.detach().double().requires_grad_() for t in operands]
    truth = torch.autograd.grad(call(expected, exact, target), exact)
    (_, *ours), (_, *theirs) = both(operands, target)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        slack = torch.finfo(dtype).eps * t.abs().max()
        assert (a.double() - t).abs().max() <= 2 * (b.double() - t).abs().max() + slack


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 1, 70), (2, 70, 2)])
def test_gradcheck_and_gradgradcheck(operands_of, shape, reduction):
    operands, target = operands_of(*shape)

    def function(*tensors):
        return call(linear_cross_entropy, tensors, target, reduction=reduction)

    assert torch.autograd.gradcheck(function, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, operands, fast_mode=True)


def test_only_what_is_wanted(operands_of, calls):
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
    assert len(calls) == (8 if "linear_cross_entropy_backward" in calls else 5)


def test_a_graph_walked_again_gives_the_same_gradients(operands_of):
    """Also where a hook changes in place what it was given."""
    operands, target = operands_of(5, 4, 3)
    doubled = operands[0] * 1
    doubled.register_hook(lambda grad: grad.mul_(2))
    loss = call(linear_cross_entropy, [doubled, *operands[1:]], target)
    right = torch.autograd.grad(call(expected, operands, target), operands)
    for _ in range(3):
        found = torch.autograd.grad(loss, operands, retain_graph=True)
        torch.testing.assert_close(found, (2 * right[0], *right[1:]))


def test_freed_memory_is_an_error():
    hidden, weight = torch.randn(5, 4), torch.randn(3, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        linear_cross_entropy(hidden, weight, torch.randint(3, (5,)))


def test_strided_input_and_large_logits(operands_of, device):
    operands, target = operands_of(12, 8, 5)
    wide = torch.randn(12, 16, dtype=torch.float64, device=device)
    for input in (wide[:, ::2], wide[:, :8], wide.T[:12, :8], wide[:, :8] * 1e4):
        loss = linear_cross_entropy(input, operands[1], target[: len(input)])
        torch.testing.assert_close(loss, expected(input, operands[1], target[: len(input)]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_in_one_graph(operands_of, calls, reduction, bias):
    """Of the Triton kernels one registered operator; of C's torch's own, which a compiler can fuse."""
    operands, target = operands_of(5, 4, 3)
    operands = operands if bias else operands[:2]
    operands[0].requires_grad_(False)
    torch._dynamo.reset()  # what was compiled for another backend
    compiled = torch.compile(
        lambda *tensors: call(linear_cross_entropy, tensors, target, reduction=reduction).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    gradients = torch.autograd.grad(compiled(*operands), operands[1:])
    right = torch.autograd.grad(call(expected, operands, target, reduction=reduction).square().sum(), operands[1:])
    torch.testing.assert_close(gradients, right)
    in_turn = ["linear_cross_entropy_forward", "linear_cross_entropy_backward"]
    assert calls == (in_turn if backends.requested() == "triton" else [])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registered_operators_say_what_they_return(operands_of, backend, reduction):
    if backend == "native":
        return  # it is none
    for dtype in (torch.float64, torch.bfloat16):
        operands, target = operands_of(5, 4, 3, dtype)
        forward = torch.ops.charrnn_fast.linear_cross_entropy.default
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(forward, (*operands, target, reduction, -100, torch.float32), test_utils=utils)
        arguments = (*(t.detach() for t in operands), target, reduction, -100, dtype)
        results = forward(*arguments)
        for needs_grad in ([True, True, True], [False, True, False]):
            backward = torch.ops.charrnn_fast.linear_cross_entropy_backward.default
            torch.library.opcheck(backward, (*results, *arguments, needs_grad), test_utils=utils[::2])


def test_autocast_multiplies_in_16_bit_and_returns_float32(operands_of, device):
    operands, target = operands_of(5, 4, 3, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        losses = [call(function, operands, target) for function in (linear_cross_entropy, expected)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=3e-2, atol=3e-2)
    gradients = [torch.autograd.grad(loss, operands, create_graph=True) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=3e-2, atol=3e-2)
    second = [torch.autograd.grad(of_weight.square().sum(), operands) for _, of_weight, _ in gradients]
    torch.testing.assert_close(*second, rtol=5e-2, atol=5e-2)
    with torch.autocast(device.type, torch.bfloat16):
        double, _ = operands_of(5, 4, 3)
        assert call(linear_cross_entropy, double, target).dtype == torch.float64


def test_what_the_kernels_do_not_take_goes_to_torch(operands_of, calls, device):
    operands, target = operands_of(5, 4, 3)
    probabilities = torch.rand(5, 3, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        linear_cross_entropy(operands[0], operands[1], probabilities),
        expected(operands[0], operands[1], probabilities),
    )
    one = linear_cross_entropy(operands[0][0], operands[1], target[0])
    torch.testing.assert_close(one, expected(operands[0][0], operands[1], target[0]))
    assert linear_cross_entropy(operands[0][:0], operands[1], target[:0], reduction="sum") == 0
    derivative = torch.func.grad(lambda w: linear_cross_entropy(operands[0], w, target))(operands[1])
    torch.testing.assert_close(derivative, torch.autograd.grad(call(expected, operands[:2], target), operands[1])[0])
    assert not calls


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets the kernels, warns of NaN
@pytest.mark.parametrize("vocab", [30, 1500])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_are_all_ignored_give_no_gradient(operands_of, vocab, reduction):
    operands, target = operands_of(6, 4, vocab, torch.float32)
    loss = call(linear_cross_entropy, operands, torch.full_like(target, -100), reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss.sum(), operands))


def refusal(function, operands, target, **options):
    """The type and the words of the error."""
    with pytest.raises((IndexError, TypeError, ValueError, RuntimeError)) as caught:
        call(function, operands, target, **options)
    return caught.type, str(caught.value)


def test_bad_input_is_refused_in_torchs_words(operands_of, device):
    operands, target = operands_of(4, 3, 2)
    bad = [(target[:3], {}), (target, {"reduction": "median"}), (target.int(), {})]
    if device.type == "cpu":  # a GPU asserts: tests/kernels/test_gpu_linear_cross_entropy.py
        bad += [(target.clamp(min=0) + 5, {}), (target - 50, {"ignore_index": 1})]
    for wrong, options in bad:
        assert refusal(linear_cross_entropy, operands, wrong, **options) == refusal(
            expected, operands, wrong, **options
        )
    for mixed in ([operands[0].float(), *operands[1:]], [operands[0][:, :2], *operands[1:]]):
        with pytest.raises(RuntimeError):
            call(linear_cross_entropy, mixed, target)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("hidden", "vocab"), [(4, 30), (5, 130), (4, 1500), (300, 30)])
@pytest.mark.parametrize(
    ("ignored", "reduction"), [("some", "mean"), ("some", "none"), ("all", "mean"), ("all", "sum")]
)
@pytest.mark.parametrize(
    ("place", "value"),
    [(0, torch.nan), (0, torch.inf), (1, torch.inf), (1, -torch.inf), (2, torch.inf), (2, -torch.inf)],
)
def test_what_is_not_finite_spreads_as_in_torch(operands_of, device, value, place, ignored, hidden, vocab, reduction):
    """0 * NaN: also from rows that do not count, and from no others; what is finite in torch is the same number."""
    if device.type == "cuda":
        pytest.skip("a GPU's products in three parts make NaN of what is infinite")
    operands, target = operands_of(7, hidden, vocab, torch.float32)
    target[:: 1 if ignored == "all" else 3] = -100
    operands[place].data.view(-1)[1] = value  # of a row that is ignored: 0, or of all rows
    upstream = torch.full((7,) if reduction == "none" else (), 3.0)
    for mine, right in zip(*both(operands, target, upstream, reduction=reduction), strict=True):
        assert torch.equal(mine.isfinite(), right.isfinite())
        finite = right.isfinite()
        torch.testing.assert_close(mine[finite], right[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [30, 1500])
def test_small_fp16_gradients_survive_loss_scaling(operands_of, vocab, backend):
    rows = 4096 if backend == "native" else 64
    (input, weight, _), target = operands_of(rows, 16, vocab)
    target.clamp_(min=0)
    found = [(t * 0.1).half().detach().requires_grad_() for t in (input, weight)]
    exact = [t.detach().double().requires_grad_() for t in found]
    (linear_cross_entropy(*found, target).float() * rows).backward()
    (linear_cross_entropy(*exact, target) * rows).backward()
    for mine, right in zip(found, exact, strict=True):
        error = (mine.grad.double() - right.grad).norm() / right.grad.norm()
        assert error < 1e-3, float(error)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("classes", [5, 1100])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradients_and_logits_that_are_not_finite(operands_of, device, reduction, classes):
    """A row that does not count has zeros even then; a row with an infinite logit is NaN in every class."""
    operands, target = operands_of(5, 4, classes)
    upstream = torch.tensor([1.0, torch.nan, 1.0, 2.0, 1.0]) if reduction == "none" else torch.tensor(torch.nan)
    upstream = upstream.double().to(device)
    overflowing = [operands[0].detach().clone().requires_grad_(), *operands[1:]]
    with torch.no_grad():
        overflowing[0][2] = torch.inf
    for given, gradient in ((operands, upstream), (overflowing, torch.ones_like(upstream))):
        (_, *found), (_, *right) = both(given, target, gradient, reduction=reduction)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-9, atol=1e-9)
        assert not found[0][1].any()


@pytest.mark.parametrize(
    "options", [{"reduction": "x"}, {"ignore_index": 2**64}, {"ignore_index": "x"}, {"ignore_index": 1.5}], ids=str
)
def test_options_are_refused_after_shapes_as_torch_does(operands_of, options):
    operands, target = operands_of(5, 4, 3)
    for given in (operands, [operands[0][:, :2], *operands[1:]], [None, *operands[1:]], [operands[0], [1.0], None]):
        ours, theirs = (refusal(function, given, target, **options)[0] for function in (linear_cross_entropy, expected))
        assert ours is theirs


@pytest.mark.parametrize("V", [3, 200, 1000, 1100])
def test_large_logits_keep_their_differences(backend, V):
    """An offset common to all classes changes nothing but the logits' own rounding, the same for both; of the Triton
    kernels, whose backward pass works from the log-sum-exp, also that one's.
    """
    offset, tolerance = (1e6, 1e-4) if backend == "native" else (1e3, 1e-3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    operands = [hidden, weight, torch.full((V,), offset)]
    (_, *found), (_, *wanted) = both(operands, torch.randint(V, (5,)), wanted=[hidden, weight])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_contract_of_torchs_function_of_this_name(operands_of):
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
        assert refusal(linear_cross_entropy, operands, wrong) == refusal(F.linear_cross_entropy, operands, wrong)


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

"""linear_cross_entropy against F.cross_entropy(F.linear(...)): values, gradients, second gradients, errors."""

import pytest
import torch
import torch.nn.functional as F

from charrnn_fast import linear_cross_entropy
from charrnn_fast.kernels import native
from charrnn_fast.ops import backends


def _expected(input, weight, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(input, weight, linear_bias), target, **options)


def _operands(N, H, V, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((N, H), (V, H), (V,))]
    target = torch.randint(V, (N,), generator=generator)
    return [t.requires_grad_() for t in (tensors if bias else tensors[:2])], target


def _call(function, operands, target, **options):
    bias = operands[2] if len(operands) == 3 else None
    return function(operands[0], operands[1], target, linear_bias=bias, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 2), (7, 5, 3), (64, 32, 28), (33, 31, 100), (5, 16, 1500)])
def test_values_and_gradients(N, H, V, bias, reduction):
    operands, target = _operands(N, H, V, bias=bias)
    target[::3] = -100
    if (target == -100).all():
        target[0] = 1
    upstream = torch.randn(N if reduction == "none" else (), dtype=torch.float64)
    results = []
    for function in (linear_cross_entropy, _expected):
        loss = _call(function, operands, target, reduction=reduction)
        results.append([loss, *torch.autograd.grad(loss, operands, upstream)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_torchs(dtype):
    operands, target = _operands(200, 64, 28, dtype)
    exact = [t.detach().double().requires_grad_() for t in operands]
    truth = torch.autograd.grad(_call(_expected, exact, target), exact)
    ours = torch.autograd.grad(_call(linear_cross_entropy, operands, target), operands)
    theirs = torch.autograd.grad(_call(_expected, operands, target), operands)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        slack = torch.finfo(dtype).eps * t.abs().max()
        assert (a.double() - t).abs().max() <= 2 * (b.double() - t).abs().max() + slack


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_and_gradgradcheck(reduction):
    operands, target = _operands(5, 4, 3)
    target[1] = -100

    def function(*tensors):
        return _call(linear_cross_entropy, tensors, target, reduction=reduction)

    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


def test_only_the_gradients_that_are_wanted():
    operands, target = _operands(5, 4, 3)
    operands[1].requires_grad_(False)
    _call(linear_cross_entropy, operands, target).backward()
    assert operands[0].grad is not None and operands[1].grad is None and operands[2].grad is not None
    with torch.no_grad():
        assert not _call(linear_cross_entropy, operands, target).requires_grad


def test_two_backward_passes_add_up():
    operands, target = _operands(5, 4, 3)
    loss = _call(linear_cross_entropy, operands, target)
    loss.backward(retain_graph=True)
    once = operands[0].grad.clone()
    loss.backward()
    torch.testing.assert_close(operands[0].grad, 2 * once)


def test_strided_input_and_large_logits():
    operands, target = _operands(12, 8, 5)
    wide = torch.randn(12, 16, dtype=torch.float64)
    for input in (wide[:, ::2], wide[:, :8], wide.T[:12, :8], wide[:, :8] * 1e4):
        loss = linear_cross_entropy(input, operands[1], target[: len(input)])
        torch.testing.assert_close(loss, _expected(input, operands[1], target[: len(input)]))


def test_what_the_kernel_does_not_take_goes_to_torch():
    operands, target = _operands(6, 4, 3)
    probabilities = torch.rand(6, 3, dtype=torch.float64)
    torch.testing.assert_close(
        linear_cross_entropy(operands[0], operands[1], probabilities),
        _expected(operands[0], operands[1], probabilities),
    )
    one = linear_cross_entropy(operands[0][0], operands[1], target[0])
    torch.testing.assert_close(one, _expected(operands[0][0], operands[1], target[0]))
    derivative = torch.func.grad(lambda w: linear_cross_entropy(operands[0], w, target))(operands[1])
    torch.testing.assert_close(derivative, torch.autograd.grad(_call(_expected, operands[:2], target), operands[1])[0])


def test_all_rows_ignored_is_nan_as_in_torch():
    operands, _ = _operands(4, 3, 2)
    assert _call(linear_cross_entropy, operands, torch.full((4,), -100)).isnan()
    assert _call(linear_cross_entropy, operands, torch.full((4,), -100), reduction="sum") == 0


def test_bad_input_is_refused_in_torchs_words():
    operands, target = _operands(4, 3, 2)
    for bad, options in [
        (target + 5, {}),
        (target[:3], {}),
        (target, {"reduction": "median"}),
    ]:
        errors = []
        for function in (_expected, linear_cross_entropy):
            with pytest.raises((IndexError, ValueError, RuntimeError)) as caught:
                _call(function, operands, bad, **options)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]


def test_backend_torch_is_respected(monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", "torch")
    monkeypatch.setattr(native, "linear_cross_entropy", None)
    operands, target = _operands(4, 3, 2)
    assert _call(linear_cross_entropy, operands, target).isfinite()


@pytest.mark.parametrize("vocab", [30, 1500])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_are_all_ignored_give_no_gradient(vocab, reduction):
    input = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    loss = linear_cross_entropy(input, weight, torch.full((6,), -100), reduction=reduction)
    loss.sum().backward()
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert (input.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets the kernels, warns of NaN
@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
@pytest.mark.parametrize(("hidden", "vocab"), [(4, 30), (5, 130), (4, 1500), (300, 30)])
@pytest.mark.parametrize(
    ("ignored", "reduction"), [("some", "mean"), ("some", "none"), ("all", "mean"), ("all", "sum")]
)
@pytest.mark.parametrize(
    ("place", "value"),
    [(0, torch.nan), (0, torch.inf), (1, torch.inf), (1, -torch.inf), (2, torch.inf), (2, -torch.inf)],
)
def test_what_is_not_finite_spreads_as_in_torch(value, place, ignored, hidden, vocab, reduction, backend, monkeypatch):
    """0 * NaN: also from rows that do not count, and from no others; what is finite in torch is the same number."""
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("these operands are on a CPU; a GPU's products in three parts make NaN of what is infinite")
    monkeypatch.setenv("CHARRNN_BACKEND", backend)
    operands, target = _operands(7, hidden, vocab, torch.float32)
    target[:: 1 if ignored == "all" else 3] = -100
    operands[place].data.view(-1)[1] = value  # of a row that is ignored: 0, or of all rows
    results = []
    for function in (linear_cross_entropy, _expected):
        loss = _call(function, operands, target, reduction=reduction)
        results.append([loss, *torch.autograd.grad(loss.sum() * 3, operands)])
    for mine, right in zip(*results, strict=True):
        assert torch.equal(mine.isfinite(), right.isfinite())
        finite = right.isfinite()
        torch.testing.assert_close(mine[finite], right[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [30, 1500])
def test_small_fp16_gradients_survive_loss_scaling(vocab):
    torch.manual_seed(0)
    rows, scale = 4096, 2.0**12
    input, weight = (torch.randn(rows, 16) * 0.1).half(), (torch.randn(vocab, 16) * 0.1).half()
    target = torch.randint(vocab, (rows,))
    found = [t.clone().requires_grad_() for t in (input, weight)]
    exact = [t.double().requires_grad_() for t in (input, weight)]
    (linear_cross_entropy(*found, target).float() * scale).backward()
    (linear_cross_entropy(*exact, target) * scale).backward()
    for mine, right in zip(found, exact, strict=True):
        error = (mine.grad.double() - right.grad).norm() / right.grad.norm()
        assert error < 1e-3, float(error)


@pytest.mark.parametrize("classes", [5, 1100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_upstream_gradients_and_logits_that_are_not_finite(reduction, classes):
    """A row that does not count has zeros even then; a row with an infinite logit is NaN in every class."""
    operands, target = _operands(5, 4, classes)
    target[1] = -100
    upstream = torch.tensor([1.0, torch.nan, 1.0, 2.0, 1.0]) if reduction == "none" else torch.tensor(torch.nan)
    overflowing = [operands[0].detach().clone().requires_grad_(), *operands[1:]]
    with torch.no_grad():
        overflowing[0][2] = torch.inf
    for given, gradient in ((operands, upstream.double()), (overflowing, torch.ones_like(upstream).double())):
        found, expected = (
            torch.autograd.grad(_call(f, given, target, reduction=reduction), given, gradient)
            for f in (linear_cross_entropy, _expected)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-9, atol=1e-9)
        assert not found[0][1].any()


@pytest.mark.parametrize(
    "options", [{"reduction": "x"}, {"ignore_index": 2**64}, {"ignore_index": "x"}, {"ignore_index": 1.5}], ids=str
)
def test_options_are_refused_after_shapes_as_torch_does(options):
    operands, target = _operands(5, 4, 3)
    for given in (operands, [operands[0][:, :2], *operands[1:]], [None, *operands[1:]], [operands[0], [1.0], None]):
        errors = []
        for function in (linear_cross_entropy, _expected):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                _call(function, given, target, **options)
            errors.append(error.type)
        assert errors[0] is errors[1]


@pytest.mark.parametrize("V", [3, 200, 1000, 1100])
def test_large_logits_keep_their_differences(V):
    """An offset common to all classes changes nothing but the logits' own rounding, the same for both."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    bias = torch.full((V,), 1e6)
    target = torch.randint(V, (5,))
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, linear_bias=bias), (hidden, weight))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), (hidden, weight))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["triton", "native"])
def test_a_backend_that_cannot_run_says_so(name, monkeypatch, choices_anew):
    monkeypatch.setattr(backends, "triton_cannot_run_on", lambda device: "there is no such device here")
    monkeypatch.setattr(native.library, "missing", "the C extension is not built")
    operands, target = _operands(4, 3, 2)
    monkeypatch.setenv("CHARRNN_BACKEND", name)
    message = rf"backend '{name}' cannot run linear_cross_entropy in torch\.float64 on cpu: the"
    with pytest.raises(RuntimeError, match=message):
        _call(linear_cross_entropy, operands, target)
    monkeypatch.setenv("CHARRNN_BACKEND", "auto")
    assert _call(linear_cross_entropy, operands, target) == _call(_expected, operands, target)

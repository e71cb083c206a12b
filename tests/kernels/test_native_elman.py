"""The C recurrence against an fp64 oracle: every option, instruction set and thread count."""

import concurrent.futures
import multiprocessing
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from charrnn_fast.kernels import native
from charrnn_fast.reference.elman import ACTIVATIONS, walk

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"native: {native.available()}")

ISAS = native._native.isas() if native.available() is None else []
SIZES = (1, 7, 31, 33, 64, 100, 128, 200)
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.delenv("CHARRNN_ISA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    monkeypatch.undo()
    native.set_isa(None)


class Case:
    """Random tensors of one call, in float64, and the oracle's results for a loss that uses the outputs and h_n."""

    def __init__(self, H, B, T, *, tokens=False, packed=False, reverse=(False,), nonlinearity="tanh", h0=True, seed=0):
        gen = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        D, V = len(reverse), 11
        self.batch_sizes = None
        shape: tuple[int, ...] = (T, B)
        if packed:
            lengths = torch.randint(1, T + 1, (B,), generator=gen).sort(descending=True).values
            lengths[0] = T
            self.batch_sizes = torch.stack([(lengths > t).sum() for t in range(T)])
            shape = (int(self.batch_sizes.sum()),)
        self.options = {"nonlinearity": nonlinearity, "reverse": reverse, "batch_sizes": self.batch_sizes}
        self.tokens = torch.randint(0, V, shape, generator=gen) if tokens else None
        self.num_tokens = V if tokens else None
        self.x = rand(V, D * H) if tokens else rand(*shape, D * H)
        self.weights = [rand(H, H) * 0.7 / H**0.5 for _ in reverse]
        self.h0 = rand(D, B, H) * 0.5 if h0 else None
        self.grad_out, self.grad_h_n = rand(*shape, D * H), rand(D, B, H)
        self.T, self.B, self.H = T, B, H

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor | None]:
        return self.x.to(dtype), [w.to(dtype) for w in self.weights], None if self.h0 is None else self.h0.to(dtype)

    def oracle(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """One step after the other with torch's operations, gradients by autograd."""
        x, weights, h0 = self.inputs(dtype)
        h0 = torch.zeros(len(weights), self.B, self.H, dtype=dtype) if h0 is None else h0
        leaves = [t.requires_grad_() for t in (x, h0, *weights)]
        pre = x if self.tokens is None else x[self.tokens]
        f = ACTIVATIONS[self.options["nonlinearity"]]
        outs, lasts = [], []
        for d, weight in enumerate(weights):
            units = slice(d * self.H, (d + 1) * self.H)
            out, last = walk(
                pre[..., units],
                h0[d],
                lambda x, h, weight=weight: f(x + h @ weight.T),
                reverse=self.options["reverse"][d],
                batch_sizes=self.batch_sizes,
            )
            outs.append(out)
            lasts.append(last)
        out, h_n = torch.cat(outs, -1), torch.stack(lasts)
        grads = torch.autograd.grad([out, h_n], leaves, [self.grad_out.to(dtype), self.grad_h_n.to(dtype)])
        names = ["grad_x", "grad_h0", *(f"grad_weight_{d}" for d in range(len(weights)))]
        return {"out": out.detach(), "h_n": h_n.detach(), **dict(zip(names, grads, strict=True))}

    def native(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, weights, h0 = self.inputs(dtype)
        options = {"tokens": self.tokens, **self.options}
        out, h_n = native.elman_forward(x, weights, h0, **options)
        grad_x, grad_weights, grad_h0 = native.elman_backward(
            self.grad_out.to(dtype), self.grad_h_n.to(dtype), out, weights, h0, num_tokens=self.num_tokens, **options
        )
        named = {f"grad_weight_{d}": g for d, g in enumerate(grad_weights)}
        return {"out": out, "h_n": h_n, "grad_x": grad_x, "grad_h0": grad_h0, **named}


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def random_case(rng: random.Random) -> Case:
    return Case(
        rng.choice(SIZES),
        rng.choice((1, 2, 5, 13, 24, 70)),
        rng.choice((1, 2, 17)),
        tokens=rng.random() < 0.5,
        packed=rng.random() < 0.5,
        reverse=rng.choice(((False,), (True,), (False, True))),
        nonlinearity=rng.choice(("tanh", "tanh", "relu")),
        h0=rng.random() < 0.7,
        seed=rng.randrange(1 << 30),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(30))
def test_every_option_against_the_oracle_and_threads_bitwise_equal(isa, seed):
    case = random_case(random.Random(seed))
    expected = case.oracle()
    native.set_isa(isa)
    for dtype, bound in ((torch.float32, 2e-5), (torch.float64, 2e-14)):
        torch.set_num_threads(1)
        one = case.native(dtype)
        torch.set_num_threads(2)
        two = case.native(dtype)
        for name, value in one.items():
            assert torch.equal(value, two[name]), name
            assert error(value, expected[name]) < bound, name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("T", (1, 2, 17))
def test_error_at_most_twice_that_of_torch(isa, H, T):
    native.set_isa(isa)
    B, input_size = 9, 5
    torch.manual_seed(H * 100 + T)
    rnn = torch.nn.RNN(input_size, H, bidirectional=True)
    x, h0 = torch.randn(T, B, input_size), torch.randn(2, B, H)
    grad_out, grad_h_n = torch.randn(T, B, 2 * H), torch.randn(2, B, H)

    def run(module: torch.nn.RNN, x: Tensor, h0: Tensor) -> list[Tensor]:
        dtype = x.dtype
        x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
        out, h_n = module(x, h0)
        leaves = [x, h0, *module.parameters()]
        grads = torch.autograd.grad([out, h_n], leaves, [grad_out.to(dtype), grad_h_n.to(dtype)])
        return [out.detach(), h_n.detach(), *grads]

    def run_native() -> list[Tensor]:
        ih, hh, bias = [], [], []
        for suffix in ("l0", "l0_reverse"):
            ih.append(getattr(rnn, f"weight_ih_{suffix}").detach())
            hh.append(getattr(rnn, f"weight_hh_{suffix}").detach())
            bias.append((getattr(rnn, f"bias_ih_{suffix}") + getattr(rnn, f"bias_hh_{suffix}")).detach())
        reverse = (False, True)
        pre = torch.nn.functional.linear(x, torch.cat(ih), torch.cat(bias))
        out, h_n = native.elman_forward(pre, hh, h0, reverse=reverse)
        grad_x, grad_hh, grad_h0 = native.elman_backward(grad_out, grad_h_n, out, hh, h0, reverse=reverse)
        grads = [out, h_n, grad_x @ torch.cat(ih), grad_h0]
        for d in range(2):
            g = grad_x[..., d * H : (d + 1) * H].reshape(-1, H)
            grads += [g.T @ x.view(-1, input_size), grad_hh[d], g.sum(0), g.sum(0)]
        return grads

    doubled = torch.nn.RNN(input_size, H, bidirectional=True).double()
    doubled.load_state_dict(rnn.state_dict())
    expected = run(doubled, x.double(), h0.double())
    for ours, theirs, exact in zip(run_native(), run(rnn, x, h0), expected, strict=True):
        scale = exact.abs().max().clamp(min=1)
        rounding = 4 * torch.finfo(torch.float32).eps * scale  # where torch's own error is nothing by luck
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_of_two_ulp_class(isa, dtype):
    native.set_isa(isa)
    finite = torch.finfo(dtype)
    steps = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    values = torch.cat([steps, steps * 10, steps * 25, torch.logspace(-320, 300, 20_000, dtype=torch.float64)])
    values = torch.cat([values, torch.tensor([0.6249999, 0.625, 9.01, 9.02, 1e-45, finite.tiny, finite.max])]).to(dtype)
    values = values[values.isfinite()].view(-1, 1)

    def tanh(x: Tensor) -> Tensor:
        return native.elman_forward(x.view(1, -1, 1), [torch.zeros(1, 1, dtype=dtype)])[0].view(-1)

    got, values = tanh(values), values.view(-1)
    exact = np.tanh(values.numpy().astype(np.longdouble))
    one_ulp = np.spacing(np.abs(exact).astype(got.numpy().dtype)).astype(np.longdouble)
    assert float((np.abs(got.numpy().astype(np.longdouble) - exact) / one_ulp).max()) < 2.5
    assert torch.equal(tanh(-values), -got)
    assert got.abs().max() <= 1
    special = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    answer = tanh(special)
    assert torch.equal(answer[:3], torch.tensor([0.0, 1.0, -1.0], dtype=dtype))
    assert answer[3].isnan()


@pytest.mark.parametrize("H", (7, 32, 128))
def test_columns_and_rows_give_the_same_bits(H, monkeypatch):
    torch.set_num_threads(2)
    for options in ({}, {"packed": True, "reverse": (False, True)}, {"tokens": True, "reverse": (True,)}):
        case = Case(H, 17, 9, **options)
        results = []
        for plan in ((1, 0), (2, 0), (1, 1), (2, 1)):
            monkeypatch.setattr(native.elman, "_threads", lambda *sizes, plan=plan: plan)
            results.append(case.native(torch.float32))
        for other in results[1:]:
            assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_repeats_bitwise():
    torch.set_num_threads(2)
    case = Case(64, 70, 17, tokens=True, packed=True)
    first = case.native(torch.float32)
    for _ in range(5):
        again = case.native(torch.float32)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("H", (31, 64))
def test_out_may_be_the_input(H):
    case = Case(H, 13, 17, packed=True, reverse=(False, True))
    x, weights, h0 = case.inputs(torch.float32)
    expected, h_n = native.elman_forward(x, weights, h0, **case.options)
    out, h_n_again = native.elman_forward(x, weights, h0, **case.options, out=x)
    assert out.data_ptr() == x.data_ptr()
    assert torch.equal(out, expected) and torch.equal(h_n, h_n_again)


def test_out_of_another_shape_or_order_is_refused():
    x, weight = torch.randn(3, 2, 4), torch.randn(4, 4)
    for out in (torch.empty(3, 2, 5), torch.empty(4, 2, 3).transpose(0, 2)):
        with pytest.raises(ValueError, match="out: expected"):
            native.elman_forward(x, [weight], out=out)


def test_batch_first_and_other_strides_need_no_copy():
    case = Case(33, 6, 17)
    x, weights, h0 = case.inputs(torch.float32)
    grad, grad_h_n = case.grad_out.float(), case.grad_h_n.float()
    expected, h_n = native.elman_forward(x, weights, h0)
    grads = native.elman_backward(grad, grad_h_n, expected, weights, h0)

    def turned(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    wide = torch.zeros(17, 6, 50)
    wide[..., :33] = x
    weight = torch.zeros(33, 40)
    weight[:, :33] = weights[0]
    for view in (turned(x), wide[..., :33]):
        out, h_n_again = native.elman_forward(view, [weight[:, :33]], turned(h0))
        assert torch.equal(out, expected) and torch.equal(h_n, h_n_again)
    out, _ = native.elman_forward(turned(x), weights, h0)
    assert out.stride() == turned(x).stride()
    again = native.elman_backward(turned(grad), turned(grad_h_n), out, [weight[:, :33]], turned(h0))
    assert again[0].stride() == out.stride()
    assert torch.equal(grads[0], again[0]) and torch.equal(grads[1][0], again[1][0]) and torch.equal(grads[2], again[2])


def test_missing_gradients_count_as_zero():
    case = Case(33, 5, 4)
    x, weights, h0 = case.inputs(torch.float64)
    out, _ = native.elman_forward(x, weights, h0)
    zeros, zero_states = torch.zeros_like(out), torch.zeros_like(h0)
    grad, grad_h_n = case.grad_out, case.grad_h_n
    for given, full in (((None, grad_h_n), (zeros, grad_h_n)), ((grad, None), (grad, zero_states))):
        a = native.elman_backward(*given, out, weights, h0)
        b = native.elman_backward(*full, out, weights, h0)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1][0], b[1][0]) and torch.equal(a[2], b[2])
    assert native.elman_backward(grad, None, out, weights, h0, need_weight_grad=False)[1] is None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_types_are_computed_in_float32(dtype):
    case = Case(33, 5, 9, tokens=True)
    x, weights, h0 = (case.x.to(dtype), [w.to(dtype) for w in case.weights], case.h0.to(dtype))
    out, h_n = native.elman_forward(x, weights, h0, tokens=case.tokens)
    wide_out, wide_h_n = native.elman_forward(x.float(), [w.float() for w in weights], h0.float(), tokens=case.tokens)
    assert out.dtype == h_n.dtype == dtype
    assert torch.equal(out, wide_out.to(dtype)) and torch.equal(h_n, wide_h_n.to(dtype))
    grads = native.elman_backward(case.grad_out.to(dtype), None, out, weights, h0, tokens=case.tokens, num_tokens=11)
    assert grads[0].dtype == grads[1][0].dtype == grads[2].dtype == dtype


@pytest.mark.parametrize(("T", "B"), ((0, 3), (4, 0), (0, 0)))
def test_nothing_to_do(T, B):
    x, weight, h0 = torch.randn(T, B, 5), torch.randn(5, 5), torch.randn(1, B, 5)
    out, h_n = native.elman_forward(x, [weight], h0)
    assert out.shape == (T, B, 5) and torch.equal(h_n, h0)
    assert torch.equal(native.elman_forward(x, [weight])[1], torch.zeros(1, B, 5))
    grad_x, grad_weight, grad_h0 = native.elman_backward(torch.randn(T, B, 5), h0, out, [weight], h0)
    assert grad_x.shape == (T, B, 5) and not grad_weight[0].any() and torch.equal(grad_h0, h0)


def test_tokens_outside_the_table():
    for bad in (-1, 11):
        tokens = torch.zeros(3, 2, dtype=torch.int64)
        tokens[2, 1] = bad
        with pytest.raises(IndexError, match="out of range"):
            native.elman_forward(torch.randn(11, 4), [torch.randn(4, 4)], tokens=tokens)


def test_int32_and_transposed_tokens():
    case = Case(16, 6, 5, tokens=True)
    x, weights, h0 = case.inputs(torch.float32)
    expected = native.elman_forward(x, weights, h0, tokens=case.tokens)[0]
    turned = case.tokens.t().contiguous().t()
    assert torch.equal(native.elman_forward(x, weights, h0, tokens=turned)[0], expected)
    assert torch.equal(native.elman_forward(x, weights, h0, tokens=case.tokens.int())[0], expected)


def test_non_finite_values_stay_in_their_row():
    case = Case(33, 4, 6)
    x, weights, _ = case.inputs(torch.float32)
    expected, _ = native.elman_forward(x, weights, nonlinearity="relu")
    x[0, 1, 3], x[0, 2, 5] = float("nan"), float("inf")
    out, _ = native.elman_forward(x, weights, nonlinearity="relu")
    assert torch.equal(out[:, [0, 3]], expected[:, [0, 3]])
    assert out[:, 1].isnan().any(-1).all() and out[0, 1, 3].isnan() and out[0, 2, 5].isinf()


@pytest.mark.parametrize("isa", ISAS)
def test_environment_chooses_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("CHARRNN_ISA", isa)
    native.set_isa(None)
    assert native.isa() == isa
    Case(33, 5, 2).native(torch.float32)


def test_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("CHARRNN_ISA", "avx1024")
    monkeypatch.setattr(native.library, "_selected", None)
    with pytest.raises(RuntimeError, match="avx1024"):
        Case(33, 5, 2).native(torch.float32)


def _digest(queue, case: Case) -> None:
    queue.put({name: value.numpy() for name, value in case.native(torch.float64).items()})


def test_a_forked_child_computes_the_same():
    torch.set_num_threads(2)
    case = Case(64, 70, 17)
    expected = case.native(torch.float64)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_digest, args=(queue, case))
    child.start()
    got = queue.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0
    assert all(np.array_equal(got[name], value.numpy()) for name, value in expected.items())


def test_several_python_threads_at_once():
    torch.set_num_threads(2)
    cases = [Case(H, B, 17, seed=H) for H, B in ((64, 70), (128, 1), (33, 13), (200, 2))]
    expected = [case.native(torch.float32) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, wanted in zip(pool.map(lambda c: c.native(torch.float32), cases), expected, strict=True):
                assert all(torch.equal(value, wanted[name]) for name, value in got.items())

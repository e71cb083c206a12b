"""What the C recurrence has alone: threads, instruction sets, errors; test_elman.py has what all kernels have."""

import concurrent.futures
import multiprocessing
import random

import needs
import pytest
import torch
from comparisons import by_one_thread_and_by_two, error, same
from elman_problems import DIRECTIONS, NATIVE, ElmanProblem, oracle
from torch import Tensor

from charrnn_fast.kernels import native

pytestmark = needs.NATIVE

SIZES = (1, 7, 31, 33, 64, 100, 128, 200)


def test_out_of_another_shape_or_order_is_refused():
    x, weight = torch.randn(3, 2, 4), torch.randn(4, 4)
    for out in (torch.empty(3, 2, 5), torch.empty(4, 2, 3).transpose(0, 2)):
        with pytest.raises(ValueError, match="out: expected"):
            native.elman_forward(x, [weight], out=out)


def test_tokens_outside_the_table():
    for bad in (-1, 11):
        tokens = torch.zeros(3, 2, dtype=torch.int64)
        tokens[2, 1] = bad
        with pytest.raises(IndexError, match="out of range"):
            native.elman_forward(torch.randn(11, 4), [torch.randn(4, 4)], tokens=tokens)


def make(H: int, B: int, T: int, dtype: torch.dtype = torch.float32, **options) -> ElmanProblem:
    return NATIVE.problem(T, H, B=B, dtype=dtype, **options)


def drawn(rng: random.Random) -> ElmanProblem:
    return make(
        rng.choice(SIZES),
        rng.choice((1, 2, 5, 13, 24, 70)),
        rng.choice((1, 2, 17)),
        torch.float64,
        tokens=rng.random() < 0.5,
        packed=rng.random() < 0.5,
        reverse=rng.choice(DIRECTIONS),
        nonlinearity=rng.choice(("tanh", "tanh", "relu")),
        with_h0=rng.random() < 0.7,
        vocabulary=11,
        seed=rng.randrange(1 << 30),
    )


@pytest.mark.parametrize("seed", range(30))
def test_every_option_against_the_oracle_and_threads_bitwise_equal(isa, seed):
    problem = drawn(random.Random(seed))
    expected = oracle(problem)
    for dtype, bound in ((torch.float32, 2e-5), (torch.float64, 2e-14)):
        one, two = by_one_thread_and_by_two(lambda dtype=dtype: NATIVE.results(problem.to(dtype)))
        assert same(one, two)
        for value, right in zip(one, expected, strict=True):
            assert error(value, right) < bound


@pytest.mark.parametrize("H", (7, 32, 128))
def test_columns_and_rows_give_the_same_bits(H, monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(native.elman, "ONE_THREADS_WORK", 0)
    for options in ({}, {"packed": True, "reverse": (False, True)}, {"tokens": True, "reverse": (True,)}):
        problem, results = make(H, 17, 9, **options), []
        for plan in ((1, 0), (2, 0), (1, 1), (2, 1)):
            monkeypatch.setattr(native.elman, "_threads", lambda *sizes, plan=plan: plan)
            results.append(NATIVE.results(problem))
        assert all(same(results[0], other) for other in results[1:])


def test_batch_first_needs_no_copy():
    p, turned = (make(33, 6, 17, batch_first=turned) for turned in (False, True))
    out, _ = native.elman_forward(turned.x, turned.weight_hh, turned.h0)
    assert out.stride() == turned.x.stride()
    grads = native.elman_backward(turned.grad_out, turned.grad_h_n, out, turned.weight_hh, turned.h0)
    assert grads[0].stride() == out.stride()
    assert same(NATIVE.results(p), NATIVE.results(turned))


@pytest.mark.parametrize("isa", needs.ISAS)
def test_environment_chooses_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("CHARRNN_ISA", isa)
    native.set_isa(None)
    assert native.isa() == isa
    NATIVE.results(make(33, 5, 2))


def test_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("CHARRNN_ISA", "avx1024")
    monkeypatch.setattr(native.library, "_selected", None)
    with pytest.raises(RuntimeError, match="avx1024"):
        NATIVE.results(make(33, 5, 2))


def by_the_kernels_alone(p: ElmanProblem) -> list[Tensor]:
    """torch's own operations may not run on several threads in a forked child."""
    out, h_n = native.elman_forward(p.x, p.weight_hh, p.h0)
    grad_x, grad_weights, grad_h0 = native.elman_backward(p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0)
    return [out, h_n, grad_x, *grad_weights, grad_h0]


def _put(queue, problem: ElmanProblem) -> None:
    queue.put([value.numpy() for value in by_the_kernels_alone(problem)])


def test_a_forked_child_computes_the_same():
    torch.set_num_threads(2)
    problem = make(64, 70, 17, torch.float64)
    expected = by_the_kernels_alone(problem)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_put, args=(queue, problem), daemon=True)
    child.start()
    got = queue.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0
    assert same([torch.from_numpy(value) for value in got], expected)


def test_several_python_threads_at_once():
    torch.set_num_threads(2)
    problems = [make(H, B, 17, seed=H) for H, B in ((64, 70), (128, 1), (33, 13), (200, 2))]
    expected = [NATIVE.results(problem) for problem in problems]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(same, pool.map(NATIVE.results, problems), expected))

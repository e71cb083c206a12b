"""The recurrence of every backend that has kernels against an fp64 oracle written with plain torch operations.

Without a GPU the Triton kernels are interpreted (tests/conftest.py), with one they run on it; C runs by each
instruction set. What one alone has is in test_triton_elman.py, test_triton_elman_grid.py and test_native_elman.py.
"""

import needs
import pytest
import torch
from comparisons import same
from elman_problems import GRID, NATIVE, TRITON, V, biases, options_of

SIZES = (1, 7, 16, 31, 33, 64, 100)
STEPS = (1, 2, 17)
# Across the chip the interpreter takes too long for so many sizes: test_triton_elman_grid.py has a choice of them.
NOT_ACROSS = pytest.mark.parametrize("kernels", ["triton", *needs.ISAS], indirect=True)


kernels = needs.each_backend(triton=TRITON, grid=GRID, native=NATIVE)


@NOT_ACROSS
@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("H", SIZES)
def test_fp32_error_is_at_most_twice_that_of_torch(kernels, H, T):
    first = 5 * (SIZES.index(H) + len(SIZES) * STEPS.index(T))
    for case in range(first, first + (2 if H * T > 250 else 3 if H > 32 else 5)):
        kernels.check(kernels.problem(T, H, **options_of(case)))


@NOT_ACROSS
@pytest.mark.parametrize("H", SIZES)
def test_fp64(kernels, H):
    for case in range(6 * SIZES.index(H), 6 * SIZES.index(H) + 6):
        kernels.check(kernels.problem(3, H, dtype=torch.float64, **options_of(case)))


@NOT_ACROSS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [7, 33, 100, 200])
def test_16_bit_error_is_at_most_twice_that_of_torch(kernels, H, dtype):
    for case in range(H, H + 4):
        p = kernels.problem(3, H, dtype=dtype, **options_of(case) | {"nonlinearity": "tanh"})
        kernels.check(p)


@NOT_ACROSS
@pytest.mark.parametrize("packed", [False, True])
def test_more_rows_than_a_program_or_a_block_has(kernels, packed):
    """And not a multiple; packed, the last ones end early."""
    kernels.check(kernels.problem(4, 16, B=21, packed=packed, reverse=(False, True)))
    kernels.check(kernels.problem(4, 33, B=37, packed=packed, tokens=True, reverse=(False, True)))


@NOT_ACROSS
def test_vocabulary_larger_than_the_kernel_sums(kernels):
    for vocabulary in (90, 300):
        kernels.check(kernels.problem(3, 16, tokens=True, vocabulary=vocabulary))


def test_results_are_bitwise_repeatable(kernels):
    for case in (0, 5, 6, 11):
        p = kernels.problem(5, 16, B=20, **options_of(case))
        assert same(kernels.results(p), kernels.results(p))


def test_out_may_be_the_input_itself(kernels):
    for case, H in ((0, kernels.H), (2, kernels.H), (6, kernels.H), (8, 16)):
        p = kernels.problem(5, H, **options_of(case))
        options = p.options if kernels is NATIVE else p.options | biases(p)  # which are added before C is called
        out, h_n = kernels.forward(p.x, p.weight_hh, p.h0, **options)
        x = p.x.clone()
        in_place, h_n_in_place = kernels.forward(x, p.weight_hh, p.h0, **options, out=x)
        assert in_place.data_ptr() == x.data_ptr()
        assert same((in_place, h_n_in_place), (out, h_n))


def test_strided_arguments(kernels):
    """Columns of wider buffers, every second row, expanded h0: read in place, whatever the strides but the last."""
    H = kernels.H
    p, plain = kernels.problem(4, H, B=3), kernels.problem(4, H, B=3)

    def within(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, device=p.x.device)

    p.h0 = p.h0[:, :1].expand(1, 3, H)
    plain.h0 = p.h0.contiguous()
    p.x = within(4, 6, H + 13)[:, ::2, 5 : 5 + H].copy_(p.x)
    p.grad_out = within(4, 3, H + 2)[..., 1 : 1 + H].copy_(p.grad_out)
    p.grad_h_n = within(1, 3, H + 2)[..., :H].copy_(p.grad_h_n)
    p.weight_hh = [within(H, H + 5)[:, :H].copy_(w) for w in p.weight_hh]
    assert same(kernels.results(p), kernels.results(plain))


@pytest.mark.parametrize("packed", [False, True])
def test_absent_gradients_count_as_zero(kernels, packed):
    p = kernels.problem(4, kernels.H, packed=packed, reverse=(False, True))
    out, _ = kernels.forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
    zero_out, zero_h_n = torch.zeros_like(p.grad_out), torch.zeros_like(p.grad_h_n)
    for given, full in (
        ((p.grad_out, None), (p.grad_out, zero_h_n)),
        ((None, p.grad_h_n), (zero_out, p.grad_h_n)),
        ((None, None), (zero_out, zero_h_n)),
    ):
        found = kernels.backward(*given, out, p.weight_hh, p.h0, **p.options)
        wanted = kernels.backward(*full, out, p.weight_hh, p.h0, **p.options)
        assert same((found[0], *found[1], found[2]), (wanted[0], *wanted[1], wanted[2]))


@pytest.mark.parametrize("tokens", [False, True])
def test_weight_gradient_only_if_needed(kernels, tokens):
    p = kernels.problem(4, kernels.H, tokens=tokens)
    out, _ = kernels.forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
    options = p.options | ({"num_tokens": V} if tokens else {})
    arguments = (p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0)
    with_weight = kernels.backward(*arguments, **options)
    without = kernels.backward(*arguments, **options, need_weight_grad=False, need_bias_grad=False)
    assert without[1] is None
    assert without[3] is None
    torch.testing.assert_close(without[0], with_weight[0])
    assert torch.equal(without[2], with_weight[2])


def test_ids_of_another_type_and_order(kernels):
    p = kernels.problem(3, kernels.H, tokens=True)
    wanted, ids = kernels.results(p), p.options["tokens"]
    for other in (ids.int(), ids.t().contiguous().t()):
        p.options["tokens"] = other
        assert same(kernels.results(p), wanted)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0), (0, 0)])
def test_empty_input(kernels, T, B, tokens):
    p = kernels.problem(T, kernels.H, B=B, tokens=tokens)
    out, h_n = kernels.forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
    assert out.shape == (T, B, kernels.H)
    assert torch.equal(h_n, p.h0)
    assert not kernels.forward(p.x, p.weight_hh, **p.options)[1].any()
    options = p.options | ({"num_tokens": V} if tokens else {})
    grads = kernels.backward(p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0, **options)
    grad_x, grad_weight, grad_h0, grad_bias = grads
    assert not grad_bias.any()
    assert grad_x.shape == ((V, kernels.H) if tokens else (T, B, kernels.H))
    assert not grad_x.any()
    assert not grad_weight[0].any()
    assert torch.equal(grad_h0, p.grad_h_n)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_what_is_not_finite_stays_in_its_row(kernels, nonlinearity):
    p = kernels.problem(3, kernels.H, B=4, nonlinearity=nonlinearity)
    expected, _ = kernels.forward(p.x, p.weight_hh, p.h0, **p.options)
    p.x[0, 1, 3], p.x[0, 2, 5] = torch.nan, torch.inf
    out, _ = kernels.forward(p.x, p.weight_hh, p.h0, **p.options)
    assert torch.equal(out[:, [0, 3]], expected[:, [0, 3]])
    assert out[:, 1].isnan().any(-1).all() and out[0, 1, 3].isnan()
    assert out[0, 2, 5] == (1 if nonlinearity == "tanh" else torch.inf)

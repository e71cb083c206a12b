"""kernels/triton/elman.py against an fp64 oracle written with plain torch operations.

Without a GPU the kernels are interpreted (tests/conftest.py), with one they run on it.
"""

from dataclasses import replace

import pytest
import torch
from elman_problems import (
    DEVICE,
    Problem,
    V,
    biases,
    error,
    make_problem,
    options_of,
    oracle,
    results,
    torch_rnn,
)
from elman_problems import check as compare

from charrnn_fast.kernels.triton import elman, elman_tiles
from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward, elman_limits, projected_steps
from charrnn_fast.kernels.triton.elman_tiles import TILES

SIZES = (1, 7, 16, 31, 33, 64, 100)
STEPS = (1, 2, 17)
# As they are shipped, where the interpreter else has tiles of more rows and one piece: one row and two, several pieces
# of W, pieces in shared memory, three products.
SHIPPED = [("fp32", 32, 0), ("fp32", 64, 1), ("fp32", 128, 2), ("tf32", 64, 1), ("16bit", 256, 0), ("fp64", 16, 0)]


@pytest.fixture(autouse=True)
def tiles_of_this_test():
    elman.forget_tiles()
    yield
    elman.forget_tiles()


def kernels(p: Problem, precision="ieee") -> list[torch.Tensor]:
    found = results(p, elman_forward, elman_backward, precision=precision)
    assert p.options["tokens"] is not None or found[2].stride() == found[0].stride()  # of grad_x and out
    return found


def check(p: Problem) -> None:
    compare(p, kernels(p))


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("H", SIZES)
def test_fp32_error_is_at_most_twice_that_of_torch(H, T):
    first = 5 * (SIZES.index(H) + len(SIZES) * STEPS.index(T))
    for case in range(first, first + (2 if H * T > 250 else 3 if H > 32 else 5)):
        check(make_problem(T, H, **options_of(case)))


@pytest.mark.parametrize("H", SIZES)
def test_fp64(H):
    for case in range(6 * SIZES.index(H), 6 * SIZES.index(H) + 6):
        check(make_problem(3, H, dtype=torch.float64, **options_of(case)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [7, 33, 100, 200])
def test_16_bit_error_is_at_most_twice_that_of_torch(H, dtype):
    for case in range(H, H + 4):
        check(make_problem(3, H, dtype=dtype, **options_of(case) | {"nonlinearity": "tanh"}))


def test_16_bit_relu_error_is_at_most_twice_that_of_torch():
    """In the mean over many entries: where a pre-activation is near 0, a rounding decides if there is a gradient."""
    ours, theirs = [], []
    for seed in range(8):
        p = make_problem(3, 33, dtype=torch.bfloat16, nonlinearity="relu", seed=seed)
        exact = oracle(p.to(torch.float64))
        ours.append([(a - b).square().mean() for a, b in zip(kernels(p), exact, strict=True)])
        theirs.append([(a - b).square().mean() for a, b in zip(torch_rnn(p), exact, strict=True)])
    assert (torch.tensor(ours).mean(0) <= 4 * torch.tensor(theirs).mean(0)).all()


@pytest.mark.skipif(
    DEVICE.type == "cuda", reason="a GPU's tf32 is not exact, as the interpreter's is: test_gpu_elman.py"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1, 5, 16, 33])
def test_input_projected_in_the_kernel(features, dtype):
    """The same states as with the projection made before; in 16 bit closer to fp64's, since it is not rounded."""
    for case, H in enumerate((7, 33)):
        options = options_of(case * 6 + features) | {"tokens": False}
        if dtype == torch.bfloat16:
            options["nonlinearity"] = "tanh"  # relu's states grow, and their errors with them
        p = make_problem(7, H, dtype=dtype, B=19, **options)
        D = len(p.weight_hh)
        x = torch.randn(*p.x.shape[:-1], features, device=DEVICE, dtype=torch.float64).to(dtype)
        weight_ih = [torch.randn(H, features, device=DEVICE, dtype=torch.float64).to(dtype) for _ in range(D)]
        assert projected_steps(features, H, dtype, "ieee", DEVICE, 19 * D) >= 7
        found = elman_forward(x, p.weight_hh, p.h0, weight_ih=weight_ih, **biases(p), **p.options)
        projected = x.double() @ torch.cat(weight_ih).double().T + p.bias.double().sum(0)
        weights = [w.double() for w in p.weight_hh]
        exact = elman_forward(projected, weights, None if p.h0 is None else p.h0.double(), **p.options)
        for ours, right in zip(found, exact, strict=True):
            assert ours.dtype == dtype
            assert error(ours, right) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("kind", "width", "index"), SHIPPED, ids=str)
def test_shipped_tiles(monkeypatch, kind, width, index):
    tile = TILES[kind, width][index]
    dtype = {"16bit": torch.bfloat16, "fp64": torch.float64}.get(kind, torch.float32)
    monkeypatch.setattr(elman, "choose_tile", lambda *arguments: tile)
    check(make_problem(2, width - 3, dtype=dtype, B=2, packed=width < 64, seed=width))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_long_sequences_leave_their_weight_gradient_to_a_gemm(monkeypatch, packed, tokens):
    monkeypatch.setattr(elman_tiles, "MAX_SUM_STEPS", {16: 2})
    for batch_first in (False, True):
        for with_h0 in (False, True):
            reverse = (False, True)
            options = {"packed": packed, "tokens": tokens, "batch_first": batch_first, "with_h0": with_h0}
            check(make_problem(5, 7, reverse=reverse, **options))
    check(make_problem(1, 7, packed=packed, tokens=tokens, reverse=(False, True)))


@pytest.mark.parametrize("packed", [False, True])
def test_several_programs_along_the_batch(packed):
    """More rows than a program has, and not a multiple; packed, some programs' rows end early."""
    check(make_problem(4, 16, B=21, packed=packed, reverse=(False, True)))
    check(make_problem(4, 33, B=37, packed=packed, tokens=True, reverse=(False, True)))


def test_vocabulary_larger_than_the_kernel_sums():
    for vocabulary in (90, 300):
        check(make_problem(3, 16, tokens=True, vocabulary=vocabulary))


def test_results_are_bitwise_repeatable():
    for case in (0, 5, 6, 11):
        p = make_problem(5, 16, B=20, **options_of(case))
        for first, second in zip(kernels(p), kernels(p), strict=True):
            assert torch.equal(first, second)


def test_out_may_be_the_input_itself():
    for case in (0, 2, 6, 8):
        p = make_problem(5, 16, **options_of(case))
        out, h_n = elman_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
        x = p.x.clone()
        in_place, h_n_in_place = elman_forward(x, p.weight_hh, p.h0, **biases(p), **p.options, out=x)
        assert in_place.data_ptr() == x.data_ptr()
        assert torch.equal(in_place, out)
        assert torch.equal(h_n_in_place, h_n)


def test_strided_arguments():
    """Columns of wider buffers, every second row, expanded h0: read in place, whatever the strides but the last."""
    p = make_problem(4, 7, B=3)
    wide = torch.full((4, 6, 20), torch.nan, device=DEVICE)
    x = wide[:, ::2, 5:12].copy_(p.x)
    h0 = p.h0[:, :1].expand(1, 3, 7)
    plain = make_problem(4, 7, B=3)
    plain.h0 = h0.contiguous()
    p.x, p.h0 = x, h0
    p.grad_out = torch.full((4, 3, 9), torch.nan, device=DEVICE)[..., 1:8].copy_(p.grad_out)
    p.grad_h_n = torch.full((1, 3, 9), torch.nan, device=DEVICE)[..., :7].copy_(p.grad_h_n)
    for found, wanted in zip(kernels(p), kernels(plain), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_absent_gradients_count_as_zero(packed):
    p = make_problem(4, 7, packed=packed, reverse=(False, True))
    out, _ = elman_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
    zero_out, zero_h_n = torch.zeros_like(p.grad_out), torch.zeros_like(p.grad_h_n)
    for given, full in (
        ((p.grad_out, None), (p.grad_out, zero_h_n)),
        ((None, p.grad_h_n), (zero_out, p.grad_h_n)),
        ((None, None), (zero_out, zero_h_n)),
    ):
        found = elman_backward(*given, out, p.weight_hh, p.h0, **p.options)
        wanted = elman_backward(*full, out, p.weight_hh, p.h0, **p.options)
        assert torch.equal(found[0], wanted[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))
        assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("tokens", [False, True])
def test_weight_gradient_only_if_needed(tokens):
    p = make_problem(4, 7, tokens=tokens)
    out, _ = elman_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
    options = p.options | ({"num_tokens": V} if tokens else {})
    with_weight = elman_backward(p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0, **options)
    without = elman_backward(
        p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0, **options, need_weight_grad=False, need_bias_grad=False
    )
    assert without[1] is None
    assert without[3] is None
    torch.testing.assert_close(without[0], with_weight[0])
    assert torch.equal(without[2], with_weight[2])


@pytest.mark.parametrize("H", [7, 64])
def test_token_ids_outside_the_table_read_and_add_nothing(H):
    p = make_problem(3, H, tokens=True)
    ids = p.options["tokens"]
    ids[0, 0], ids[1, 1], ids[2, 2] = -1, V, 2**40
    wrong = (ids < 0) | (ids >= V)
    out, h_n, grad_table, *rest = kernels(p)
    dense = make_problem(3, H)
    dense.weight_hh, dense.h0, dense.grad_out, dense.grad_h_n = p.weight_hh, p.h0, p.grad_out, p.grad_h_n
    dense.bias = p.bias
    dense.x = p.x[ids.masked_fill(wrong, 0)].masked_fill(wrong[..., None], 0)
    out_dense, h_n_dense, grad_x, *rest_dense = kernels(dense)
    assert torch.equal(out, out_dense)
    assert torch.equal(h_n, h_n_dense)
    wanted = torch.zeros_like(grad_table).index_add_(0, ids[~wrong], grad_x[~wrong])
    torch.testing.assert_close(grad_table, wanted)
    torch.testing.assert_close(rest, rest_dense)


def test_table_may_be_a_transpose():
    """The input weight itself, (H, V), serves as the table."""
    p = make_problem(3, 7, tokens=True)
    wanted = kernels(p)
    p.x = p.x.t().contiguous().t()
    for found, right in zip(kernels(p), wanted, strict=True):
        assert torch.equal(found, right)


def test_int32_token_ids():
    p = make_problem(3, 7, tokens=True)
    wanted = kernels(p)
    p.options["tokens"] = p.options["tokens"].int()
    for found, right in zip(kernels(p), wanted, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0)])
def test_empty_input(T, B, tokens):
    p = make_problem(T, 7, B=B, tokens=tokens)
    out, h_n = elman_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
    assert out.shape == (T, B, 7)
    assert torch.equal(h_n, p.h0)
    options = p.options | ({"num_tokens": V} if tokens else {})
    grads = elman_backward(p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0, **options)
    grad_x, grad_weight, grad_h0, grad_bias = grads
    assert not grad_bias.any()
    assert grad_x.shape == ((V, 7) if tokens else (T, B, 7))
    assert not grad_x.any()
    assert not grad_weight[0].any()
    assert torch.equal(grad_h0, p.grad_h_n)


def test_nan_input_stays_in_its_row():
    p = make_problem(3, 7)
    p.x[0, 1] = torch.nan
    out, _ = elman_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options)
    assert out[:, 1].isnan().all()
    assert not out[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("form", ["fma", "mma", "mma3"])
def test_infinities_stay_in_their_units(monkeypatch, form):
    """What fills up the width, and the weights' zeros there, make no NaN of an overflow (0 times inf)."""
    if form != "fma":
        tile = next(tile for tiles in TILES.values() for tile in tiles if tile.form == "mma" and tile.in_shared == 0)
        monkeypatch.setattr(elman, "choose_tile", lambda *arguments: replace(tile, form=form))
    p = make_problem(3, 7, nonlinearity="relu")
    p.bias.zero_()
    p.h0 = torch.full_like(p.h0, 1e38)
    p.weight_hh = [torch.rand_like(p.weight_hh[0]) + 1.1]
    out, h_n = elman_forward(p.x, p.weight_hh, p.h0, **p.options)
    assert torch.equal(h_n, torch.full_like(h_n, torch.inf))
    p.grad_out.fill_(3e38)
    _, _, grad_h0, _ = elman_backward(p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0, **p.options)
    assert torch.equal(grad_h0, torch.full_like(grad_h0, torch.inf))


def test_a_device_of_less_shared_memory_takes_what_fits():
    many = 8.0
    assert elman_tiles.find_tile("fp32", 128, "sm_80", many, 163).form == "mma3"
    assert elman_tiles.find_tile("fp32", 128, "sm_80", many, 99).form == "fma"
    assert elman_tiles.find_tile("16bit", 256, "sm_80", many, 163).in_shared == 8
    assert elman_tiles.find_tile("16bit", 256, "sm_80", many, 99) is None


def test_every_number_of_rows_has_a_tile():
    for (kind, width), tiles in TILES.items():
        for target in {target for tile in tiles for target in tile.targets}:
            for shared_kb in (99, 227):
                found = [elman_tiles.find_tile(kind, width, target, rows, shared_kb) for rows in (0.01, 1, 3, 100)]
                assert len({tile is None for tile in found}) == 1


def test_limits():
    assert elman_limits(128, torch.float32) is None
    assert elman_limits(256, torch.bfloat16) is None
    assert elman_limits(512, torch.float32, "tf32") is None  # across the chip
    assert "hidden size 129 is too large" in elman_limits(129, torch.float64)
    assert "no kernel for torch.int64" in elman_limits(8, torch.int64)


def test_arguments_out_of_reach_are_refused():
    p = make_problem(2, 7)
    with pytest.raises(ValueError, match=r"x: expected a last stride of 1, got strides"):  # but a table may have any
        elman_forward(p.x.transpose(1, 2).contiguous().transpose(1, 2), p.weight_hh)
    with pytest.raises(ValueError, match=r"h0: expected a tensor on .*, got meta"):
        elman_forward(p.x, p.weight_hh, p.h0.to("meta"))
    large, rows = (torch.zeros(*shape, 300, dtype=torch.float64, device=DEVICE) for shape in ((300,), (1, 1)))
    with pytest.raises(RuntimeError, match="hidden size 300 is too large for one program"):
        elman_forward(rows, [large])
    with pytest.raises(RuntimeError, match="hidden size 300 is too large for one program"):
        elman_backward(None, None, rows, [large])

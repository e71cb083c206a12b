"""kernels/triton/elman_grid.py against the fp64 oracle, W_hh shared out among 1, 2, 3 and 7 programs.

Without a GPU the kernels are interpreted and make one step a launch, but for one program, which makes all; with a GPU
they make all steps in one launch too.
"""

import pytest
import torch
from elman_problems import DEVICE, V, biases, check, grid_backward, grid_forward, make_problem, options_of, results

from charrnn_fast.kernels.triton import elman, elman_grid
from charrnn_fast.kernels.triton.elman_grid import grid_limits
from charrnn_fast.kernels.triton.elman_grid_tiles import GridTile

MMA = GridTile("mma", 16, 8, 4, 1.0, "test")
MMA3 = GridTile("mma3", 16, 8, 2, 1.0, "test")
FMA = GridTile("fma", 16, 2, 4, 1.0, "test")
TILE_OF = {torch.float32: MMA3, torch.bfloat16: MMA, torch.float16: MMA, torch.float64: FMA}
SIZES = (16, 31, 40, 100)  # 1, 2, 3 and 7 programs, the last three with a ragged last one


def kernels(p, tile=None, **options):
    tile = tile or TILE_OF[p.x.dtype]
    return results(p, grid_forward, grid_backward, tile=tile, **options)


@pytest.mark.parametrize(("H", "first", "cases"), [(16, 0, 8), (31, 6, 8), (40, 14, 4), (100, 18, 2)])
def test_fp32_error_is_at_most_twice_that_of_torch(H, first, cases):
    for case in range(first, first + cases):
        p = make_problem(1 + case % 4 if H < 100 else 2, H, **options_of(case))
        check(p, kernels(p))


@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(H, dtype):
    for case in (2, 13) if H == 31 else (2,):  # packed in both directions; tokens
        p = make_problem(3 if H < 100 else 2, H, dtype=dtype, **options_of(case) | {"nonlinearity": "tanh"})
        check(p, kernels(p))


def test_fp32_by_fma():
    p = make_problem(3, 40, **options_of(2))
    check(p, kernels(p, FMA))


def test_more_rows_than_a_team_has():
    """Several teams, the last one ragged; packed, some teams end early, and their rows join late backwards."""
    for packed, B in ((False, 21), (True, 19)):
        for with_h0 in (False, True):
            p = make_problem(3, 31, B=B, packed=packed, with_h0=with_h0, reverse=(False, True), seed=B)
            check(p, kernels(p))
    p = make_problem(2, 16, B=33, dtype=torch.float32)
    check(p, kernels(p, GridTile("mma3", 16, 16, 2, 1.0, "test")))
    check(p, kernels(p, GridTile("mma3", 32, 32, 2, 1.0, "test")))


def test_all_steps_in_one_launch_by_one_program():
    """The body with its counter and all: there is nobody to wait for, and it does not wait."""
    for case in range(4):
        p = make_problem(9, 16, B=11, **options_of(case))
        in_one = kernels(p)
        check(p, in_one)
        bias = 3 + len(p.weight_hh)  # whose sum over steps is made a launch at a time
        for steps in (1, 2, 4):
            for index, (found, wanted) in enumerate(zip(kernels(p, steps_per_launch=steps), in_one, strict=True)):
                torch.testing.assert_close(found, wanted) if index == bias else torch.testing.assert_close(
                    found, wanted, rtol=0, atol=0
                )


def test_absent_gradients_count_as_zero():
    p = make_problem(3, 31, packed=True, reverse=(False, True))
    out, _ = grid_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options, tile=MMA3)
    zero_out, zero_h_n = torch.zeros_like(p.grad_out), torch.zeros_like(p.grad_h_n)
    for given, full in (
        ((p.grad_out, None), (p.grad_out, zero_h_n)),
        ((None, p.grad_h_n), (zero_out, p.grad_h_n)),
        ((None, None), (zero_out, zero_h_n)),
    ):
        found = grid_backward(*given, out, p.weight_hh, p.h0, **p.options, tile=MMA3)
        wanted = grid_backward(*full, out, p.weight_hh, p.h0, **p.options, tile=MMA3)
        assert torch.equal(found[0], wanted[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))
        assert torch.equal(found[2], wanted[2])


def test_gradients_only_if_needed():
    p = make_problem(3, 31)
    out, _ = grid_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options, tile=MMA3)
    given = p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0
    options = p.options | {"tile": MMA3}
    found = grid_backward(*given, **options, need_weight_grad=False, need_bias_grad=False)
    wanted = grid_backward(*given, **options)
    assert found[1] is None
    assert found[3] is None
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])


def test_out_may_be_the_input_itself():
    for case in (0, 2, 6):
        p = make_problem(4, 31, **options_of(case))
        out, h_n = grid_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options, tile=MMA3)
        x = p.x.clone()
        in_place, h_n_in_place = grid_forward(x, p.weight_hh, p.h0, **biases(p), **p.options, out=x, tile=MMA3)
        assert in_place.data_ptr() == x.data_ptr()
        assert torch.equal(in_place, out)
        assert torch.equal(h_n_in_place, h_n)


def test_strided_arguments():
    """Columns of wider buffers, every second row, expanded h0: read in place, whatever the strides but the last."""
    p, plain = make_problem(4, 31), make_problem(4, 31)
    wide = torch.full((4, 6, 50), torch.nan, device=DEVICE)
    p.h0 = p.h0[:, :1].expand(1, 3, 31)
    plain.h0 = p.h0.contiguous()
    p.x = wide[:, ::2, 5:36].copy_(p.x)
    p.grad_out = torch.full((4, 3, 40), torch.nan, device=DEVICE)[..., 1:32].copy_(p.grad_out)
    p.grad_h_n = torch.full((1, 3, 40), torch.nan, device=DEVICE)[..., :31].copy_(p.grad_h_n)
    for found, wanted in zip(kernels(p), kernels(plain), strict=True):
        assert torch.equal(found, wanted)


def test_token_ids_outside_the_table_read_and_add_nothing():
    p = make_problem(3, 31, tokens=True)
    ids = p.options["tokens"]
    ids[0, 0], ids[1, 1], ids[2, 2] = -1, V, 2**40
    wrong = (ids < 0) | (ids >= V)
    out, h_n, grad_table, *rest = kernels(p)
    dense = make_problem(3, 31)
    dense.weight_hh, dense.h0, dense.grad_out, dense.grad_h_n = p.weight_hh, p.h0, p.grad_out, p.grad_h_n
    dense.bias = p.bias
    dense.x = p.x[ids.masked_fill(wrong, 0)].masked_fill(wrong[..., None], 0)
    out_dense, h_n_dense, grad_x, *rest_dense = kernels(dense)
    assert torch.equal(out, out_dense)
    assert torch.equal(h_n, h_n_dense)
    wanted = torch.zeros_like(grad_table).index_add_(0, ids[~wrong], grad_x[~wrong])
    torch.testing.assert_close(grad_table, wanted)
    torch.testing.assert_close(rest, rest_dense)


def test_table_may_be_a_transpose_and_ids_int32():
    p = make_problem(3, 31, tokens=True)
    wanted = kernels(p)
    p.x = p.x.t().contiguous().t()
    p.options["tokens"] = p.options["tokens"].int()
    for found, right in zip(kernels(p), wanted, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0)])
def test_empty_input(T, B, tokens):
    p = make_problem(T, 31, B=B, tokens=tokens)
    out, h_n, grad_x, grad_weight, grad_bias, grad_h0 = kernels(p)
    assert out.shape == (T, B, 31)
    assert torch.equal(h_n, p.h0)
    assert torch.equal(grad_h0, p.grad_h_n)
    assert grad_x.shape == ((V, 31) if tokens else (T, B, 31))
    assert not any(grad.any() for grad in (grad_x, grad_weight, grad_bias))


def test_nan_input_stays_in_its_row():
    p = make_problem(3, 31)
    p.x[0, 1] = torch.nan
    out = kernels(p)[0]
    assert out[:, 1].isnan().all()
    assert not out[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("tile", [MMA, MMA3, FMA], ids=lambda tile: tile.form)
def test_infinities_stay_in_their_units(tile):
    """What fills up the last program, and the weights' zeros there, make no NaN of an overflow (0 times inf)."""
    p = make_problem(3, 31, nonlinearity="relu")
    p.bias.zero_()
    p.h0 = torch.full_like(p.h0, 1e38)
    p.weight_hh = [torch.rand_like(p.weight_hh[0]) + 1.1]
    p.grad_out.fill_(3e38)
    _, h_n, *_, grad_h0 = kernels(p, tile)
    assert torch.equal(h_n, torch.full_like(h_n, torch.inf))
    assert torch.equal(grad_h0, torch.full_like(grad_h0, torch.inf))


def test_gradcheck_through_the_launchers():
    """The derivatives of all outputs along all inputs, by differences."""

    class Recurrence(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, h0):
            out, h_n = grid_forward(x, [weight], h0, bias_ih=[bias], tile=FMA)
            ctx.save_for_backward(out, weight, h0)
            return out, h_n

        @staticmethod
        def backward(ctx, grad_out, grad_h_n):
            out, weight, h0 = ctx.saved_tensors
            grads = grid_backward(grad_out.contiguous(), grad_h_n.contiguous(), out, [weight], h0, tile=FMA)
            return grads[0], grads[1][0], grads[3], grads[2]

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)

    H = 17  # two programs
    inputs = random(2, 1, H), random(H, H), random(H), random(1, 1, H)
    assert torch.autograd.gradcheck(Recurrence.apply, inputs, fast_mode=True)


def test_where_there_is_no_grid():
    assert grid_limits(512, torch.float32, "tf32") is None
    assert grid_limits(512, torch.bfloat16) is None
    assert "not known to be faster than cuDNN" in grid_limits(192, torch.float32, "tf32")
    for size, dtype in ((256, torch.float32), (4096, torch.bfloat16), (512, torch.float64)):
        assert "and a grid of them is not known to be faster than cuDNN" in grid_limits(size, dtype)
    weight, rows = [torch.zeros(4096, 4096, device=DEVICE)], torch.zeros(1, 1, 4096, device=DEVICE)
    message = r"hidden size 4096 is too large for one program \(torch.float32\), and a grid"
    with pytest.raises(RuntimeError, match=message):
        grid_forward(rows, weight)
    with pytest.raises(RuntimeError, match=message):
        grid_backward(None, None, rows, weight)


def test_arguments_out_of_reach_are_refused():
    p = make_problem(2, 31)
    with pytest.raises(ValueError, match=r"x: expected a last stride of 1, got strides"):
        grid_forward(p.x.transpose(1, 2).contiguous().transpose(1, 2), p.weight_hh, tile=MMA3)
    with pytest.raises(ValueError, match=r"h0: expected a tensor on .*, got meta"):
        grid_forward(p.x, p.weight_hh, p.h0.to("meta"), tile=MMA3)


def test_rows_up_to_which_a_grid_is_taken():
    """As many as there is room for at a time, several times over where cuDNN is that much slower."""
    most = {
        (256, torch.float32, "tf32"): 64,
        (512, torch.float32, "tf32"): 128,
        (1024, torch.bfloat16, "ieee"): 64,
        (2048, torch.float32, "tf32"): 40,
        (2048, torch.bfloat16, "ieee"): 16,
        (4096, torch.bfloat16, "ieee"): 0,
    }
    cpu = torch.device("cpu")
    for (hidden, dtype, precision), rows in most.items():
        assert elman_grid.grid_most_rows(hidden, dtype, precision, cpu) == rows
        assert (grid_limits(hidden, dtype, precision, cpu, rows) is None) == (rows > 0)
        assert grid_limits(hidden, dtype, precision, cpu, rows + 1) is not None
        if rows:
            assert elman.most_rows(hidden, dtype, precision, cpu) == rows
            assert f"; beyond {rows} rows cuDNN is taken" in elman_grid.grid_reason(hidden, dtype, precision, cpu)
            assert "for so many rows" in elman_grid.grid_reason(hidden, dtype, precision, cpu, rows + 1)
    assert elman.most_rows(128, torch.float32, "ieee", cpu) == float("inf")


def test_the_reason_says_what_is_resident():
    reason = elman.elman_reason(1024, torch.float32, "tf32", "cpu", 64)
    assert reason.startswith("a grid by tensor cores: 64 programs of 8 warps a team")
    assert "each with 16 rows of W_hh (65536 bytes) in registers" in reason
    assert "4 teams of 16 batch rows" in reason


def test_the_launchers_of_one_program_hand_over():
    """elman.py's launchers, for a hidden size that no program holds."""
    p = make_problem(1, 260, B=2, dtype=torch.bfloat16)
    assert elman.choose_tile(260, torch.bfloat16, "ieee", DEVICE, 2) is None
    assert elman.elman_limits(260, torch.bfloat16, "ieee", DEVICE) is None
    found = results(p, elman.elman_forward, elman.elman_backward)
    tile = elman_grid.choose_grid_tile(260, torch.bfloat16, "ieee", DEVICE, 2)
    for ours, right in zip(found, kernels(p, tile), strict=True):
        assert torch.equal(ours, right)
    check(p, found)

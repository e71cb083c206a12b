"""kernels/triton/elman_grid.py against the fp64 oracle, W_hh shared out among 1, 2, 3 and 7 programs.

Without a GPU the kernels are interpreted and make one step a launch, but for one program, which makes all; with a GPU
they make all steps in one launch too.
"""

import pytest
import torch
from comparisons import same
from elman_problems import FMA, GRID, TRITON, check, grid_backward, grid_forward, make_problem, options_of
from needs import DEVICE

from charrnn_fast.kernels.triton import elman, elman_grid
from charrnn_fast.kernels.triton.elman_grid import grid_limits
from charrnn_fast.kernels.triton.elman_grid_tiles import GridTile

SIZES = (16, 31, 40, 100)  # 1, 2, 3 and 7 programs, the last three with a ragged last one


@pytest.mark.parametrize(("H", "first", "cases"), [(16, 0, 8), (31, 6, 8), (40, 14, 4), (100, 18, 2)])
def test_fp32_error_is_at_most_twice_that_of_torch(H, first, cases):
    for case in range(first, first + cases):
        GRID.check(GRID.problem(1 + case % 4 if H < 100 else 2, H, **options_of(case)))


@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(H, dtype):
    for case in (2, 13) if H == 31 else (2,):  # packed in both directions; tokens
        GRID.check(GRID.problem(3 if H < 100 else 2, H, dtype=dtype, **options_of(case) | {"nonlinearity": "tanh"}))


def test_fp32_by_fma():
    GRID.check(GRID.problem(3, 40, **options_of(2)), tile=FMA)


def test_more_rows_than_a_team_has():
    """Several teams, the last one ragged; packed, some teams end early, and their rows join late backwards."""
    for packed, B in ((False, 21), (True, 19)):
        for with_h0 in (False, True):
            GRID.check(GRID.problem(3, 31, B=B, packed=packed, with_h0=with_h0, reverse=(False, True), seed=B))
    p = GRID.problem(2, 16, B=33)
    GRID.check(p, tile=GridTile("mma3", 16, 16, 2, 1.0, "test"))
    GRID.check(p, tile=GridTile("mma3", 32, 32, 2, 1.0, "test"))


def test_all_steps_in_one_launch_by_one_program():
    """The body with its counter and all: there is nobody to wait for, and it does not wait."""
    for case in range(4):
        p = GRID.problem(9, 16, B=11, **options_of(case))
        in_one = GRID.results(p)
        check(p, in_one)
        bias = 3 + len(p.weight_hh)  # whose sum over steps is made a launch at a time
        for steps in (1, 2, 4):
            for index, (found, wanted) in enumerate(zip(GRID.results(p, steps_per_launch=steps), in_one, strict=True)):
                torch.testing.assert_close(found, wanted) if index == bias else torch.testing.assert_close(
                    found, wanted, rtol=0, atol=0
                )


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
    found = TRITON.results(p)
    tile = elman_grid.choose_grid_tile(260, torch.bfloat16, "ieee", DEVICE, 2)
    assert same(found, GRID.results(p, tile=tile))
    check(p, found)

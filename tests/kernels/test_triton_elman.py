"""What the Triton recurrence has alone: tiles, projection in the kernel, limits; test_elman.py has what all kernels
have.
"""

from dataclasses import replace

import pytest
import torch
from comparisons import error, same
from elman_problems import FMA, GRID, MMA, MMA3, TRITON, V, biases, make_problem, options_of, oracle, torch_rnn
from needs import DEVICE

from charrnn_fast.kernels.triton import elman, elman_tiles
from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward, elman_limits, projected_steps
from charrnn_fast.kernels.triton.elman_tiles import TILES

# As they are shipped, where the interpreter else has tiles of more rows and one piece: one row and two, several pieces
# of W, pieces in shared memory, three products.
SHIPPED = [("fp32", 32, 0), ("fp32", 64, 1), ("fp32", 128, 2), ("tf32", 64, 1), ("16bit", 256, 0), ("fp64", 16, 0)]


@pytest.fixture(autouse=True)
def tiles_of_this_test():
    elman.forget_tiles()
    yield
    elman.forget_tiles()


def test_16_bit_relu_error_is_at_most_twice_that_of_torch():
    """In the mean over many entries: where a pre-activation is near 0, a rounding decides if there is a gradient."""
    ours, theirs = [], []
    for seed in range(8):
        p = make_problem(3, 33, dtype=torch.bfloat16, nonlinearity="relu", seed=seed)
        exact = oracle(p.to(torch.float64))
        ours.append([(a - b).square().mean() for a, b in zip(TRITON.results(p), exact, strict=True)])
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
    TRITON.check(make_problem(2, width - 3, dtype=dtype, B=2, packed=width < 64, seed=width))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_long_sequences_leave_their_weight_gradient_to_a_gemm(monkeypatch, packed, tokens):
    monkeypatch.setattr(elman_tiles, "MAX_SUM_STEPS", {16: 2})
    for batch_first in (False, True):
        for with_h0 in (False, True):
            reverse = (False, True)
            options = {"packed": packed, "tokens": tokens, "batch_first": batch_first, "with_h0": with_h0}
            TRITON.check(make_problem(5, 7, reverse=reverse, **options))
    TRITON.check(make_problem(1, 7, packed=packed, tokens=tokens, reverse=(False, True)))


def both(*more):
    """Cases for one program, of H=7 and more, and for a grid of two."""
    cases = [(TRITON, 7), *((TRITON, H) for H in more), (GRID, GRID.H)]
    return pytest.mark.parametrize(("launchers", "H"), cases, ids=[f"{kind.name} {H}" for kind, H in cases])


@both(64)
def test_token_ids_outside_the_table_read_and_add_nothing(launchers, H):
    p = launchers.problem(3, H, tokens=True)
    ids = p.options["tokens"]
    ids[0, 0], ids[1, 1], ids[2, 2] = -1, V, 2**40
    wrong = (ids < 0) | (ids >= V)
    out, h_n, grad_table, *rest = launchers.results(p)
    dense = replace(p, x=p.x[ids.masked_fill(wrong, 0)].masked_fill(wrong[..., None], 0))
    dense.options = p.options | {"tokens": None}
    out_dense, h_n_dense, grad_x, *rest_dense = launchers.results(dense)
    assert torch.equal(out, out_dense)
    assert torch.equal(h_n, h_n_dense)
    wanted = torch.zeros_like(grad_table).index_add_(0, ids[~wrong], grad_x[~wrong])
    torch.testing.assert_close(grad_table, wanted)
    torch.testing.assert_close(rest, rest_dense)


@both()
def test_table_may_be_a_transpose(launchers, H):
    """The input weight itself, (H, V), serves as the table."""
    p = launchers.problem(3, H, tokens=True)
    wanted = launchers.results(p)
    p.x = p.x.t().contiguous().t()
    assert same(launchers.results(p), wanted)


@pytest.mark.parametrize("tile", [MMA, MMA3, FMA], ids=lambda tile: tile.form)
@pytest.mark.parametrize("launchers", [TRITON, GRID], ids=lambda launchers: launchers.name)
def test_infinities_stay_in_their_units(monkeypatch, launchers, tile):
    """What fills up the width, and the weights' zeros there, make no NaN of an overflow (0 times inf)."""
    p = launchers.problem(3, launchers.H, nonlinearity="relu")
    if launchers is GRID:
        p.options["tile"] = tile
    elif tile is not FMA:  # which is chosen
        chosen = next(tile for tiles in TILES.values() for tile in tiles if tile.form == "mma" and tile.in_shared == 0)
        monkeypatch.setattr(elman, "choose_tile", lambda *arguments: replace(chosen, form=tile.form))
    p.bias.zero_()
    p.h0 = torch.full_like(p.h0, 1e38)
    p.weight_hh = [torch.rand_like(p.weight_hh[0]) + 1.1]
    p.grad_out.fill_(3e38)
    _, h_n, *_, grad_h0 = launchers.results(p)
    assert torch.equal(h_n, torch.full_like(h_n, torch.inf))
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


@pytest.mark.parametrize("launchers", [TRITON, GRID], ids=lambda launchers: launchers.name)
def test_arguments_out_of_reach_are_refused(launchers):
    p = launchers.problem(2, launchers.H)
    with pytest.raises(ValueError, match=r"x: expected a last stride of 1, got strides"):  # but a table may have any
        launchers.forward(p.x.transpose(1, 2).contiguous().transpose(1, 2), p.weight_hh, **p.options)
    with pytest.raises(ValueError, match=r"h0: expected a tensor on .*, got meta"):
        launchers.forward(p.x, p.weight_hh, p.h0.to("meta"), **p.options)


def test_sizes_beyond_one_program_are_refused():
    large, rows = (torch.zeros(*shape, 300, dtype=torch.float64, device=DEVICE) for shape in ((300,), (1, 1)))
    with pytest.raises(RuntimeError, match="hidden size 300 is too large for one program"):
        elman_forward(rows, [large])
    with pytest.raises(RuntimeError, match="hidden size 300 is too large for one program"):
        elman_backward(None, None, rows, [large])

"""The recurrence across the chip on a device: all steps in one launch, long, many times, and beside other kernels."""

import pytest
import torch
from comparisons import same
from elman_problems import GRID, biases, grid_forward, make_problem, oracle
from on_gpu import KINDS

from charrnn_fast.kernels.triton import elman_grid
from charrnn_fast.kernels.triton.elman_grid import choose_grid_tile
from charrnn_fast.kernels.triton.elman_grid_tiles import GRID_TILES, grid_width
from charrnn_fast.kernels.triton.launch import processors_of, target_of

pytestmark = pytest.mark.gpu

TABLE = {"ieee": "fp32", "bf16": "16bit", "fp16": "16bit"}


@pytest.fixture(autouse=True)
def say_who_waits_in_vain(monkeypatch):
    monkeypatch.setenv("CHARRNN_GRID_DEBUG", "1")


def tiles_of(kind: str, hidden_size: int) -> list:
    """Those of which a team fits this device."""
    kind = TABLE.get(kind, kind)
    width = grid_width(kind, hidden_size)
    device = torch.device("cuda")
    if width is None or target_of(device)[0] not in ("sm_80", "sm_90", "sm_100"):
        return []
    return [tile for tile in GRID_TILES[kind, width] if tile.programs(hidden_size) <= processors_of(device)]


@pytest.mark.parametrize("kind", ["ieee", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("H", [17, 192, 250, 256, 384, 512, 1000])
def test_every_tile_in_one_launch(kind, H):
    dtype, _ = KINDS[kind]
    for index, tile in enumerate(tiles_of(kind, H)):
        for case in (2 + index, 5 + index, 13 + index):
            options = {"reverse": (False, True), "nonlinearity": "tanh", "seed": case}
            options |= {"tokens": case % 2 == 1, "packed": case // 2 % 2 == 1, "with_h0": case % 3 != 0}
            p = make_problem(9, H, dtype=dtype, B=11, **options)
            GRID.check(p, tile=tile)


@pytest.mark.parametrize("kind", ["tf32", "ieee", "bf16"])
@pytest.mark.parametrize(("T", "B", "H"), [(4096, 8, 256), (4096, 3, 1024), (1000, 16, 2048), (300, 100, 512)])
def test_long_sequences(kind, T, B, H):
    """Against the same kernels a step a launch, where nobody waits: bit for bit, bias gradient apart."""
    dtype, precision = KINDS[kind]
    tile = choose_grid_tile(H, dtype, precision, torch.device("cuda"), B) or next(iter(tiles_of(kind, H)), None)
    if tile is None:
        pytest.skip("the device is too small for a team")
    p = make_problem(T, H, dtype=dtype, B=B)
    found = GRID.results(p, tile=tile)
    single = GRID.results(p, tile=tile, steps_per_launch=1)
    for index, (ours, right) in enumerate(zip(found, single, strict=True)):
        if index == 4:
            torch.testing.assert_close(ours, right, rtol=2e-2, atol=2e-2 * float(right.abs().max()))
        else:
            assert torch.equal(ours, right), index


def test_tf32_against_fp64():
    for H in (256, 512, 1024):
        p = make_problem(50, H, B=16)
        tile = tiles_of("tf32", H)[0]
        found = GRID.results(p, tile=tile)
        for ours, right in zip(found, oracle(p.to(torch.float64)), strict=True):
            assert (ours.double() - right).abs().max() <= 2e-2 * right.abs().max()


@pytest.mark.parametrize(("kind", "H", "B"), [("tf32", 512, 16), ("bf16", 1024, 64), ("tf32", 1024, 8)])
def test_a_thousand_runs_are_bitwise_equal(kind, H, B):
    dtype, precision = KINDS[kind]
    p = make_problem(20, H, dtype=dtype, B=B)
    options = {"precision": precision, "tile": tiles_of(kind, H)[0]}
    first = GRID.results(p, **options)
    for _ in range(1000):
        assert same(first, GRID.results(p, **options))


def test_beside_kernels_on_other_streams_and_in_a_graph():
    p = make_problem(64, 512, B=8)
    tile = tiles_of("tf32", 512)[0]

    def run():
        return grid_forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options, tile=tile)[0]

    wanted, busy = run(), torch.randn(4096, 4096, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                found.append(run())
        with torch.cuda.stream(streams[2]):
            busy @ busy
    torch.cuda.synchronize()
    assert all(torch.equal(each, wanted) for each in found)
    graph = torch.cuda.CUDAGraph()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CHARRNN_GRID_DEBUG")  # which waits for the device
        with torch.cuda.graph(graph):
            captured = run()
    for _ in range(10):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, wanted)


def test_the_driver_counts_no_fewer_programs_than_are_computed():
    p = make_problem(4, 1024, B=8)
    asked = []
    ask = elman_grid._asked_of_driver

    def note(*arguments):
        asked.append(ask(*arguments))
        return asked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elman_grid, "_asked_of_driver", note)
        elman_grid._resident_of.clear()
        GRID.results(p, tile=tiles_of("tf32", 1024)[0])
    assert len(asked) == 2
    assert all(count is not None and count >= 1 for count in asked)


@pytest.mark.parametrize(("T", "B", "H"), [(65_536, 1, 256), (2, 70_000, 256), (700, 101, 256)])
def test_sizes_at_which_other_libraries_give_up(T, B, H):
    """cuDNN refuses 65,536 steps, MIOpen is wrong beyond B = 100 or B * T = 65,536."""
    p = make_problem(T, H, B=B, with_h0=False, dtype=torch.bfloat16)
    out, h_n = grid_forward(p.x, p.weight_hh, tile=tiles_of("bf16", H)[0])
    assert torch.equal(out[-1], h_n[0])
    h = out[-2].double() if T > 1 else torch.zeros(B, H, device="cuda", dtype=torch.float64)
    wanted = torch.tanh(p.x[-1].double() + h @ p.weight_hh[0].double().T)
    torch.testing.assert_close(out[-1].double(), wanted, rtol=0, atol=2e-2)

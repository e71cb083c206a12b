"""The recurrence across the chip on hardware: its tiles and what they could be, timed by turns, and torch.nn.RNN.

Without a CUDA device one tiny size is interpreted, a step a launch.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from charrnn_fast.bench.gate_tiles import KINDS, target_of
from charrnn_fast.bench.measure import Spread, alternate
from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward
from charrnn_fast.kernels.triton.elman_grid import choose_grid_tile, grid_pass
from charrnn_fast.kernels.triton.elman_grid_tiles import GRID_TILES, GridTile, grid_width
from charrnn_fast.kernels.triton.launch import processors_of

# (kind, H, T, B), what matters most first.
SIZES = [
    (kind, H, 200, B) for H in (512, 1024, 2048, 256) for kind in ("tf32", "16bit", "fp32") for B in (1, 16, 64, 128)
]
TINY = [("fp32", 40, 2, 3)]
TINY_TILE = GridTile("mma3", 16, 8, 2, 1.0, "tiny")
Jobs = dict[str, Callable[[], Any]]


def candidates(kind: str, hidden_size: int, shipped: GridTile, target: str) -> list[GridTile]:
    """The other tiles of this size, and the shipped one with one thing changed: its counters, or the steps ahead."""
    width = grid_width(kind, hidden_size)
    found = [] if width is None else [t for t in GRID_TILES[kind, width] if target in t.targets and t != shipped]
    found.append(replace(shipped, by_part=not shipped.by_part))
    found += [replace(shipped, ahead=ahead) for ahead in (1, 2, 4) if ahead != shipped.ahead]
    return found


def _label(tile: GridTile) -> str:
    counters = "a counter a part" if tile.by_part else "one counter"
    return f"{tile.form} units{tile.units} rows{tile.rows} warps{tile.warps} ahead{tile.ahead} {counters}"


def _jobs(kind: str, H: int, T: int, B: int, tile: GridTile, device: torch.device) -> Jobs:
    """Forward and the backward recurrence by one tile."""
    dtype, _ = KINDS[kind]
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(T, B, H, generator=generator, device=device).to(dtype) for _ in range(2))
    weights = [(torch.randn(H, H, generator=generator, device=device) / H**0.5).to(dtype)]
    forth, back = (grid_pass(forward, tile, H, dtype, device, True) for forward in (True, False))
    out, _ = elman_forward(x, weights, how=forth)

    def backward() -> torch.Tensor:
        return elman_backward(grad, None, out, weights, need_weight_grad=False, need_bias_grad=False, how=back)[0]

    return {"forward": lambda: elman_forward(x, weights, how=forth)[0], "backward": backward}


def _torch_rnn(kind: str, H: int, T: int, B: int, device: torch.device) -> Callable[[], Any]:
    rnn = torch.nn.RNN(H, H).to(device, KINDS[kind][0])
    x = torch.randn(T, B, H, device=device).to(KINDS[kind][0])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return rnn(x)[0]

    return forward


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """For every size: microseconds a step of the shipped tile, of torch.nn.RNN forward, and each candidate's ratio."""
    on_gpu, target = device.type == "cuda", target_of(device)
    least, seconds = (5, 0.1) if on_gpu else (1, 0.0)
    for kind, H, T, B in SIZES if on_gpu else TINY:
        row: dict[str, Any] = {"name": f"{kind} H{H} T={T} B={B}", "wrong": ""}
        dtype, precision = KINDS[kind]
        chosen = choose_grid_tile(H, dtype, precision, device, B) if on_gpu else TINY_TILE
        shipped = chosen or (choose_grid_tile(H, dtype, precision, device) if on_gpu else None)
        if shipped is None:
            continue
        row |= {"shipped": _label(shipped), "taken": chosen is not None, "candidates": []}
        jobs = _jobs(kind, H, T, B, shipped, device)
        wanted = {step: job().double() for step, job in jobs.items()}
        torch_rnn = _torch_rnn(kind, H, T, B, device)
        torch_rnn()
        times = alternate({"ours": jobs["forward"], "theirs": torch_rnn}, seconds, device, least=least)
        row |= {f"{side}_us_a_step": 1e6 * Spread.of(found).median / T for side, found in times.items()}
        for tile in candidates(kind, H, shipped, target):
            if tile.programs(H) <= processors_of(device):
                row["candidates"].append(_against(jobs, wanted, kind, H, T, B, tile, device, seconds, least))
        row["wrong"] = "; ".join(each["wrong"] for each in row["candidates"] if each["wrong"])
        yield row


def _against(
    jobs: Jobs,
    wanted: dict[str, torch.Tensor],
    kind: str,
    H: int,
    T: int,
    B: int,
    tile: GridTile,
    device: torch.device,
    seconds: float,
    least: int,
) -> dict[str, Any]:
    """A candidate's times over the shipped tile's, by turns; it says so if it does not compile or has other results."""
    row: dict[str, Any] = {"tile": _label(tile), "wrong": ""}
    try:
        others = _jobs(kind, H, T, B, tile, device)
        found = {step: job().double() for step, job in others.items()}
    except Exception as error:  # whatever the compiler or the driver raises: this candidate is none
        return row | {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    for step, job in jobs.items():
        difference = float((found[step] - wanted[step]).abs().max() / wanted[step].abs().max())
        if not difference <= 0.05:
            row["wrong"] = f"{_label(tile)}: its {step} differs from the shipped tile's by {difference:.2g}"
        times = alternate({"shipped": job, "other": others[step]}, seconds, device, least=least)
        spread = Spread.of([o / s for o, s in zip(times["other"], times["shipped"], strict=True)])
        row[f"{step}_us_a_step"] = 1e6 * Spread.of(times["other"]).median / T
        row[f"{step}_ratio"] = {"low": spread.low, "median": spread.median, "high": spread.high}
    return row

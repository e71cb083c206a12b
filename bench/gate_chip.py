"""What goes across the chip on hardware, timed by turns: the recurrence, what its tiles could be and torch.nn.RNN; the
decoder and that of one program.

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
from charrnn_fast.kernels.triton.generate import one_program
from charrnn_fast.kernels.triton.generate_grid import generate_grid
from charrnn_fast.kernels.triton.generate_grid_tiles import GenerateGridTile, grid_tile
from charrnn_fast.kernels.triton.generate_types import Decoding
from charrnn_fast.kernels.triton.launch import processors_of

# (kind, H, T, B), what matters most first.
SIZES = [
    (kind, H, 200, B) for H in (512, 1024, 2048, 256) for kind in ("tf32", "16bit", "fp32") for B in (1, 16, 64, 128)
]
TINY = [("fp32", 40, 2, 3)]
TINY_TILE = GridTile("mma3", 16, 8, 2, 1.0, "tiny")
Jobs = dict[str, Callable[[], Any]]
ONE = 0x3FF0000000000000  # the bits of 1.0 in double precision


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


# (kind, H, ids, B), what matters most first; V = 90.
DECODED = [("fp32", 256, 1000, 1), ("fp32", 512, 1000, 1), ("16bit", 512, 1000, 1)]
DECODED_TINY = [("fp32", 20, 1, 1)]


def _decoder_tiles(shipped: GenerateGridTile) -> dict[str, GenerateGridTile]:
    """The shipped one, and it with one thing changed."""
    return {
        "shipped": shipped,
        "one counter": replace(shipped, by_part=False),
        f"{12 - shipped.warps} warps": replace(shipped, warps=12 - shipped.warps),
    }


def decoders(device: torch.device) -> Iterator[dict[str, Any]]:
    """For every size, greedy and drawing: microseconds an id of one program a sequence and of each tile of a grid."""
    on_gpu = device.type == "cuda"
    for kind, H, N, B in DECODED if on_gpu else DECODED_TINY:
        for sampled in (False, True):
            row: dict[str, Any] = {
                "name": f"decoder {kind} H{H} B={B} {'drawing' if sampled else 'greedy'}",
                "wrong": "",
            }
            jobs, rejected = _decoders(KINDS[kind][0], H, N, B, sampled, device)  # compiling takes most of the time
            row |= rejected
            names = [name for name in jobs if name != "one program"]
            texts = [jobs[name]() for name in names]
            row["wrong"] = "; ".join(n for n, ids in zip(names, texts, strict=True) if not torch.equal(ids, texts[0]))
            times = alternate(jobs, 0.2 if on_gpu else 0.0, device, least=5 if on_gpu else 1)
            yield row | {f"{name}: us an id": 1e6 * Spread.of(found).median / N for name, found in times.items()}


def _decoders(
    dtype: torch.dtype, H: int, N: int, B: int, sampled: bool, device: torch.device
) -> tuple[Jobs, dict[str, str]]:
    """A decoder of one program, and those across the chip that run; errors of those that do not, by name."""
    V, P, generator = 90, 8 if device.type == "cuda" else 1, torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    prompt = torch.randint(V, (B, P), generator=generator, device=device)
    table, weight_hh, head, bias = random(V, H), random(H, H) / H**0.5, 3 * random(V, H) / H**0.5, random(V)
    uniforms = torch.rand(B, N, generator=generator, device=device, dtype=torch.float64) if sampled else None
    call = Decoding(prompt, N, table, [None], [weight_hh], [None], head, bias, None, uniforms, ONE, None, tanh=True)
    shipped = grid_tile(H, 4)
    if shipped is None:
        raise ValueError(f"no tile for hidden size {H}")

    def across(tile: GenerateGridTile) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            found = generate_grid(call, tile)
            if found is None:
                raise RuntimeError("no team of programs runs at once")
            return found[0]

        return run

    jobs: Jobs = {"one program": lambda: one_program(call)[0]}
    jobs["one program"]()
    rejected: dict[str, str] = {}
    for name, tile in _decoder_tiles(shipped).items():
        try:
            across(tile)()
        except Exception as error:  # whatever the compiler or the driver raises: this candidate is none
            rejected[f"{name}: error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        else:
            jobs[name] = across(tile)
    return jobs, rejected

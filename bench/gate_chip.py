"""What goes across the chip on hardware, timed by turns: the recurrence, what its tiles could be and torch.nn.RNN; the
decoder and that of one program.

Without a CUDA device one tiny size is interpreted, a step a launch.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from charrnn_fast.bench.gate_tiles import KINDS, by_turns, difference, microseconds, recurrence_jobs, target_of
from charrnn_fast.bench.measure import failure, ratios
from charrnn_fast.bench.peers import without_grad
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


def _jobs(kind: str, H: int, T: int, B: int, device: torch.device, tile: GridTile) -> Jobs:
    """Forward and the backward recurrence by one tile."""
    forth, back = (grid_pass(forward, tile, H, KINDS[kind][0], device, True) for forward in (True, False))
    return recurrence_jobs(kind, T, B, H, device, {"how": forth}, {"how": back, "need_bias_grad": False})


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """For every size: microseconds a step of the shipped tile, of torch.nn.RNN forward, and each candidate's ratio."""
    on_gpu, target = device.type == "cuda", target_of(device)
    for kind, H, T, B in SIZES if on_gpu else TINY:
        row: dict[str, Any] = {"name": f"{kind} H{H} T={T} B={B}", "wrong": ""}
        dtype, precision = KINDS[kind]
        chosen = choose_grid_tile(H, dtype, precision, device, B) if on_gpu else TINY_TILE
        shipped = chosen or (choose_grid_tile(H, dtype, precision, device) if on_gpu else None)
        if shipped is None:
            continue
        row |= {"shipped": _label(shipped), "taken": chosen is not None, "candidates": []}
        jobs_of = partial(_jobs, kind, H, T, B, device)
        jobs = jobs_of(shipped)
        wanted = {step: job().double() for step, job in jobs.items()}
        rnn, x = torch.nn.RNN(H, H).to(device, dtype), torch.randn(T, B, H, device=device).to(dtype)
        theirs = without_grad(partial(rnn, x))
        theirs()
        times = by_turns({"ours": jobs["forward"], "theirs": theirs}, device)
        row |= {f"{side}_us_a_step": microseconds(found) / T for side, found in times.items()}
        for tile in candidates(kind, H, shipped, target):
            if tile.programs(H) <= processors_of(device):
                row["candidates"].append(_against(jobs, wanted, T, jobs_of, tile, device))
        row["wrong"] = "; ".join(each["wrong"] for each in row["candidates"] if each["wrong"])
        yield row


def _against(
    jobs: Jobs,
    wanted: dict[str, torch.Tensor],
    T: int,
    jobs_of: Callable[[GridTile], Jobs],
    tile: GridTile,
    device: torch.device,
) -> dict[str, Any]:
    """A candidate's times over the shipped tile's, by turns; it says so if it does not compile or has other results."""
    row: dict[str, Any] = {"tile": _label(tile), "wrong": ""}
    try:
        others = jobs_of(tile)
        found = {step: job().double() for step, job in others.items()}
    except Exception as error:  # whatever the compiler or the driver raises: this candidate is none
        return row | {"error": failure(error)}
    for step, job in jobs.items():
        if differs := difference(found[step], wanted[step]):
            row["wrong"] = f"{_label(tile)}: its {step} {differs}"
        times = by_turns({"shipped": job, "other": others[step]}, device)
        row[f"{step}_us_a_step"] = microseconds(times["other"]) / T
        row[f"{step}_ratio"] = asdict(ratios(times["shipped"], times)["other"])
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
    for kind, H, N, B in DECODED if device.type == "cuda" else DECODED_TINY:
        for sampled in (False, True):
            name = f"decoder {kind} H{H} B={B} {'drawing' if sampled else 'greedy'}"
            jobs, rejected = _decoders(KINDS[kind][0], H, N, B, sampled, device)  # compiling takes most of the time
            names = [name for name in jobs if name != "one program"]
            texts = [jobs[name]() for name in names]
            wrong = "; ".join(n for n, ids in zip(names, texts, strict=True) if not torch.equal(ids, texts[0]))
            times = by_turns(jobs, device, 0.2)
            us = {f"{name}: us an id": microseconds(found) / N for name, found in times.items()}
            yield {"name": name, "wrong": wrong, **rejected, **us}


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
            rejected[f"{name}: error"] = failure(error)
        else:
            jobs[name] = across(tile)
    return jobs, rejected

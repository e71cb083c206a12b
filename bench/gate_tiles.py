"""The Elman kernels' tiles on hardware: what the driver says of their registers, and what their neighbours would cost.

Both go through the launchers that users' calls go through. Without a CUDA device the registers are those of the code
compiled for sm_90, by a driver that claims to be one, and the neighbours are interpreted.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction

from charrnn_fast.bench import static
from charrnn_fast.bench.measure import Job, Spread, alternate, failure, ratios
from charrnn_fast.bench.static_builds import TARGETS, elman_name
from charrnn_fast.bench.static_figures import nvidia_figures
from charrnn_fast.kernels.triton import launch
from charrnn_fast.kernels.triton.elman import choose_tile, elman_backward, elman_forward, forget_tiles
from charrnn_fast.kernels.triton.elman_kernels import elman_backward_kernel, elman_forward_kernel
from charrnn_fast.kernels.triton.elman_tiles import ALL, MAX_SUM_STEPS, TILES, Tile

ABSENT = "sm_90"  # the GPU that is compiled for where there is none
KINDS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "16bit": (torch.bfloat16, "ieee"),
    "fp64": (torch.float64, "ieee"),
}
V = 28
TINY_TILES = (("fp32", 16), ("tf32", 128))
MOST_WARPS = 16
APART = 0.05  # of the largest value: results of two tiles that differ by more are not the same
NOTABLE = 0.95  # of the shipped tile's time: a neighbour below is worth a look


def target_of(device: torch.device) -> str:
    """The column of the tables that a device has."""
    return launch.target_of(device)[0] if device.type == "cuda" else ABSENT


def by_turns(jobs: Mapping[str, Job], device: torch.device, seconds: float = 0.1) -> dict[str, list[float]]:
    """Seconds by job, round by round; without a device one round."""
    on_gpu = device.type == "cuda"
    return alternate(jobs, seconds if on_gpu else 0.0, device, least=5 if on_gpu else 1)


def microseconds(times: Sequence[float]) -> float:
    return 1e6 * Spread.of(times).median


def difference(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """How a tile's result differs from the shipped one's, if it does."""
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    return "" if apart <= APART else f"differs from the shipped tile's by {apart:.2g}"


class _AbsentDriver:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self) -> Any:
        return TARGETS[ABSENT].gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiling_for_absent(device: torch.device):
    """Without a device, launches compile for ABSENT and stop there."""
    if device.type == "cuda":
        yield
        return
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    triton.runtime.driver.set_active(_AbsentDriver())  # it stays: without a device there is none to go back to
    with patch.object(JITFunction, "run", compiled):
        yield


def _launches(kind: str, width: int, tile: Tile, device: torch.device) -> dict[str, Job]:
    """By the step that bench/static.py names: a launch with what it calls the plain options."""
    dtype, precision = KINDS[kind]
    B = 32

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    weights = [numbers(width, width) / width**0.5]
    most = MAX_SUM_STEPS.get(width, 32)
    short, long = most // 2, 2 * most
    ids = torch.randint(V, (short, B), device=device)
    out, grad = numbers(long, B, width), numbers(long, B, width)
    options: dict[str, Any] = {"precision": precision}

    def forward() -> Any:
        if width <= 32:
            return elman_forward(numbers(V, width), weights, tokens=ids, **options)
        return elman_forward(numbers(short, B, width), weights, **options)

    def sums() -> Any:
        return elman_backward(grad[:short], None, out[:short], weights, tokens=ids, num_tokens=V, **options)

    found = {"forward": forward, "backward": lambda: elman_backward(grad, None, out, weights, **options)}
    return found | ({"backward_sums": sums} if tile.ahead_sums else {})


def _compiled(kernels: tuple[Any, ...]) -> dict[int, Any]:
    """Every compiled kernel that Triton keeps for these functions, by its identity."""
    return {
        id(kernel): kernel
        for function in kernels
        for caches in function.device_caches.values()
        for kernel in caches[0].values()
    }


def _figures(kernel: Any, device: torch.device) -> dict[str, int]:
    """Registers a thread and bytes of stack: as the driver has them, or read from the code."""
    if device.type == "cuda":
        return {"registers": kernel.n_regs, "stack": 4 * kernel.n_spills}  # spills are counted in words of 32 bits
    found = nvidia_figures(kernel.asm["cubin"], kernel.metadata.shared)
    return {"registers": found["registers"], "stack": found["stack"]}


def registers(device: torch.device) -> Iterator[dict[str, Any]]:
    """For every tile: the figures here, the recorded ones of this Triton's version, and what is wrong, if anything.

    Without a device TINY_TILES only: compiling takes seconds.
    """
    target = target_of(device)
    recorded = static.recorded(triton.__version__, target)
    kernels = (elman_forward_kernel, elman_backward_kernel)
    for (kind, width), tiles in TILES.items():
        if device.type != "cuda" and (kind, width) not in TINY_TILES:
            continue
        for tile in tiles:
            if target not in tile.targets:
                continue
            with in_place_of_shipped(kind, width, tile):
                for step, job in _launches(kind, width, tile, device).items():
                    before = _compiled(kernels)
                    with compiling_for_absent(device):
                        job()
                    new = [kernel for key, kernel in _compiled(kernels).items() if key not in before]
                    if not new:
                        continue  # another kind has this tile as well
                    name = elman_name(step, kind, width, tile, full=False)
                    here, there = _figures(new[0], device), recorded.get(name)
                    yield {"name": name, "target": target, **here, "recorded": there, "finding": _wrong(here, there)}


def _wrong(here: dict[str, int], recorded: dict[str, Any] | None) -> str:
    if here["stack"]:
        return f"it spills: {here['stack']} bytes of stack"
    if recorded is None:
        return ""
    if static.is_worse("registers", here, recorded):
        return f"{here['registers']} registers, recorded {recorded['registers']}"
    return ""


@contextmanager
def in_place_of_shipped(kind: str, width: int, tile: Tile):
    """The launchers take this tile, whatever the number of rows."""
    try:
        with patch.dict(TILES, {(kind, width): (replace(tile, most=ALL),)}):
            forget_tiles()
            yield
    finally:
        forget_tiles()


def candidates(kind: str, width: int, shipped: Tile, target: str) -> list[Tile]:
    """The other tiles of this kind and width, and those that differ from the shipped one in one thing.

    That is twice or half the rows or the warps, the lanes that share a unit, or the steps that input is loaded ahead.
    """
    found = [tile for tile in TILES[kind, width] if target in tile.targets and tile != shipped]
    if shipped.form == "fma":
        found += [replace(shipped, rows=rows) for rows in (shipped.rows * 2, shipped.rows // 2) if rows]
        lanes_n, lanes_k = shipped.lanes_n, shipped.lanes_k
        found.append(replace(shipped, lanes_n=lanes_n // 2, lanes_k=lanes_k * 2))
        if lanes_k > 1:
            found.append(replace(shipped, lanes_n=lanes_n * 2, lanes_k=lanes_k // 2))
    units = shipped.lanes_n if shipped.form == "fma" else 16
    warps = (shipped.warps * 2, shipped.warps // 2)
    found += [replace(shipped, warps=w) for w in warps if 1 <= w <= MOST_WARPS and w * units <= width]
    found.append(replace(shipped, ahead=2 if shipped.ahead == 4 else 4))
    return [replace(tile, targets=(target,)) for tile in found]


# (kind, H, T, B), what is used most first: the recipes' shapes in torch's default precision, then long and wide ones.
SHAPES = [
    ("tf32", 32, 32, 1024),
    ("fp32", 32, 32, 1024),
    ("tf32", 128, 100, 64),
    ("16bit", 256, 100, 64),
    ("tf32", 128, 1000, 1),
    ("16bit", 128, 100, 64),
    ("tf32", 64, 100, 64),
    ("fp32", 128, 1000, 1),
    ("fp32", 128, 100, 1024),
]
TINY_SHAPES = [("fp32", 16, 2, 3)]


def neighbours(device: torch.device) -> Iterator[dict[str, Any]]:
    """For every shape and neighbour: its time over the shipped tile's, forward and the backward recurrence alone."""
    target = target_of(device)
    for kind, width, T, B in SHAPES if device.type == "cuda" else TINY_SHAPES:
        shipped = choose_tile(width, *KINDS[kind], device, B)
        if shipped is None:
            continue
        options = {"precision": KINDS[kind][1]}
        jobs = recurrence_jobs(kind, T, B, width, device, options, options)
        for tile in candidates(kind, width, shipped, target):
            name = f"{kind} H{width} T={T} B={B} {_label(tile)}"
            yield {"name": name, "shipped": _label(shipped), **_against(shipped, tile, kind, width, jobs, device)}


def _label(tile: Tile) -> str:
    lanes = f" lanes{tile.lanes_n}x{tile.lanes_k}" if tile.form == "fma" else ""
    return f"{tile.form} rows{tile.rows}{lanes} warps{tile.warps} ahead{tile.ahead}"


def recurrence_jobs(
    kind: str, T: int, B: int, H: int, device: torch.device, forth: dict[str, Any], back: dict[str, Any]
) -> dict[str, Job]:
    """Forward and the backward recurrence alone, with the launchers' options of each."""
    dtype, _ = KINDS[kind]
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(T, B, H, generator=generator, device=device).to(dtype) for _ in range(2))
    weights = [(torch.randn(H, H, generator=generator, device=device) / H**0.5).to(dtype)]
    out, _ = elman_forward(x, weights, **forth)
    return {
        "forward": lambda: elman_forward(x, weights, **forth)[0],
        "backward": lambda: elman_backward(grad, None, out, weights, need_weight_grad=False, **back)[0],
    }


def _against(
    shipped: Tile, tile: Tile, kind: str, width: int, jobs: dict[str, Job], device: torch.device
) -> dict[str, Any]:
    """Times of both by turns. A neighbour that does not compile or fit says so; a different result is wrong."""
    row: dict[str, Any] = {"wrong": ""}
    for step, job in jobs.items():

        def other(job: Job = job) -> Any:
            with in_place_of_shipped(kind, width, tile):
                return job()

        try:
            found, wanted = other().double(), job().double()
        except Exception as error:  # whatever the compiler or the driver raises: this neighbour is none
            row[f"{step}_error"] = failure(error)
            continue
        if differs := difference(found, wanted):
            row["wrong"] = f"its {step} {differs}"
        times = by_turns({"shipped": job, "other": other}, device)
        spread = ratios(times["shipped"], times)["other"]
        row[f"{step}_us"] = microseconds(times["shipped"])
        row[f"{step}_ratio"] = asdict(spread)
        row["notable"] = row.get("notable", False) or spread.median < NOTABLE
    return row

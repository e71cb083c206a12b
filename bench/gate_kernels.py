"""Our kernels beside cuDNN's own, in one run: the time of each kernel on the device, by torch.profiler.

What a call takes besides (products, sums, copies) is listed too, but compared are the recurrences alone: ours against
the kernels that cuDNN names after RNNs. Without a CUDA device the operators on the CPU stand for kernels.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from charrnn_fast.bench.grid import DTYPES, Config
from charrnn_fast.bench.peers import Ours, TorchRNN
from charrnn_fast.bench.problems import Problem

RECURRENCE = {
    "charrnn_fast": re.compile(r"elman", re.I),
    "torch.nn.RNN": re.compile(r"rnn|elemwise.*persist", re.I),
}
CALLS = 5  # that are profiled, after as many that are not
MOST_LINES = 12

# What is used most first: the sizes of GPU-NOTES' table of cuDNN's times.
SIZES = [
    (Config(f"H={H} B={B}", B, 1024 if B < 1024 else 256, H, H), dtype)
    for dtype in ("fp32", "bf16")
    for H in (128, 32, 64)
    for B in (1, 128, 256, 1024)
]
TINY = [(Config("tiny", 2, 3, 4, 8), "fp32")]


def kernel_times(job: Callable[[], Any], device: torch.device, calls: int = CALLS) -> dict[str, tuple[float, float]]:
    """(launches, microseconds) of each kernel in a call, by name; on a CPU of each operator, itself alone."""
    for _ in range(calls):
        job()
    on_device = device.type == "cuda"
    if on_device:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as trace:
        for _ in range(calls):
            job()
        if on_device:
            torch.cuda.synchronize(device)
    found: dict[str, tuple[float, float]] = {}
    for event in trace.events():
        if (event.device_type == DeviceType.CUDA) == on_device:
            spent = event.time_range.elapsed_us() if on_device else event.self_cpu_time_total
            launches, total = found.get(event.name, (0.0, 0.0))
            found[event.name] = (launches + 1 / calls, total + spent / calls)
    return found


def recurrence_us(times: dict[str, tuple[float, float]], side: str) -> float | None:
    """Microseconds of a call in its recurrence's kernels; None if it has none by these names."""
    found = [us for name, (_, us) in times.items() if RECURRENCE[side].search(name)]
    return sum(found) if found else None


def row(config: Config, dtype: str, task: str, device: torch.device, ours: Ours) -> dict[str, Any]:
    """Both sides' kernels for one size and task. `ratio`: cuDNN's recurrence over ours, None where there is none."""
    problem = Problem(config, device, DTYPES[dtype], 1)
    found: dict[str, Any] = {"name": f"{config.name} T={config.T} {dtype} {task}", "finding": ""}
    each: dict[str, float | None] = {}
    for side in (ours, TorchRNN()):
        times = kernel_times(side.job(problem, task), device)
        each[side.name] = recurrence_us(times, side.name)
        slowest = sorted(times.items(), key=lambda item: -item[1][1])[:MOST_LINES]
        found[side.name] = {
            "us": sum(us for _, us in times.values()),
            "recurrence_us": each[side.name],
            "recurrence_us_a_step": None if each[side.name] is None else (each[side.name] or 0.0) / config.T,
            "kernels": [{"name": name[:120], "launches": n, "us": us} for name, (n, us) in slowest],
        }
    own, other = each[ours.name], each["torch.nn.RNN"]
    found["ratio"] = other / own if own and other else None
    if device.type == "cuda" and own is None:
        found["finding"] = "no kernel of ours ran"
    return found


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Every size, forward and then forward and backward; without a device one tiny size, ours in the interpreter."""
    ours = Ours() if device.type == "cuda" else Ours("triton")
    for config, dtype in SIZES if device.type == "cuda" else TINY:
        for task in ("forward", "forward_backward"):
            yield row(config, dtype, task, device, ours)

"""Sides timed in turn in one run, on a CPU or a CUDA device, and the rates and bytes that floors are made of."""

import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from charrnn_fast.kernels import native

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's notices land between the lines of a table

Job = Callable[[], Any]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


SETTLE_SECONDS = 0.004
LONG_SECONDS = 0.2  # a call of this length does not notice that its threads slept
LEAST_TURN_SECONDS = {"cpu": 2e-4, "cuda": 2e-3}  # a shorter turn is made of several calls
MOST_CALLS = 400
MOST_INPUT_SETS = 8
ROW_GEMM = 768  # the side of the product that is timed beside a row: 5 ms, at nearly the rate of larger ones


def settle(job: Job | None, device: torch.device = CPU) -> None:
    """Let the threads of whatever ran before go to sleep and wake this side's by an untimed call, if one is given."""
    if device.type == "cpu":
        time.sleep(SETTLE_SECONDS)
    if job is not None:
        job()


def seconds_per_call(job: Job, device: torch.device = CPU, calls: int = 1) -> float:
    """Mean seconds of `calls` calls in a row: the one place where something is timed.

    On a CUDA device between two events of the stream, with no wait of the host in between, so that what is measured is
    what a training loop gets: the device's time, or the host's where it cannot launch as fast. On a CPU by the clock.
    """
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            job()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        job()
    return (time.perf_counter() - start) / calls


def turn(job: Job, device: torch.device = CPU, calls: int = 1) -> float:
    """Seconds of a call in its turn."""
    settle(job, device)
    return seconds_per_call(job, device, calls)


def calls_for(once: float, device: torch.device) -> int:
    """How many calls make a turn long enough for the clock."""
    return max(1, min(MOST_CALLS, math.ceil(LEAST_TURN_SECONDS[device.type] / max(once, 1e-9))))


def rounds_for(seconds: float, budget: float, least: int = 9, most: int = 200) -> int:
    """How many rounds of `seconds` fit a budget."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def rounds_in_a_row(before: Job, target: Job, rounds: int) -> None:
    """`before` and `target` by turns."""
    for _ in range(rounds):
        before()
        target()


def alternate(
    sides: Mapping[str, Job],
    seconds: float,
    device: torch.device = CPU,
    *,
    least: int = 9,
    drive: Callable[[Job, Job, int], None] = rounds_in_a_row,
) -> dict[str, list[float]]:
    """Time every side once a round, so that a busy machine slows all of them: seconds by side, round by round.

    sides: jobs that have been called before. seconds: the budget of all rounds together, of which there are `least` at
    least. drive: what runs the rounds, from a job for all sides but the first, one for the first, and their number.
    """
    first, *others = sides
    once = {name: seconds_per_call(job, device) for name, job in sides.items()}
    calls = {name: calls_for(once[name], device) for name in sides}
    wake = {name: job if once[name] < LONG_SECONDS else None for name, job in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}

    def before() -> None:
        for name in others:
            settle(wake[name], device)
            times[name].append(seconds_per_call(sides[name], device, calls[name]))
        settle(wake[first], device)

    def target() -> None:
        times[first].append(seconds_per_call(sides[first], device, calls[first]))

    settling = SETTLE_SECONDS if device.type == "cpu" else 0.0
    round_seconds = sum((calls[name] + (wake[name] is not None)) * once[name] + settling for name in sides)
    drive(before, target, rounds_for(round_seconds, seconds, least))
    return times


def replay(job: Job, device: torch.device) -> Job | str:
    """The job's launches alone, as a CUDA graph that is played again; or one clause that says why there is none.

    What a call takes with this is the device's time, whatever the host needs to launch. job: has been called before.
    """
    if device.type != "cuda":
        return "a CUDA graph needs a CUDA device"
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):  # as many as torch.cuda.make_graphed_callables makes
                job()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            job()
        graph.replay()
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # it waits for the device, or a library allocates
        torch.cuda.synchronize(device)
        return f"capturing it raised {failure(error, 120)}"
    return graph.replay


def failure(error: BaseException, most: int = 200) -> str:
    """Its type, and of its first line so many letters."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:most]}"


def ratios(ours: Sequence[float], others: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Per side the spread of its time over ours, round by round."""
    return {name: Spread.of([p / o for p, o in zip(times, ours, strict=True)]) for name, times in others.items()}


def input_sets(bytes_of_one: float, device: torch.device) -> int:
    """How many sets of inputs keep a call from finding its own in the level-2 cache.

    One on a CPU: the other sides' turns come between two calls, and push a side's inputs out of the caches.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_INPUT_SETS, math.ceil(2 * cache / max(bytes_of_one, 1.0))))


def rotate(jobs: Sequence[Job]) -> Job:
    """One job that does the next of several at every call."""
    if len(jobs) == 1:
        return jobs[0]
    turns = itertools.cycle(jobs)
    return lambda: next(turns)()


def exponents(sizes: Sequence[float], values: Sequence[float]) -> list[float]:
    """The exponent of growth between each two neighbouring points: 1 is linear."""
    points = list(zip(sizes, values, strict=True))
    return [math.log(v1 / v0) / math.log(s1 / s0) for (s0, v0), (s1, v1) in itertools.pairwise(points)]


@contextmanager
def _matmul_precision(device: torch.device):
    """Products of fp32 in the precision that torch's switch for RNNs gives the recurrence."""
    before = torch.backends.cuda.matmul.allow_tf32
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def gemm_rate(device: torch.device = CPU, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = size or (1536 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with _matmul_precision(device):
        return 2 * size**3 / min(turn(lambda: a @ b, device) for _ in range(12))


def gemm_job(size: int = ROW_GEMM) -> Job:
    """A matrix product on the CPU of 2 size^3 FLOPs, to be timed in turn with other jobs."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def copy_rate(device: torch.device = CPU, numbers: int | None = None) -> float:
    """Bytes/s of a large copy, read and write counted, the best of several."""
    source = torch.randn(numbers or (32 << 20 if device.type == "cpu" else 256 << 20), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(turn(lambda: target.copy_(source), device) for _ in range(8))


def rates(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What floors are made of, measured now."""
    return {"gemm_flops": gemm_rate(device, dtype), "copy_bytes": copy_rate(device)}


def floor(flops: float, traffic: float, measured: Mapping[str, float]) -> float:
    """Seconds that no implementation can go below: max(FLOPs / GEMM rate, bytes / copy rate)."""
    return max(flops / measured["gemm_flops"], traffic / measured["copy_bytes"])


def peak_bytes(job: Job, device: torch.device = CPU) -> int:
    """The most memory that a call of `job` holds beyond what was allocated before it.

    On a CPU torch's allocations and, added to their peak, the native kernels' working memory. That of other libraries'
    kernels (a matrix product's packed operands) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    native.peak_scratch()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        job()
    scratch = native.peak_scratch()
    # What the call frees of earlier calls, gradients say, is counted as well where torch knows its size: so the most is
    # taken from the lowest level before it.
    held = lowest = peak = 0
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        lowest = min(lowest, held)
        peak = max(peak, held - lowest)
    return peak + scratch


def _cpu_model() -> str:
    """The CPU's name as its maker wrote it, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


PACKAGES = ("triton", "jax", "onnxruntime", "openvino", "flashrnn", "flag-gems", "xma")


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What a result has to be read with: processors, instruction sets, versions, threads."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "instructions": native.available() or f"{native.isa()} (torch: {torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build, which the package's metadata leaves out
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_for_rnns": torch.backends.cudnn.allow_tf32,
        }
    return found

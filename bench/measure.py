"""Ratios of two or more callables measured in one run, and the rates and bytes that floors are made of."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


SETTLE_SECONDS = 0.004


def settle(function: Callable[[], object]) -> None:
    """Let the threads of whatever ran before go to sleep and wake this side's by an untimed call."""
    time.sleep(SETTLE_SECONDS)
    function()


def clock(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call in its turn."""
    settle(function)
    return clock(function)


def gemm_rate() -> float:
    """FLOP/s of a large fp32 matrix product, the best of several."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    return 2 * 1536**3 / min(timed(lambda: a @ b) for _ in range(12))


def copy_rate() -> float:
    """Bytes/s of a large copy, read and write counted, the best of several."""
    source = torch.randn(32 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(8))


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that a call of `function` holds beyond what was allocated before it."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    held = peak = 0
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def rounds_for(seconds: float, budget: float, least: int = 9, most: int = 200) -> int:
    """How many rounds of `seconds` fit a budget."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def machine() -> dict[str, object]:
    """What a result has to be read with."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": f"{platform.machine()} {cpu}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def ratios(ours: list[float], peers: Mapping[str, list[float]]) -> dict[str, Spread]:
    """Per peer the spread of its time over ours, round by round."""
    return {name: Spread.of([p / o for p, o in zip(times, ours, strict=True)]) for name, times in peers.items()}

"""What is timed, one row of results at a time: the same for pytest's suites, `charrnn-fast bench` and the GPU gate."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from charrnn_fast.bench import grid, measure
from charrnn_fast.bench.grid import Config, Gradients
from charrnn_fast.bench.libraries import XMA, FlagGems, FlashRNN, Jax, OnnxRuntime, OpenVino, TensorFlow
from charrnn_fast.bench.measure import CPU, Job, Spread
from charrnn_fast.bench.peers import CompiledReference, Ours, Peer, Reference, TorchRNN
from charrnn_fast.bench.problems import ClipProblem, Problem
from charrnn_fast.ops import backends

PEERS: tuple[Peer, ...] = (
    TorchRNN(),
    Reference(),
    CompiledReference(),
    Jax(),
    OnnxRuntime(),
    OpenVino(),
    TensorFlow(),
    FlashRNN(),
    FlagGems(),
    XMA(),
)
BASELINE = TorchRNN.name  # the side that memory is compared with
GEMM = "matrix product"  # no side: timed with them for the row's floor
TIME_IS_UP = "the time was up"
MEMORY_TASKS = ("forward_backward", "lm_step", *grid.BEYOND)


@dataclass(frozen=True)
class Case:
    """One row to measure: a task on a configuration, and the work that the task cannot do without."""

    task: str
    config: Config | Gradients
    dtype: str = "fp32"
    sweep: str | None = None  # the size that grows, where the row is a point of a sweep

    @property
    def name(self) -> str:
        return self.config.name + ("" if self.dtype == "fp32" else f" {self.dtype}")

    def __str__(self) -> str:
        return f"{self.task} {self.name}"

    @property
    def work(self) -> tuple[float, float]:
        """FLOPs and bytes that the task cannot do without; what torch.nn.RNN has no argument for, as without it."""
        config, backward = self.config, self.task != "forward"
        if isinstance(config, Gradients):  # each is read for the norm, read again and written
            return 3.0 * config.numbers, 3.0 * 4 * config.numbers
        if self.task == "lm_step":
            return config.lm_flops(), config.lm_bytes()
        if self.task == "generation":
            return config.generation_flops(), 0.0
        return config.flops(backward), config.bytes(backward, grid.DTYPES[self.dtype].itemsize)


BOTH = ("forward", "forward_backward")
ELMAN = [Case(task, config) for config in grid.GRID for task in BOTH]
LM = [Case("lm_step", config) for config in grid.LM_STEPS]
CLIPS = [Case("clip", gradients) for gradients in grid.CLIP]
GENERATION = [Case("generation", config) for config in grid.GENERATION]
BEYOND_ROWS = [Case(task, config) for task, config in grid.BEYOND.items()]
GPU_ELMAN = [Case(task, config, dtype) for config, dtype in grid.GPU_GRID for task in BOTH]
QUICK = ("d2l", "santa", "stream", "packed", "policy", "d2l's", "2,000 tensors", "H=32 B=1", "H=256 B=1")


def cases(quick: bool) -> list[Case]:
    """All that `charrnn-fast bench` measures beside the sweeps, what matters most first."""
    found = [*LM, *ELMAN, *CLIPS, *GENERATION, *BEYOND_ROWS]
    return [case for case in found if case.config.name in QUICK] if quick else found


def sweep_cases(quick: bool) -> list[Case]:
    """The points of the sweeps; quick: the three largest sizes of each that are not the last."""
    sizes = {axis: found[-4:-1] if quick else found for axis, found in grid.SWEEPS.items()}
    return [Case("forward_backward", config, sweep=axis) for axis in sizes for config in grid.sweep(axis, sizes[axis])]


@dataclass
class Run:
    """How rows are measured. `seconds`: of a row's rounds, all sides together; `least`: rounds at least."""

    rates: dict[str, dict[str, float]]  # by dtype
    device: torch.device = CPU
    peers: Sequence[Peer] = field(default_factory=lambda: [p for p in PEERS if not p.takes_minutes])
    seconds: float = 2.0
    least: int = 9
    drive: Callable[[Job, Job, int], None] = measure.rounds_in_a_row
    ours: Ours = field(default_factory=Ours)
    replays: bool = False  # whether rows have the device's time alone too, where the device has it


def _problems(case: Case, run: Run) -> list[Any]:
    """The problem once for every set of inputs."""
    kind: Any = ClipProblem if isinstance(case.config, Gradients) else Problem
    _, traffic = case.work
    sets = measure.input_sets(traffic, run.device) if traffic else 1
    return [kind(case.config, run.device, grid.DTYPES[case.dtype], seed) for seed in range(1, 1 + sets)]


def sides(case: Case, run: Run) -> tuple[dict[str, Job], dict[str, str]]:
    """The jobs by side, ours first, each called once; and for the other peers why they are not among them."""
    problems = _problems(case, run)
    jobs = {run.ours.name: measure.rotate([run.ours.job(problem, case.task) for problem in problems])}
    jobs[run.ours.name]()
    skipped: dict[str, str] = {}
    for peer in run.peers:
        reason = peer.why_not(problems[0], case.task)
        if reason is None:
            try:
                job = measure.rotate([peer.job(problem, case.task) for problem in problems])
                job()
                jobs[peer.name] = job
            except Exception as error:  # a peer's fault is a line of the table, whatever the peer raises
                reason = f"it failed: {measure.failure(error)}"
        if reason is not None:
            skipped[peer.name] = reason
    return jobs, skipped


def row_of(case: Case, run: Run) -> dict[str, Any]:
    """One row of results. Times are medians in milliseconds, ratios a side's time over ours.

    On a CPU the GEMM rate of a row's floor is measured in the row's own rounds.
    """
    jobs, skipped = sides(case, run)
    rates = dict(run.rates[case.dtype])
    timed = jobs | {GEMM: measure.gemm_job()} if run.device.type == "cpu" else jobs
    times = measure.alternate(timed, run.seconds, run.device, least=run.least, drive=run.drive)
    own = times.pop(run.ours.name)
    if GEMM in times:  # two virtual processors may be two cores now and one a minute later
        rates["gemm_flops"] = 2 * measure.ROW_GEMM**3 / Spread.of(times.pop(GEMM)).median
    median = Spread.of(own).median
    flops, traffic = case.work
    shortest = measure.floor(flops, traffic, rates)
    row: dict[str, Any] = {
        "task": case.task,
        "name": case.name,
        "dtype": case.dtype,
        "ms": 1e3 * median,
        "rounds": len(own),
        "peer_ms": {name: 1e3 * Spread.of(found).median for name, found in times.items()},
        "ratios": {name: asdict(s) | {"text": str(s)} for name, s in measure.ratios(own, times).items()},
        "skipped": skipped,
        "flops": flops,
        "bytes": traffic,
        "gemm_flops": rates["gemm_flops"],
        "floor_ms": 1e3 * shortest,
        "over_floor": median / shortest,
    }
    if run.replays:
        row["device"] = device_times(jobs, run)
    if isinstance(case.config, Config):
        row |= {name: getattr(case.config, name) for name in ("B", "T", "I", "H")}
        row["path"] = backends.explain(
            case.config.H, grid.DTYPES[case.dtype], run.device, backend=run.ours.backend
        ).backend
    if case.sweep:
        row["sweep"] = case.sweep
    if case.task in MEMORY_TASKS:
        row["memory_mb"] = measure.peak_bytes(jobs[run.ours.name], run.device) / 1e6
        if BASELINE in jobs:
            row["memory_ratio"] = 1e6 * row["memory_mb"] / max(1, measure.peak_bytes(jobs[BASELINE], run.device))
    return row


def device_times(jobs: Mapping[str, Job], run: Run) -> dict[str, dict[str, Any]]:
    """By side the time on the device alone, {"ms": ..., "ratio": its over ours}, or {"none": why there is none}."""
    replays = {name: measure.replay(job, run.device) for name, job in jobs.items()}
    timed = {name: job for name, job in replays.items() if not isinstance(job, str)}
    found: dict[str, dict[str, Any]] = {name: {"none": why} for name, why in replays.items() if isinstance(why, str)}
    if timed:
        times = measure.alternate(timed, run.seconds, run.device, least=run.least)
        for name, seconds in times.items():
            found[name] = {"ms": 1e3 * Spread.of(seconds).median}
            if run.ours.name in times:
                found[name]["ratio"] = str(measure.ratios(times[run.ours.name], {name: seconds})[name])
    return found


def rows(wanted: Iterable[Case], run: Run, until: float) -> Iterator[dict[str, Any]]:
    """Row after row. From `until` (of time.monotonic()) on, and where ours fails, a row says why it has no times."""
    for case in wanted:
        row: dict[str, Any] = {"task": case.task, "name": case.name, "dtype": case.dtype}
        if time.monotonic() >= until:
            row["not_measured"] = TIME_IS_UP
        else:
            try:
                row = row_of(case, run)
            except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
                row["not_measured"] = measure.failure(error)
        yield row
        if run.device.type == "cuda":
            torch.cuda.empty_cache()

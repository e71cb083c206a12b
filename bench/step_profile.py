"""Where the time of one training step goes: torch.profiler's trace of it, summarised.

On a CUDA device what is listed are kernels, on a CPU operators (one inside another counts once, for itself). Gaps are
the times in which no kernel ran, or no operator: there the host was in Python.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from charrnn_fast import CharRNN, clip_grad_norm_
from charrnn_fast.bench.grid import LM_STEPS, Config
from charrnn_fast.bench.measure import CPU
from charrnn_fast.bench.problems import Problem

WARM_UP_STEPS = 5
MOST_LINES = 15
PHASES = ("forward and loss", "backward", "clip", "optimizer")


@dataclass(frozen=True)
class Profile:
    """Microseconds of one step. `lines`: (name, calls, microseconds), the longest first; `phases` on the host."""

    title: str
    unit: str  # kernel, operator
    span: float
    lines: list[tuple[str, int, float]]
    phases: list[tuple[str, float]]
    gaps: list[float]


def gaps(spans: list[tuple[float, float]], begin: float, end: float) -> list[float]:
    """Lengths of the times between begin and end that no span (from, to) covers."""
    found, reached = [], begin
    for start, stop in sorted(spans):
        if start > reached:
            found.append(min(start, end) - reached)
        reached = max(reached, stop)
    if end > reached:
        found.append(end - reached)
    return [gap for gap in found if gap > 0]


def _step(model: CharRNN, optimizer: torch.optim.Optimizer, X: torch.Tensor, Y: torch.Tensor) -> None:
    parameters = list(model.parameters())
    with record_function(PHASES[0]):
        loss, _ = model.loss(X, Y)
    with record_function(PHASES[1]):
        loss.backward()
    with record_function(PHASES[2]):
        clip_grad_norm_(parameters, 1.0)
    with record_function(PHASES[3]):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def profile_step(device: torch.device = CPU, config: Config = LM_STEPS[0]) -> Profile:
    """Profile one step of a CharRNN with SGD on a configuration's sizes, after a warm-up."""
    problem = Problem(config, device)
    torch.manual_seed(0)
    model = CharRNN(config.I, config.H).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(WARM_UP_STEPS):
        _step(model, optimizer, *problem.batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace, record_function("step"):
        _step(model, optimizer, *problem.batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    title = f"one training step of {config.name} (B={config.B}, T={config.T}, V={config.I}, H={config.H}) on {device}"
    return summarise(list(trace.events()), title, on_device=device.type == "cuda")


def summarise(events: list[Any], title: str, on_device: bool) -> Profile:
    """A profile from torch.profiler's events."""
    step = next(e for e in events if e.name == "step" and e.device_type == DeviceType.CPU)
    inside = [e for e in events if e is not step and e.time_range.start >= step.time_range.start]
    host = [e for e in inside if e.device_type == DeviceType.CPU and e.time_range.end <= step.time_range.end]
    phases = [(e.name, e.time_range.elapsed_us()) for e in host if e.name in PHASES]
    shown = [e for e in inside if e.device_type == DeviceType.CUDA] if on_device else host
    shown = [e for e in shown if e.name not in (*PHASES, "step")]
    busy = [(e.time_range.start, e.time_range.end) for e in shown]
    costs: dict[str, list[float]] = {}
    for e in shown:
        costs.setdefault(e.name, []).append(e.time_range.elapsed_us() if on_device else e.self_cpu_time_total)
    lines = [(name, len(found), sum(found)) for name, found in sorted(costs.items())]
    lines.sort(key=lambda line: -line[2])
    idle = gaps(busy, step.time_range.start, step.time_range.end)
    return Profile(title, "kernel" if on_device else "operator", step.time_range.elapsed_us(), lines, phases, idle)


def table(found: Profile) -> str:
    """The profile as lines for a terminal."""
    lines = [f"{found.title}: {found.span / 1e3:.3f} ms under the profiler, which adds to it", ""]
    lines += [f"  {name:20} {us / 1e3:9.3f} ms  {us / found.span:6.1%}" for name, us in found.phases]
    lines += ["", f"{'calls':>6} {'ms':>9} {'share':>7}  {found.unit}"]
    for name, calls, us in found.lines[:MOST_LINES]:
        lines.append(f"{calls:6} {us / 1e3:9.3f} {us / found.span:7.1%}  {name[:90]}")
    rest = found.lines[MOST_LINES:]
    if rest:
        us = sum(line[2] for line in rest)
        calls = sum(line[1] for line in rest)
        lines.append(f"{calls:6} {us / 1e3:9.3f} {us / found.span:7.1%}  {len(rest)} others")
    launches = sum(line[1] for line in found.lines)
    idle = sum(found.gaps)
    largest = f", the longest {max(found.gaps):.0f} us" if found.gaps else ""
    lines.append(
        f"{launches} {found.unit} calls; {len(found.gaps)} gaps between them, {idle / 1e3:.3f} ms "
        f"({idle / found.span:.1%}){largest}"
    )
    return "\n".join(lines)

"""Speed on a CPU: pytest bench --benchmark-only -k cpu [--seconds S] [--record FILE]

Every round times each side once, in turn, so that a busy machine slows all of them; ratios are taken round by round.
"""

import pytest

from bench.grid import GENERATION, GRID, LM_STEPS, Config
from bench.measure import Spread, clock, peak_bytes, ratios, rounds_for, settle, timed
from bench.peers import PEERS, Job, Ours, TorchRNN, decoders
from bench.problems import Problem

NUM_CHARS = 1000


def _alternate(
    benchmark, ours: Job, others: dict[str, Job], seconds: float
) -> tuple[list[float], dict[str, list[float]]]:
    """Rounds of every other side in turn, then ours under pytest-benchmark; the seconds of each, round by round."""
    for job in (*others.values(), ours):
        job()
    once = {name: timed(job) for name, job in others.items()}
    once["ours"] = timed(ours)
    times: dict[str, list[float]] = {name: [] for name in others}
    mine: list[float] = []

    def others_first() -> None:
        for name, job in others.items():
            times[name].append(timed(job))
        settle(ours)

    rounds = rounds_for(2 * sum(once.values()), seconds)
    benchmark.pedantic(lambda: mine.append(clock(ours)), setup=others_first, rounds=rounds, iterations=1)
    return mine, times


def _report(
    record, task: str, name: str, ours: list[float], times: dict[str, list[float]], skipped: dict, **more
) -> None:
    spreads = ratios(ours, times)
    record(
        {
            "task": task,
            "name": name,
            "ms": 1e3 * Spread.of(ours).median,
            "rounds": len(ours),
            "ratios": {
                k: {"low": s.low, "median": s.median, "high": s.high, "text": str(s)} for k, s in spreads.items()
            },
            "skipped": skipped,
            **more,
        }
    )


def _sides(problem: Problem, task: str) -> tuple[Job, dict[str, Job], dict[str, str]]:
    jobs, skipped = {}, {}
    for peer in PEERS:
        reason = peer.why_not(problem, task)
        if reason is None:
            jobs[peer.name] = peer.job(problem, task)
        else:
            skipped[peer.name] = reason
    return Ours().job(problem, task), jobs, skipped


@pytest.mark.parametrize("task", ["forward", "forward_backward"])
@pytest.mark.parametrize("config", GRID, ids=lambda c: c.name)
def test_cpu_elman(benchmark, config: Config, task: str, rates, record, pytestconfig):
    problem = Problem(config)
    ours, jobs, skipped = _sides(problem, task)
    mine, times = _alternate(benchmark, ours, jobs, pytestconfig.getoption("--seconds"))
    backward = task == "forward_backward"
    floor = max(config.flops(backward) / rates["gemm_flops"], config.bytes(backward) / rates["copy_bytes"])
    extra = {"floor_ms": 1e3 * floor, "over_floor": Spread.of(mine).median / floor}
    if backward:
        extra["memory_ratio"] = peak_bytes(ours) / peak_bytes(TorchRNN().job(problem, task))
    _report(record, task, config.name, mine, times, skipped, **extra)


@pytest.mark.parametrize("config", LM_STEPS, ids=lambda c: c.name)
def test_cpu_lm_step(benchmark, config: Config, record, pytestconfig):
    problem = Problem(config)
    ours, jobs, skipped = _sides(problem, "lm_step")
    mine, times = _alternate(benchmark, ours, jobs, pytestconfig.getoption("--seconds"))
    memory = peak_bytes(ours) / peak_bytes(jobs[TorchRNN.name])
    _report(record, "lm_step", config.name, mine, times, skipped, memory_ratio=memory)


@pytest.mark.parametrize(("hidden", "batch"), GENERATION)
def test_cpu_generation(benchmark, hidden: int, batch: int, record, pytestconfig):
    jobs = decoders(hidden, batch, NUM_CHARS)
    ours = jobs.pop("charrnn_fast")
    mine, times = _alternate(benchmark, ours, jobs, pytestconfig.getoption("--seconds"))
    _report(record, "generation", f"H={hidden} B={batch}", mine, times, {})

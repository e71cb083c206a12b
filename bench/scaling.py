"""How much faster two processes train than one, on this machine: python bench/scaling.py [--seconds S]

Two processes of one thread each, on gloo. Round by round, each in its turn: one alone on a batch of B sequences while
the other waits, both together on 2 B, and the all-reduce of the step's buffer by itself. Printed are medians
(quartiles) over the rounds: the ratio together / alone in sequences a second, of which 2 is the most; the same by the
processor time that a process takes, which other programs on the machine disturb less; and the times.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from charrnn_fast import CharRNN
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.step import TrainingStep

STEPS = 8  # of a turn
CONFIGS = {  # layers, B, T, H, V
    "d2l": (1, 1024, 32, 32, 28),
    "ch8": (1, 32, 35, 512, 28),
    "shakespeare": (2, 32, 64, 512, 65),
}


def _step(config: tuple[int, ...], processes: Processes | None, batch: int) -> Callable[[], object]:
    layers, _, T, H, V = config
    torch.manual_seed(0)
    model = CharRNN(V, H, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainingStep(model, optimizer, 1.0, processes=processes)
    step.prepare()
    X = torch.randint(V, (batch, T))
    return lambda: step((X, X.roll(1, 1)))


def _turn(job: Callable[[], object]) -> tuple[float, float]:
    """Seconds a step, by the clock and of this process's processor time."""
    start, used = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        job()
    return (time.perf_counter() - start) / STEPS, (time.process_time() - used) / STEPS


def _quartiles(values: list[float], scale: float = 1.0) -> str:
    low, middle, high = (q * scale for q in statistics.quantiles(values, n=4))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _run_rank(rank: int, meeting: str, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    processes = Processes()
    for name, config in CONFIGS.items():
        alone, together = _step(config, None, config[1]), _step(config, processes, config[1])
        buffer = torch.zeros(sum(p.numel() for p in CharRNN(config[4], config[3], config[0]).parameters()))
        for job in (alone, together):
            job()
        rounds: list[tuple[tuple[float, float], ...]] = []
        begun = time.monotonic()
        while processes.from_first(len(rounds) < 5 or time.monotonic() - begun < seconds):
            single = _turn(alone) if rank == 0 else (0.0, 0.0)
            dist.barrier()
            double = _turn(together)
            dist.barrier()
            rounds.append((single, double, _turn(partial(processes.add_up, buffer))))
        if rank == 0:
            by_clock, by_processor = (
                _quartiles([2 * single[i] / double[i] for single, double, _ in rounds]) for i in (0, 1)
            )
            alone_ms, together_ms, reduce_ms = (_quartiles([turn[i][0] for turn in rounds], 1e3) for i in range(3))
            print(
                f"{name}: {by_clock} times as fast, by processor time {by_processor}; alone {alone_ms} ms a step, "
                f"together {together_ms} ms, an all-reduce of {buffer.nbytes / 1e6:.2f} MB {reduce_ms} ms; "
                f"{len(rounds)} rounds",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each configuration")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/meeting", options.seconds)
        multiprocessing.spawn(_run_rank, arguments, nprocs=2)


if __name__ == "__main__":
    main()

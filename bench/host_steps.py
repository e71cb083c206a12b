"""What a training step on a GPU is made of, in counts: this library's launches, and ATen's operations on the device.

Every launch is replaced by one that returns at once, as in host.py, so this runs on any machine. What is replayed here
is nothing, so a replayed step's Python calls and time are the host's part of a captured one.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from timeit import repeat
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.profiler_legacy import profile

from charrnn_fast import CharRNN
from charrnn_fast.bench import host
from charrnn_fast.lm.batches import Positions
from charrnn_fast.lm.capture import WARM_UP_STEPS, RecordedSteps, Work, dependencies
from charrnn_fast.lm.step import Evaluation, TrainingStep

T, B, H, V = 8, 2, 4, 5
# ATen's operations that launch nothing themselves: views, memory, what is known on the host.
_NO_LAUNCH = (
    *("transpose", "transpose_", "t", "view", "select", "slice", "unsqueeze", "squeeze", "detach", "detach_", "expand"),
    *("as_strided", "as_strided_", "unfold", "alias", "permute", "unbind", "split", "narrow", "_unsafe_view"),
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh"),
    *("to", "flatten", "reshape", "_reshape_alias", "resolve_conj", "resolve_neg", "result_type", "item"),
    *("_local_scalar_dense", "requires_grad_", "numpy_T", "contiguous", "is_nonzero"),
)
MODELS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "one layer, one bias": {"second_bias": False},
    "learned embedding": {"embedding": 3},
    "two layers": {"num_layers": 2},
}


@dataclass(frozen=True)
class Step:
    """One step. launches: kernels of this library by name; operations: ATen's that launch; frames: Python calls."""

    name: str
    launches: tuple[str, ...]
    operations: tuple[str, ...]
    frames: int
    microseconds: float


class _Nothing:
    """A recorder whose replays do nothing."""

    def run(self, work: Work) -> tuple[Tensor, ...]:
        return work()

    def record(self, work: Work) -> Work:
        found = work()
        return lambda: found


@contextmanager
def _launches() -> Iterator[list[str]]:
    """The names of the Triton kernels that are launched, on CPU tensors; nothing of them is run."""
    from triton.runtime.jit import JITFunction

    from charrnn_fast.kernels.triton.launch import Launch

    names: list[str] = []

    def launch(self: Any, *_: Any) -> None:
        names.append(self.kernel.fn.__name__)

    def run(self: Any, *_: Any, **__: Any) -> None:
        names.append(self.fn.__name__)

    with (
        host.stubbed("triton", lambda *_: None),
        patch.object(Launch, "__call__", launch),
        patch.object(JITFunction, "run", run),
    ):
        yield names


def operations_of(call: Callable[[], object]) -> list[str]:
    """ATen's operations that launch something on a GPU: those that do their work themselves, and not by others, which
    are counted then; but one for what a GPU does in one launch for a list of tensors.
    """
    with profile() as found:
        call()
    children: dict[int, list[Any]] = {}
    for event in found.function_events:
        children.setdefault(id(event.cpu_parent), []).append(event)

    def launching(event: Any) -> list[str]:
        name = event.name.removeprefix("aten::")
        if name.startswith(("_foreach", "_fused")):
            return [name]
        below = [of for child in children.get(id(event), []) for of in launching(child)]
        return below or [name] * (event.name.startswith("aten::") and name not in _NO_LAUNCH)

    return [name for event in children.get(id(None), []) for name in launching(event)]


def _jobs() -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps by name, each a call on the next batch, with the state carried."""
    corpus = torch.arange(200, dtype=torch.uint8) % V
    for name, options in MODELS.items():
        for kind in ("SGD", "Adam") if name == "two layers" else ("SGD",):
            torch.manual_seed(0)
            model = CharRNN(V, H, **options)
            trained = [p for p in model.parameters() if p.requires_grad]
            sgd = kind == "SGD"
            optimizer = torch.optim.SGD(trained, 0.1) if sgd else torch.optim.Adam(trained, 1e-3, fused=True)
            step = TrainingStep(model, optimizer, 1.0)
            yield f"{name}, {kind}", _walking(step, corpus)
            if kind == "SGD" and name in ("one layer", "two layers"):
                yield f"{name}, evaluation", _walking(Evaluation(model), corpus)
            if name == "one layer":
                at_once = TrainingStep(model, optimizer, 1.0)
                at_once.prepare()
                yield f"{name}, at once", _walking(at_once, corpus)
                fixed = partial(dependencies, model, optimizer)
                yield f"{name}, replayed", _walking(RecordedSteps(step, _Nothing(), fixed, model.zero_state), corpus)


def _walking(step: Callable[..., Any], corpus: Tensor) -> Callable[[], object]:
    starts = itertools.cycle(torch.tensor([[s, 100 + s] for s in range(0, 80, T)]).unbind())
    state = None

    def job() -> None:
        nonlocal state
        _, state = step(Positions(corpus, next(starts), T, V), state)

    return job


def why_not() -> str | None:
    """None if the kernels' launchers are here to be counted, else one clause that says why not."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return "kernels are interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else None


def steps(*, timed: bool = True) -> list[Step]:
    """A general step of each kind of model, one replayed, and an evaluation, on one thread."""
    found = []
    with host.one_thread(), torch.random.fork_rng(devices=[]), _launches() as names:
        for name, job in _jobs():
            for _ in range(WARM_UP_STEPS + 2):  # compiles, allocates, records
                job()
            names.clear()
            job()
            launched = tuple(names)
            frames, operations = host.frames_of(job), tuple(operations_of(job))
            microseconds = _microseconds(job) if timed else float("nan")
            found.append(Step(name, launched, operations, frames, microseconds))
    return found


def _microseconds(job: Callable[[], object]) -> float:
    """Of a call, the best of a few turns."""
    return 1e6 * min(repeat(job, number=50, repeat=7)) / 50


def table(found: list[Step]) -> str:
    """The steps, readable."""
    lines = [f"{'a training step on a GPU':32}{'launches':>10}{'ATen':>6}{'Python calls':>14}{'us':>8}  which"]
    for step in found:
        counts = f"{len(step.launches):10}{len(step.operations):6}{step.frames:14}{step.microseconds:8.0f}"
        which = [name.removesuffix("_kernel") for name in step.launches] + [f"aten::{name}" for name in step.operations]
        lines.append(f"{step.name:32}{counts}  {' '.join(which)}")
    return "\n".join(lines)

"""What a call costs before any kernel works: time in torch.adds, Python calls, ATen operations and launches.

Every launch is replaced by one that returns at once, so this runs on any machine, for GPU kernels too: their launchers
take CPU tensors then. Sizes are tiny, so that the matrix products that stay cost little more than any operation.

    charrnn-fast bench --host
"""

import contextlib
import gc
import os
import statistics
import sys
import threading
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd.profiler_legacy import profile

from charrnn_fast import FusedRNN
from charrnn_fast.kernels.native import library
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.ops import backends, elman_layer

T, B, FEATURES, H, V = 8, 2, 3, 4, 5
ROUNDS = 15
SECONDS = 0.01  # of one side in a round
_PACKAGE = str(Path(backends.__file__).parents[1])


@dataclass(frozen=True)
class Row:
    """One call. frames: Python functions entered. files: of this package, from the call to a launch."""

    name: str
    adds: float
    frames: int
    operations: int
    launches: int
    files: int


def calls(backend: str | None) -> dict[str, Callable[[], object]]:
    """What is measured, by name. backend: FusedRNN's, or None for torch.nn.RNN."""
    torch.manual_seed(0)
    x, ids = torch.randn(T, B, FEATURES), torch.randint(V, (T, B))
    one = torch.ones(T, B, H)
    if backend is None:
        rnn: nn.RNN = nn.RNN(FEATURES, H)
    else:
        rnn = FusedRNN(FEATURES, H, backend=backend)

    def no_grad() -> object:
        with torch.no_grad():
            return rnn(x)

    found = {
        "forward, no_grad": no_grad,
        "forward": lambda: rnn(x),
        "forward + backward": lambda: torch.autograd.backward(rnn(x)[0], one),
    }
    if backend is not None:
        of_tokens = FusedRNN(V, H, backend=backend)
        model = CharRNN(V, H, backend=backend)
        rows = ids.T.contiguous()
        found["tokens, forward + backward"] = lambda: torch.autograd.backward(of_tokens.forward_tokens(ids)[0], one)
        found["loss + backward"] = lambda: model.loss(rows, rows)[0].backward()
    return found


class _Launches:
    """Stands for a launch: counts it, notes which files of this package were on the way, and returns at once."""

    def __init__(self) -> None:
        self.count, self.files = 0, 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        files: set[str] = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if path == __file__ and files:  # the call; below it is who measures
                break
            if path.startswith(_PACKAGE) and path != __file__:
                files.add(path)
            frame = frame.f_back
        self.files = max(self.files, len(files))


class _Extension:
    """The C extension with nothing behind its kernels."""

    def __init__(self, real: Any, kernel: Callable[..., Any]):
        self.isas = real.isas
        self.elman_forward = self.elman_backward = self.language_model = self.linear_cross_entropy = kernel


@contextlib.contextmanager
def stubbed(backend: str | None, kernel: Callable[..., Any]) -> Iterator[None]:
    """Launches of a backend become ``kernel``; the triton backend takes CPU tensors. None: nothing is replaced."""
    with contextlib.ExitStack() as undo:
        if backend is not None:  # also that of the operations that are not told theirs
            undo.enter_context(patch.dict(os.environ, CHARRNN_BACKEND=backend))
        if backend == "native":
            undo.enter_context(patch.object(library, "extension", _Extension(library.extension, kernel)))
        elif backend == "triton":
            from charrnn_fast.kernels.triton.launch import Launch

            undo.enter_context(patch.object(Launch, "__call__", lambda self, *arguments: kernel()))
            undo.enter_context(patch.object(backends, "triton_cannot_run_on", lambda device: None))
            for forget in (backends.forget, elman_layer.forget):
                forget()
                undo.callback(forget)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def frames_of(call: Callable[[], object]) -> int:
    """Python functions that are entered while it runs, in autograd's threads too; those of this file left out."""
    count = 0

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename != __file__

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return count


def operations_of(call: Callable[[], object]) -> int:
    """ATen operations that nothing of ATen called."""
    with profile() as found:  # the newer one writes to stderr
        call()
    return sum(e.name.startswith("aten::") and not _within(e) for e in found.function_events)


def _within(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _within(parent))


def adds_of(call: Callable[[], object]) -> float:
    """Its time over that of torch.add on a few numbers, by turns; the median of the rounds."""
    a = torch.randn(4)
    timers = [timeit.Timer(side) for side in (call, lambda: torch.add(a, a))]
    repeats = [_repeats(timer) for timer in timers]
    gc.collect()
    ratios = []
    for _ in range(ROUNDS):
        own, add = (timer.timeit(n) / n for timer, n in zip(timers, repeats, strict=True))
        ratios.append(own / add)
    return statistics.median(ratios)


def _repeats(timer: timeit.Timer) -> int:
    timer.timeit(5)
    return max(1, int(SECONDS / timer.timeit(1)))


def rows_of(backend: str | None, *, timed: bool = True) -> list[Row]:
    """The rows of one backend, or of torch.nn.RNN as it is for None."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        for name, call in calls(backend).items():
            launches = _Launches()
            with stubbed(backend, launches):
                call()  # resolves what is resolved once
                launches.count = 0
                call()
                counted = launches.count
                frames, operations = frames_of(call), operations_of(call)
            with stubbed(backend, lambda *_: None):
                call()
                adds = adds_of(call) if timed else float("nan")
            rows.append(Row(name, adds, frames, operations, counted, launches.files))
    return rows


def table(rows: dict[str, list[Row]]) -> str:
    """The rows of each side, readable."""
    lines = [f"{'':14}{'':28}{'torch.adds':>12}{'Python calls':>14}{'operations':>12}{'launches':>10}{'files':>7}"]
    for side, found in rows.items():
        for row in found:
            cells = f"{row.adds:12.1f}{row.frames:14}{row.operations:12}"
            cells += f"{row.launches:10}{row.files:7}" if row.launches else f"{'-':>10}{'-':>7}"
            lines.append(f"{side:14}{row.name:28}{cells}")
    return "\n".join(lines)


def sides(*, timed: bool = True) -> dict[str, list[Row]]:
    """torch.nn.RNN and every backend of ours that is here, on one thread."""
    present = {"native": library.missing is None, "triton": backends._HAS_TRITON}
    with one_thread():
        found = {"torch.nn.RNN": rows_of(None, timed=timed)}
        return found | {name: rows_of(name, timed=timed) for name, is_here in present.items() if is_here}

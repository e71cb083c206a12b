"""Which backend runs what, and why the others do not: one table for all operations, explainable.

A row of ``TABLE`` says of one backend and one operation what it cannot run and, for ``backend="auto"``, where it is
slower than the rows below it. ``choose`` reads the rows from the top; ``explain`` reads them aloud.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import torch

from charrnn_fast.kernels import native

from .compiling import constant_to_compilers
from .precision import rnn_precision, tf32_for_rnns

NAMES = ("auto", "triton", "native", "torch")

# Fewer steps than this on a CPU are left to torch's own operator, called without torch.nn.RNN's way to it: 0.93 to 1.08
# times as fast as torch.nn.RNN, by turns on a quiet machine. Entering the kernels costs more than entering its loop.
# With them, forward with and without gradients and forward+backward at H = 32, 128, 512 and B = 1, 16 would be T=1
# 0.4-0.7 times as fast as it, T=2 0.5-0.9, T=3 0.6-1.0, T=4 0.6-1.2, T=8 0.9-1.8.
LEAST_CPU_STEPS = 4

# The decoder's program reads its weights once for each id: beyond this many bytes, at the 100 GB/s or so that one
# multiprocessor takes in, or beyond that many for all sequences, at some 5 TB/s of a whole GPU, that is longer than the
# launches of a step-by-step decoder take. An estimate from an H100's data, not a measurement.
MAX_DECODER_BYTES, MAX_DECODER_BYTES_OF_ALL = 8 * 2**20, 512 * 2**20


class Sizes(NamedTuple):
    """What a choice may depend on beside operation, device and dtype; 1 where an operation has no such size."""

    hidden_size: int = 1
    batch_size: int = 1  # of "elman" times the number of directions
    num_classes: int = 1
    num_layers: int = 1


Limits = Callable[[torch.device, torch.dtype, Sizes], str | None]  # None, or one clause


def _none(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One row: a backend, of one operation."""

    name: str
    limits: Limits  # why it cannot run
    slower: Limits = _none  # why "auto" passes it over although it can
    how: Limits = _none  # which of its kernels runs, and why that one
    shortcut: bool = False  # of operations with rows of their own, which run where it cannot, whatever was asked for


@dataclass(frozen=True)
class Explanation:
    """The backend that runs and how, and for each other one why it does not. ``str()`` gives one line per backend."""

    backend: str
    why_not: dict[str, str]
    how: str = ""  # which of its kernels, and why that one

    def __str__(self) -> str:
        runs = f"{self.backend}: runs" + (f": {self.how}" if self.how else "")
        return "\n".join([runs, *(f"{name}: {why}" for name, why in self.why_not.items())])


# ---- questions ----------------------------------------------------------------------------------------------------


def check_name(backend: str) -> str:
    """Return ``backend``; ValueError if there is none of that name."""
    if backend not in NAMES:
        raise ValueError(f"Unknown backend '{backend}'. Select from {', '.join(repr(name) for name in NAMES)}.")
    return backend


def requested(backend: str = "auto") -> str:
    """The backend asked for: ``backend`` itself or, where that is "auto", the environment's ``CHARRNN_BACKEND``."""
    if backend != "auto":
        return backend if backend in NAMES else check_name(backend)
    default = os.environ.get("CHARRNN_BACKEND") or "auto"
    if default not in NAMES:
        raise ValueError(f"CHARRNN_BACKEND is '{default}'. Select from {', '.join(repr(name) for name in NAMES)}.")
    return default


@constant_to_compilers  # a compiler need not look into the table
def choose(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    hidden_size: int = 1,
    batch_size: int = 1,
    num_classes: int = 1,
    num_layers: int = 1,
    backend: str = "auto",
) -> str:
    """The name of the backend that runs an operation of ``TABLE`` in ``dtype`` on ``device``; sizes as in ``Sizes``.

    ``backend``: a name, or "auto" for ``CHARRNN_BACKEND`` or, without it, the first row that can and is not slower. An
    operation that the one asked for has no row for is made of operations that it may have: "torch".
    Raises ValueError for an unknown name, RuntimeError saying why if a backend asked for by name cannot run.
    """
    sizes = Sizes(hidden_size, batch_size, num_classes, num_layers)
    return _choose(operation, requested(backend), device, dtype, sizes, tf32_for_rnns(device))


@functools.lru_cache(4096)  # reading the table would cost 5 us
def _choose(operation: str, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, tf32: bool) -> str:
    for row in TABLE[operation]:
        if name == "auto":
            if row.limits(device, dtype, sizes) is None and row.slower(device, dtype, sizes) is None:
                return row.name
        elif name == row.name:
            why = row.limits(device, dtype, sizes)
            if why is not None and row.shortcut:
                break
            if why is not None:
                given = ", ".join(f"{of}={size}" for of, size in sizes._asdict().items() if size != 1)
                what = f"{operation} with {given}" if given else operation
                raise RuntimeError(f"backend '{name}' cannot run {what} in {dtype} on {device}: {why}")
            return name
    return "torch"


def explain(
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    operation: str = "elman",
    batch_size: int = 1,
    num_classes: int = 1,
    num_layers: int = 1,
    backend: str = "auto",
) -> Explanation:
    """Say which backend runs an operation of this size, and for each other backend why it does not.

    ``operation``: a key of ``TABLE``; "elman" is one layer of FusedRNN, whose ``batch_size`` is times the number of
    directions. Other arguments and errors as in :func:`choose`.
    """
    device, sizes = torch.device(device), Sizes(hidden_size, batch_size, num_classes, num_layers)
    found = _explain(operation, requested(backend), device, dtype, sizes, tf32_for_rnns(device))
    return replace(found, why_not=dict(found.why_not))  # the caller's own


@functools.lru_cache(4096)
def _explain(
    operation: str, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, tf32: bool
) -> Explanation:
    chosen = _choose(operation, name, device, dtype, sizes, tf32)
    how, why_not = None, {}
    for row in TABLE[operation]:
        if row.name == chosen:
            how = row.how(device, dtype, sizes)
            continue
        why = row.limits(device, dtype, sizes)
        if why is None and name == "auto":
            why = row.slower(device, dtype, sizes)
        why_not[row.name] = why or (f"'{chosen}' is preferred" if name == "auto" else f"'{chosen}' was asked for")
    return Explanation(chosen, why_not, how or "")


def forget() -> None:
    """Choose anew: what was chosen is kept, and the grounds have changed (for tests)."""
    _choose.cache_clear()
    _explain.cache_clear()


@constant_to_compilers
def most_rows(backend: str, chosen: str, device: torch.device, dtype: torch.dtype, hidden_size: int) -> float:
    """Batch times directions beyond which torch's own RNN runs, though ``choose`` says ``chosen`` for one row.

    Infinite, but for a chosen backend that is known to be slower there and was not asked for by name.
    """
    if chosen != "triton" or requested(backend) != "auto":
        return float("inf")
    return _most_rows(device, dtype, hidden_size)


# ---- Triton -------------------------------------------------------------------------------------------------------

_HAS_TRITON = find_spec("triton") is not None


def triton_cannot_run_on(device: torch.device) -> str | None:
    """None if Triton kernels of whatever operation can run on the device, else one clause saying why not."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device.type not in ("cpu", "cuda"):
        return f"it has no kernels for device type '{device.type}'"
    needs_gpu = "it needs a CUDA or ROCm device (on a CPU it runs only under TRITON_INTERPRET=1, for tests)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return needs_gpu
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no such device here"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    try:
        from charrnn_fast.kernels.triton import elman, launch  # noqa: F401
    except ImportError as error:
        return f"its kernels cannot be imported: {error}"
    if device.type == "cpu" and not launch.INTERPRETED:  # the variable was set after the import
        return needs_gpu
    return None


def interpreted(device: torch.device) -> str | None:
    """One clause where Triton would interpret its kernels, else None."""
    return "on a CPU it is interpreted, thousands of times slower" if device.type == "cpu" else None


def _triton_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    return triton_cannot_run_on(device)


def _triton_slower(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    return interpreted(device)


def _triton_elman_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if (why := triton_cannot_run_on(device)) is not None:
        return why
    from charrnn_fast.kernels.triton import elman as kernels

    return kernels.elman_limits(sizes.hidden_size, dtype, rnn_precision(device, dtype), device)


def _most_rows(device: torch.device, dtype: torch.dtype, hidden_size: int) -> float:
    from charrnn_fast.kernels.triton import elman as kernels

    return kernels.most_rows(hidden_size, dtype, rnn_precision(device, dtype), device)


def _triton_elman_slower(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if (why := interpreted(device)) is not None:
        return why
    if sizes.batch_size > _most_rows(device, dtype, sizes.hidden_size):
        return _triton_elman_how(device, dtype, sizes)
    return None


def _triton_elman_how(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str:
    from charrnn_fast.kernels.triton import elman as kernels

    precision = rnn_precision(device, dtype)
    return kernels.elman_reason(sizes.hidden_size, dtype, precision, device, sizes.batch_size)


def _triton_loss_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if (why := triton_cannot_run_on(device)) is not None:
        return why
    from charrnn_fast.kernels.triton import linear_cross_entropy as kernels

    return kernels.linear_cross_entropy_limits(dtype, device)


def _triton_generate_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if (why := triton_cannot_run_on(device)) is not None:
        return why
    from charrnn_fast.kernels.triton.generate import generate_limits

    return generate_limits(sizes.num_classes, dtype)


def _triton_generate_slower(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if (why := interpreted(device)) is not None:
        return why
    from charrnn_fast.kernels.triton.generate_grid import generate_grid_limits

    hidden, batch, classes, layers = sizes
    if generate_grid_limits(hidden, classes, layers, batch, dtype, device) is None:
        return None  # its weights are read once
    read = dtype.itemsize * hidden * (hidden * (2 * layers - 1) + classes)
    if read > MAX_DECODER_BYTES or batch * read > MAX_DECODER_BYTES_OF_ALL:
        return f"{read} bytes of weights for each of {batch} sequences and ids are better read by matrix products"
    return None


def _triton_language_model_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if (why := triton_cannot_run_on(device)) is not None:
        return why
    from charrnn_fast.kernels.triton.language_model import language_model_limits

    return language_model_limits(sizes.hidden_size, sizes.num_classes, dtype, device)


def _triton_generate_how(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str:
    from charrnn_fast.kernels.triton.generate import generate_reason

    hidden, batch, classes, layers = sizes
    return generate_reason(hidden, classes, layers, batch, dtype, device)


# ---- native -------------------------------------------------------------------------------------------------------


def _native_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if device.type != "cpu":
        return "it runs on a CPU"
    return native.available()


def _native_elman_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    return _native_limits(device, dtype, sizes) or native.elman_limits(sizes.hidden_size, dtype)


def _native_one_call_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if (why := _native_limits(device, dtype, sizes)) is not None:
        return why
    return native.language_model_limits(sizes.batch_size, sizes.hidden_size, sizes.num_classes, dtype)


# ---- the table ----------------------------------------------------------------------------------------------------

_TORCH = Backend("torch", _none)  # its own RNN, or tensor operations: runs everything
# By operation, in the order of preference of "auto".
TABLE: dict[str, tuple[Backend, ...]] = {
    "elman": (
        Backend("triton", _triton_elman_limits, _triton_elman_slower, _triton_elman_how),
        Backend("native", _native_elman_limits),
        _TORCH,
    ),
    "linear_cross_entropy": (
        Backend("triton", _triton_loss_limits, _triton_slower),
        Backend("native", _native_elman_limits),
        _TORCH,
    ),
    # Forward, loss and gradients of a one-layer model in one call; "torch": elman and linear_cross_entropy.
    "language_model_loss": (
        Backend("triton", _triton_language_model_limits, _triton_slower, shortcut=True),
        Backend("native", _native_one_call_limits, shortcut=True),
        _TORCH,
    ),
    # A training step of such a model, update included, or its loss alone; "torch": the operations it is made of.
    "language_model_step": (Backend("triton", _triton_language_model_limits, _triton_slower, shortcut=True), _TORCH),
    "clip_grad_norm_": (
        Backend("triton", _triton_limits, _triton_slower),
        Backend("native", _native_limits),
        _TORCH,
    ),
    "windows": (Backend("triton", _triton_limits, _triton_slower), _TORCH),
    "clip_and_sgd_step_": (Backend("triton", _triton_limits, _triton_slower), _TORCH),
    "generate": (
        Backend("triton", _triton_generate_limits, _triton_generate_slower, _triton_generate_how),
        Backend("native", _native_elman_limits),
        _TORCH,
    ),
}

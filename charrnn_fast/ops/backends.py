"""Which backend can run what, and why the others cannot: one table, explainable.

A row of ``BACKENDS`` says of one backend what it cannot run and, for ``backend="auto"``, what it should not be given
although it could. ``choose`` reads the table from the top; ``explain`` reads it aloud.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from charrnn_fast.kernels import native

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


def _triton_cannot(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str | None:
    if (why := triton_cannot_run_on(device)) is not None:
        return why
    from charrnn_fast.kernels.triton import elman as kernels

    return kernels.elman_limits(hidden_size, dtype, _precision(device, dtype), device)


def _triton_should_not(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str | None:
    return "on a CPU it is interpreted, thousands of times slower" if device.type == "cpu" else None


@dataclass(frozen=True)
class Kernels:
    """A backend's two passes of the recurrence for one device, type and width."""

    forward: Callable[..., Any]  # elman_forward of kernels/native/elman.py, which is that of kernels/triton/elman.py
    backward: Callable[..., Any]  # elman_backward
    adds_bias: bool = False  # they add the biases, sum their gradient and take a table of any strides
    projects: Callable[[int, int], int] | None = None
    # for features and rows (batch times directions): the most steps for which forward makes the product with W_ih
    most_rows: float = float("inf")  # batch times directions up to which "auto" prefers them to torch's own RNN


def _triton_kernels(device: torch.device, dtype: torch.dtype, hidden_size: int) -> Kernels:
    from charrnn_fast.kernels.triton import elman as kernels

    precision = _precision(device, dtype)

    @functools.lru_cache(4096)
    def projects(features: int, rows: int) -> int:
        return kernels.projected_steps(features, hidden_size, dtype, precision, device, rows)

    forward = functools.partial(kernels.elman_forward, precision=precision)
    backward = functools.partial(kernels.elman_backward, precision=precision)
    return Kernels(forward, backward, True, projects, kernels.most_rows(hidden_size, dtype, precision, device))


def _precision(device: torch.device, dtype: torch.dtype) -> str:
    """How the kernels may multiply float32: with TF32's ten bits of mantissa where torch's switch for RNNs says so."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if tf32_for_rnns(device) else "ieee"


def tf32_for_rnns(device: torch.device) -> bool:
    """torch's own switch for RNNs. Reading the older one fails where convolutions and RNNs are set apart."""
    if device.type != "cuda":
        return False
    allowed = getattr(torch.backends.cudnn.rnn, "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if allowed is None else allowed == "tf32"


def matmul_precision(device: torch.device, dtype: torch.dtype) -> str:
    """How kernels that stand for a matrix product multiply float32: TF32 where torch's switch for these allows it."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _native_cannot(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str | None:
    if device.type != "cpu":
        return "it runs on a CPU"
    return native.elman_limits(hidden_size, dtype)


def _native_kernels(device: torch.device, dtype: torch.dtype, hidden_size: int) -> Kernels:
    return Kernels(native.elman_forward, native.elman_backward)


# Fewer steps than this on a CPU are torch.nn.RNN's: entering the kernels costs more than entering its loop does. With
# the kernels, forward with and without gradients and forward+backward at H = 32, 128, 512 and B = 1, 16 would be T=1
# 0.4-0.7 times as fast as it, T=2 0.5-0.9, T=3 0.6-1.0, T=4 0.6-1.2, T=8 0.9-1.8.
LEAST_CPU_STEPS = 4


def _never(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One row of the table."""

    name: str
    cannot: Callable[[torch.device, torch.dtype, int], str | None]  # one clause saying why it cannot run, or None
    should_not: Callable[[torch.device, torch.dtype, int], str | None]  # why "auto" passes it over although it can
    kernels: Callable[[torch.device, torch.dtype, int], Kernels] | None  # None: torch's own RNN and tensor operations


# In the order of preference of "auto"; the last row runs everything.
BACKENDS = (
    Backend("triton", _triton_cannot, _triton_should_not, _triton_kernels),
    Backend("native", _native_cannot, _never, _native_kernels),
    Backend("torch", _never, _never, None),
)
NAMES = ("auto", *(row.name for row in BACKENDS))


@dataclass(frozen=True)
class Explanation:
    """The backend that runs and how, and for each other one why it does not. ``str()`` gives one line per backend."""

    backend: str
    why_not: dict[str, str]
    how: str = ""  # which of its kernels, and why that one

    def __str__(self) -> str:
        runs = f"{self.backend}: runs" + (f": {self.how}" if self.how else "")
        return "\n".join([runs, *(f"{name}: {why}" for name, why in self.why_not.items())])


def check_name(backend: str) -> str:
    """Return ``backend``; ValueError if there is none of that name."""
    if backend not in NAMES:
        raise ValueError(f"Unknown backend '{backend}'. Select from {', '.join(repr(name) for name in NAMES)}.")
    return backend


def requested(backend: str) -> str:
    """The backend asked for: ``backend`` itself or, where that is "auto", the environment's ``CHARRNN_BACKEND``."""
    if backend != "auto":
        return backend if backend in NAMES else check_name(backend)
    default = os.environ.get("CHARRNN_BACKEND") or "auto"
    if default not in NAMES:
        raise ValueError(f"CHARRNN_BACKEND is '{default}'. Select from {', '.join(repr(name) for name in NAMES)}.")
    return default


@torch.compiler.assume_constant_result  # a compiler need not look into the table
def choose(backend: str, device: torch.device, dtype: torch.dtype, hidden_size: int) -> str:
    """The name of the backend that runs an Elman layer of ``hidden_size`` units in ``dtype`` on ``device``.

    ``backend``: a name, or "auto" for ``CHARRNN_BACKEND`` or, without it, the first row that can and should.
    Raises ValueError for an unknown name, RuntimeError saying why if a backend asked for by name cannot run.
    """
    return _choose(requested(backend), device, dtype, hidden_size, tf32_for_rnns(device))


@functools.cache  # reading the table would cost 5 us
def _choose(name: str, device: torch.device, dtype: torch.dtype, hidden_size: int, tf32: bool) -> str:
    for row in BACKENDS:
        if name == "auto":
            if row.cannot(device, dtype, hidden_size) is None and row.should_not(device, dtype, hidden_size) is None:
                return row.name
        elif name == row.name:
            why = row.cannot(device, dtype, hidden_size)
            if why is not None:
                raise RuntimeError(f"backend '{name}' cannot run hidden_size={hidden_size}, {dtype} on {device}: {why}")
            return name
    raise AssertionError("the last row of the table runs everything")


@torch.compiler.assume_constant_result
def most_rows(backend: str, chosen: str, device: torch.device, dtype: torch.dtype, hidden_size: int) -> float:
    """Batch times directions beyond which torch's own RNN runs, though ``choose`` says ``chosen`` of ``backend``.

    Infinite, but for a chosen backend that is known to be slower there and was not asked for by name.
    """
    if chosen == "torch" or requested(backend) != "auto":
        return float("inf")
    return kernels_of(chosen, device, dtype, hidden_size).most_rows


def explain(
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    backend: str = "auto",
    batch_size: int = 1,
) -> Explanation:
    """Say which backend runs an Elman layer of this size, and for each other backend why it does not.

    Arguments and errors as in :func:`choose`. ``batch_size``: times the number of directions; GPU kernels are chosen by
    it.
    """
    device = torch.device(device)
    chosen = choose(backend, device, dtype, hidden_size)
    automatic = requested(backend) == "auto"
    why_not = {}
    if batch_size > most_rows(backend, chosen, device, dtype, hidden_size):
        why_not[chosen] = _how(chosen, device, dtype, hidden_size, batch_size)
        chosen = "torch"
    for row in BACKENDS:
        if row.name != chosen and row.name not in why_not:
            why = row.cannot(device, dtype, hidden_size)
            if why is None and automatic:
                why = row.should_not(device, dtype, hidden_size)
            why_not[row.name] = why or (f"'{chosen}' is preferred" if automatic else f"'{chosen}' was asked for")
    return Explanation(chosen, why_not, _how(chosen, device, dtype, hidden_size, batch_size))


def _how(backend: str, device: torch.device, dtype: torch.dtype, hidden_size: int, batch_size: int) -> str:
    if backend != "triton":
        return ""
    from charrnn_fast.kernels.triton import elman as kernels

    return kernels.elman_reason(hidden_size, dtype, _precision(device, dtype), device, batch_size)


def kernels_of(backend: str, device: torch.device, dtype: torch.dtype, hidden_size: int) -> Kernels:
    """Those of a backend that has kernels, with torch's float32 precision switch applied."""
    for row in BACKENDS:
        if row.name == backend and row.kernels is not None:
            return row.kernels(device, dtype, hidden_size)
    raise ValueError(f"backend '{backend}' has no kernels")


@torch.compiler.assume_constant_result
def choose_loss(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend of linear_cross_entropy, by ``CHARRNN_BACKEND``.

    Raises RuntimeError saying why if a backend asked for by name cannot run.
    """
    return _choose_loss(requested("auto"), device, dtype)


def _triton_cannot_loss(device: torch.device, dtype: torch.dtype) -> str | None:
    if (why := triton_cannot_run_on(device)) is not None:
        return why
    from charrnn_fast.kernels.triton import linear_cross_entropy as kernels

    return kernels.linear_cross_entropy_limits(dtype, device)


def _native_cannot_loss(device: torch.device, dtype: torch.dtype) -> str | None:
    return _native_cannot(device, dtype, 1)


@functools.cache
def _choose_loss(name: str, device: torch.device, dtype: torch.dtype) -> str:
    for backend, cannot in (("triton", _triton_cannot_loss), ("native", _native_cannot_loss)):
        interpreted = backend == "triton" and device.type == "cpu"
        if name != backend and (name != "auto" or interpreted):
            continue
        why = cannot(device, dtype)
        if why is None:
            return backend
        if name == backend:
            raise RuntimeError(f"backend '{name}' cannot run linear_cross_entropy in {dtype} on {device}: {why}")
    return "torch"

"""What launchers ask of a device: which column of the tile tables it has, how it multiplies float32; and launches.

A `Launch` is one kernel with its compile-time constants. Triton's own way to start a kernel looks at every argument and
at its options at every call (11 us with two arguments, 19 to 25 with ours, on an H200's host, November 2026). Here the
first call goes that way; what it was compiled for is written down, and calls whose arguments fit that go to the driver.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ..native import library
from . import numerics
from .targets import AMD

INTERPRETED: bool = numerics.INTERPRETED.value
# Rows of the tile tables by dtype; float32 has one for each precision of its products.
KINDS = {torch.float64: "fp64", torch.float16: "16bit", torch.bfloat16: "16bit"}
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
DRIVER = "libcuda.so.1"


@functools.cache
def target_of(device: torch.device) -> tuple[str, float]:
    """The column of the tile table for a device, and its shared memory for one program in KB; "" if it has no column.

    A CPU (interpreter) has the tiles of sm_90.
    """
    if device.type == "cpu":
        return "sm_90", 227
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return ("gfx942" if properties.gcnArchName.startswith(("gfx94", "gfx95")) else ""), 64
    # Consumer Blackwell (12.x) has Ampere's matrix instructions.
    target = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}.get(properties.major, "")
    return target, properties.shared_memory_per_block_optin / 1024


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device; of an H100 for the interpreter."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def device_limits(dtype: torch.dtype, device: torch.device) -> str | None:
    """None if a device has tiles for floats of this dtype and can run them, else one clause that says why not."""
    if dtype not in TYPES:
        return f"no kernel for {dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"no kernel for device type {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if not target_of(device)[0]:
        return f"no tile sizes for {torch.cuda.get_device_name(device)}"
    return None


def precision_of(dtype: torch.dtype, precision: str, device: torch.device) -> str:
    """The dot's: what was asked for matters for float32 alone, and AMD's matrix instructions multiply that as it is."""
    return precision if dtype == torch.float32 and target_of(device)[0] not in AMD else "ieee"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def driver_missing() -> str | None:
    """None if the C extension can launch kernels by the CUDA driver, else one clause that says why not."""
    if library.missing:
        return library.missing
    if torch.version.hip is not None:
        return "it knows CUDA's driver alone"
    try:
        library.extension.use_driver(DRIVER)
    except RuntimeError as error:
        return str(error)
    return None


class Launch:
    """One kernel with its compile-time constants and compiler options, for arguments of one kind.

    Of one kind are arguments whose types are the same: launchers keep one `Launch` for each, and for each device.

    Args:
        kernel: a function of triton.jit or gluon.jit.
        constants: its constexpr parameters, which follow all others, and Triton's options (num_warps and the like).
    """

    __slots__ = ("_compiled", "constants", "kernel")

    def __init__(self, kernel: Any, **constants: Any):
        self.kernel, self.constants = kernel, constants
        self._compiled: list[tuple[Any, ...]] | None = []  # (function, threads, shared, cooperative, codes) and owner

    def __call__(self, grid: tuple[int, int, int], device: torch.device, *arguments: Any) -> None:
        """Start the kernel on the device's current stream.

        arguments: tensors on it, None for one that is not there, and integers, in the order of the kernel's parameters.
        """
        forms = self._compiled  # another thread may take it away
        if forms and device.index == torch._C._cuda_getDevice() and not _hooked(self.kernel):
            values = tuple([a if type(a) is int else -1 if a is None else a.data_ptr() for a in arguments])
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            for function, threads, shared, cooperative, codes, _ in forms:
                if library.extension.launch(function, *grid, threads, shared, cooperative, stream, codes, values):
                    return
        with on_device(device):
            compiled = self.kernel[grid](*arguments, **self.constants)
        if INTERPRETED or forms is None:
            return
        record = None if driver_missing() else record_of(compiled, self.kernel.params, arguments)
        if record is None:
            self._compiled = None
        elif len(forms) < _MOST_FORMS:
            forms.append(record)


@dataclass(frozen=True)
class Pass:
    """How one of the recurrence's two kernels runs for calls of one kind: batch rows of a program (or a team of them),
    and its launch by whether offsets inside a tile need int64.
    """

    rows: int
    narrow: Callable[..., None]  # as Launch.__call__
    wide: Callable[..., None]
    sum_steps: int = 0  # backward: the most steps of which it sums the gradient of W itself
    sums: "Pass | None" = None  # that kernel


_kept: dict[tuple[Any, ...], Launch] = {}


def start(kernel: Any, grid: tuple[int, int, int], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Call the `Launch` of this kernel for these constants and the arguments' types, kept from call to call."""
    types = [None if a is None or type(a) is int else a.dtype for a in arguments]
    key = (id(kernel), device, *types, *constants.values())  # a kernel's own hash is that of its source
    launch = _kept.get(key)
    if launch is None:
        launch = _kept[key] = Launch(kernel, **constants)
    launch(grid, device, *arguments)


_MOST_FORMS = 8  # that are tried in turn; more are Triton's to look up


def _hooked(kernel: Any) -> bool:
    """Does a profiler or a user want to be told of launches? Triton's own way tells them."""
    from triton import knobs

    entered, left = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(entered, "calls", entered) or getattr(left, "calls", left) or kernel.pre_run_hooks)


def record_of(compiled: Any, params: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, ...] | None:
    """What `launch` of kernels/native/launch.c needs to start a compiled kernel again; None if it cannot be started so.

    compiled: what Triton launched for these arguments. params: the kernel's.
    """
    metadata = compiled.metadata
    special = ("global_scratch_size", "profile_scratch_size", "launch_pdl")
    if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in special):
        return None
    codes = codes_of(params, arguments)
    types = [type for name, type in compiled.src.signature.items()][: len(codes)]
    if [_type_of(code) for code in codes] != ["*" if type.startswith("*") else type for type in types]:
        return None
    cooperative = int(getattr(metadata, "launch_cooperative_grid", False))
    threads = metadata.num_warps * metadata.target.warp_size
    # The compiled kernel itself is kept as well: it owns the function.
    return compiled.function, threads, metadata.shared, cooperative, codes.encode(), compiled


def codes_of(params: Sequence[Any], arguments: Sequence[Any]) -> str:
    """A letter for each argument, as launch.c reads them: how Triton specializes a kernel for it."""
    codes = []
    for param, argument in zip(params, arguments, strict=False):
        if argument is None:
            codes.append("n")
        elif not isinstance(argument, int):
            codes.append("P" if argument.data_ptr() % 16 == 0 else "p")
        elif param.annotation_type == "i64":
            codes.append("W")
        elif param.do_not_specialize:
            codes.append("I" if -(2**31) <= argument < 2**31 else "X")
        elif argument == 1:
            codes.append("1")
        elif -(2**31) <= argument < 2**31:
            codes.append("D" if argument % 16 == 0 else "i")
        else:
            codes.append("L" if argument % 16 == 0 else "l")
    return "".join(codes)


def _type_of(code: str) -> str:
    """The start of Triton's name for the type of an argument of this code."""
    if code in "Pp":
        return "*"
    return "constexpr" if code in "n1" else "i64" if code in "LlXW" else "i32"

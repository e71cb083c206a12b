"""Launches of the recurrence across the chip (elman_grid_kernels.py: the algorithm; elman_grid_tiles.py: the choice).

elman.py's launchers call them as they call the kernels of one program. A launch has no more teams of programs than run
at once, by the driver's own count for the compiled kernel; the others go in launches after it. Where not one team fits,
or a driver refuses after all, the steps are launched one by one, which is slow and asks for nothing of the sort.

With CHARRNN_GRID_DEBUG=1 in the environment every call waits for the device and raises a RuntimeError if a program
waited for the others in vain. Without it such a call ends as well, with NaN for results.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .elman_grid_forms import COUNTER_STRIDE, GridForm
from .elman_grid_kernels import elman_grid_backward_kernel, elman_grid_forward_kernel
from .elman_grid_tiles import Chip, GridTile, find_grid_tile, programs_at_once
from .launch import INTERPRETED, KINDS, TYPES, Pass, codes_of, on_device, processors_of, start, target_of
from .targets import NVIDIA

MOST_ROWS = 128  # of cuDNN's measured batches


@functools.lru_cache(4096)  # batch sizes may be any number of numbers
def choose_grid_tile(
    hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device, rows: int = 1
) -> GridTile | None:
    """The tile for so many rows (batch times directions), or None if the chip cannot hold W or cuDNN is faster."""
    if rows > MOST_ROWS:
        return None
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 12:
        return None  # the tiles have not been compiled for consumer Blackwell
    kind = KINDS.get(dtype) or ("tf32" if precision == "tf32" else "fp32")
    library = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, kind)
    return find_grid_tile(kind, hidden_size, target_of(device)[0], rows, processors_of(device), library)


def grid_limits(
    hidden_size: int, dtype: torch.dtype, precision: str = "ieee", device: torch.device | str = "cpu", rows: int = 1
) -> str | None:
    """None if the recurrence goes across the chip, else one clause that says why not. rows: batch times directions."""
    device = torch.device(device)
    if choose_grid_tile(hidden_size, dtype, precision, device, rows) is not None:
        return None
    too_large = f"hidden size {hidden_size} is too large for one program ({dtype})"
    if target_of(device)[0] not in NVIDIA:
        return f"{too_large}, and this GPU has no grid of them"
    return f"{too_large}, and a grid of them is not known to be faster than cuDNN"


@functools.lru_cache(4096)
def grid_most_rows(hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device) -> int:
    """Rows (batch times directions) up to which the recurrence goes across the chip; 0 if it never does."""
    rows = 0
    while choose_grid_tile(hidden_size, dtype, precision, device, rows + 1) is not None:
        rows += 1
    return rows


def grid_reason(
    hidden_size: int, dtype: torch.dtype, precision: str = "ieee", device: torch.device | str = "cpu", rows: int = 1
) -> str:
    """The tile for a size that grid_limits allows: programs, teams, what is resident, and why it is that one."""
    device = torch.device(device)
    tile = choose_grid_tile(hidden_size, dtype, precision, device, rows)
    if tile is None:
        return f"for so many rows {grid_limits(hidden_size, dtype, precision, device, rows)}"
    most = grid_most_rows(hidden_size, dtype, precision, device)
    return f"{tile.describe(hidden_size, dtype.itemsize, rows)}; beyond {most} rows cuDNN is taken"


def chip_of(device: torch.device) -> Chip:
    """What a device has for programs that run at once."""
    properties = torch.cuda.get_device_properties(device)
    return Chip(
        processors=properties.multi_processor_count,
        registers=getattr(properties, "regs_per_multiprocessor", Chip.registers),
        shared=getattr(properties, "shared_memory_per_multiprocessor", Chip.shared),
        threads=properties.max_threads_per_multi_processor,
    )


def _asked_of_driver(function: int, warps: int, shared: int) -> int | None:
    """Programs of a loaded kernel that a multiprocessor holds, by the driver; None where it cannot be asked."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveBlocksPerMultiprocessor
    except (OSError, AttributeError):
        return None
    found = ctypes.c_int()
    arguments = ctypes.byref(found), ctypes.c_void_p(function), ctypes.c_int(32 * warps), ctypes.c_size_t(shared)
    return found.value if ask(*arguments) == 0 else None


def _resident(compiled: Any, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that the device runs at once: the driver's count, and never more than computed."""
    _ = compiled.run  # loads it
    chip = chip_of(device)
    shared = compiled.metadata.shared
    computed = programs_at_once(compiled.n_regs, shared, warps, chip)
    asked = _asked_of_driver(compiled.function, warps, shared)
    return computed if asked is None else min(computed, asked * chip.processors)


INTERPRETED_AT_ONCE = 1  # programs: they run one after another
_resident_of: dict[tuple, int] = {}


def _teams_at_once(kernel: Any, arguments: Sequence[Any], form: GridForm, options: dict, device: torch.device) -> int:
    """Teams of a launch that run at once; 0 if not one does. Asked once for each kernel that is compiled."""
    if INTERPRETED:
        return INTERPRETED_AT_ONCE // form.programs
    key = (kernel, form, device, codes_of(kernel.params, arguments))
    if key not in _resident_of:
        with on_device(device):
            compiled = kernel.warmup(*arguments, grid=(form.programs, 1), F=form, **options)
            _resident_of[key] = _resident(compiled, form.warps, device)
    return _resident_of[key] // form.programs


def launch_teams(
    kernel: Any,
    arguments: Callable[[int, int, int], Sequence[Any]],
    teams: int,
    steps: int,
    steps_per_launch: int | None,
    counters: torch.Tensor,
    form: GridForm,
    options: dict[str, object],
    what: str = "the recurrence",
    one_by_one: bool = True,
) -> bool:
    """All teams through all steps, in as many launches as it takes. Whether it was done.

    arguments: the kernel's, by first step, number of steps and first team. what: runs, in an error. one_by_one: whether
    steps are launched so where not one team runs at once; else that is not done.
    """
    device = counters.device
    most = min(steps, steps_per_launch or steps)
    together = options | {"launch_cooperative_grid": True}
    at_once = _teams_at_once(kernel, arguments(0, steps, 0), form, together, device) if most > 1 else 0
    first_team = 0
    while first_team < teams:
        if at_once == 0:  # no program waits for another
            if most > 1 and not one_by_one:
                return False
            at_once, most, together = teams - first_team, 1, options
        now = min(at_once, teams - first_team)
        try:
            for first_step in range(0, steps, most):
                if first_step and most > 1:
                    counters.zero_()
                grid = form.programs, now, 1
                start(kernel, grid, device, *arguments(first_step, most, first_team), F=form, **together)
        except RuntimeError as error:
            if "cooperative" not in str(error).lower() or most == 1 or first_step:
                raise
            at_once = now // 2  # the device is shared with somebody, or the driver counts otherwise
            continue
        first_team += now
    if os.environ.get("CHARRNN_GRID_DEBUG") == "1" and counters[0, 0].item():
        raise RuntimeError(
            f"{what} across the chip: one of {form.programs} programs waited for the others in vain, "
            f"for {form.most_polls} polls of their counter"
        )
    return True


def new_counters(teams: int, form: GridForm, device: torch.device) -> torch.Tensor:
    return torch.zeros((1 + teams * form.counters, COUNTER_STRIDE.value), dtype=torch.int32, device=device)


class GridLaunch:
    """A kernel of the recurrence across the chip, called as the `Launch` of the kernel of one program is: with the grid
    and the arguments of that one, which are brought into this one's order.

    steps_per_launch: how many steps a launch makes, None for all; 1 lets the programs run in any order. Interpreted it
    is 1 wherever there is more than one program.
    """

    __slots__ = ("form", "kernel", "options", "steps_per_launch")

    def __init__(self, kernel: Any, form: GridForm, options: dict[str, object], steps_per_launch: int | None):
        self.kernel, self.form, self.options, self.steps_per_launch = kernel, form, options, steps_per_launch

    def __call__(self, grid: tuple[int, int, int], device: torch.device, *arguments: Any) -> None:
        """grid: row teams, directions, 1."""
        teams = grid[0] * grid[1]
        counters = new_counters(teams, self.form, device)
        if self.kernel is elman_grid_forward_kernel:  # without weight_ih
            pointers = (*arguments[:4], *arguments[6:14])
            (T, *others), strides = arguments[14:18], arguments[18:]
            sizes, steps = (T, *others), T
        else:  # without the partial sums of W's gradient; the last step gives the gradient of h0
            pointers = arguments[:11]
            (T, B, reverse), strides = arguments[12:15], arguments[15:]
            sizes, steps = (T, B, grid[1], reverse), T + 1

        def of_launch(*launch: int) -> tuple[Any, ...]:
            return *pointers, counters, *sizes, *launch, *strides

        launch_teams(self.kernel, of_launch, teams, steps, self.steps_per_launch, counters, self.form, self.options)


def grid_pass(
    forward: bool,
    tile: GridTile,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    tanh: bool,
    steps_per_launch: int | None = None,
) -> Pass:
    """One of the two kernels with a tile. steps_per_launch: as in `GridLaunch`."""
    kernel = elman_grid_forward_kernel if forward else elman_grid_backward_kernel
    form = GridForm.of(tile, hidden_size, TYPES[dtype], tanh=tanh, ahead=1 if INTERPRETED else tile.ahead)
    options = tile.launch_options(target_of(device)[0])
    forms = form, replace(form, wide=True)
    narrow, wide = (GridLaunch(kernel, each, options, steps_per_launch) for each in forms)
    return Pass(tile.rows, narrow, wide)


def choose_grid_pass(
    forward: bool, hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device, rows: int, tanh: bool
) -> Pass:
    """One of the two kernels for so many rows, also where they are too many to be faster than cuDNN. Raises
    RuntimeError past grid_limits of one row.
    """
    for fewer in (rows, MOST_ROWS, 1):
        tile = choose_grid_tile(hidden_size, dtype, precision, device, fewer)
        if tile is not None:
            return grid_pass(forward, tile, hidden_size, dtype, device, tanh)
    raise RuntimeError(f"elman: {grid_limits(hidden_size, dtype, precision, device, rows)}")

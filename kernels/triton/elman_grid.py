"""Launchers of the recurrence across the chip (elman_grid_kernels.py: the algorithm; elman_grid_tiles.py: the choice).

Arguments and results are those of elman.py's launchers. A launch has no more teams of programs than run at once, by the
driver's own count for the compiled kernel; the others go in launches after it. Where not one team fits, or a driver
refuses after all, the steps are launched one by one, which is slow and asks for nothing of the sort.

With CHARRNN_GRID_DEBUG=1 in the environment every call waits for the device and raises a RuntimeError if a program
waited for the others in vain. Without it such a call ends as well, with NaN for results.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import elman
from .elman_grid_forms import COUNTER_STRIDE, GridForm
from .elman_grid_kernels import elman_grid_backward_kernel, elman_grid_forward_kernel
from .elman_grid_tiles import Chip, GridTile, find_grid_tile, programs_at_once
from .elman_sums import sum_gradients
from .launch import INTERPRETED, KINDS, codes_of, on_device, processors_of, start, target_of
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


@functools.cache
def _form(tile: GridTile, hidden_size: int, dtype: torch.dtype, tanh: bool, wide: bool) -> GridForm:
    return GridForm(
        hidden=hidden_size,
        units=tile.units,
        rows=tile.rows,
        warps=tile.warps,
        dtype=elman._TYPES[dtype],
        mma=tile.form != "fma",
        three=tile.form == "mma3",
        most_chains=tile.chains,
        lanes_k=tile.lanes_k,
        ahead=1 if INTERPRETED else tile.ahead,
        by_part=tile.by_part,
        tanh=tanh,
        wide=wide,
    )


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


def _tile(
    name: str, tile: GridTile | None, hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device, rows
) -> GridTile:
    tile = tile or choose_grid_tile(hidden_size, dtype, precision, device, rows)
    for fewer in (MOST_ROWS, 1):  # too many rows to be faster than cuDNN, and asked for all the same
        tile = tile or choose_grid_tile(hidden_size, dtype, precision, device, fewer)
    if tile is None:
        raise RuntimeError(f"{name}: {grid_limits(hidden_size, dtype, precision, device, rows)}")
    return tile


def _sizes(rows: torch.Tensor, batch_sizes: torch.Tensor | None) -> tuple[int, int]:
    """Steps and batch of time-major or packed rows."""
    if batch_sizes is None:
        return rows.shape[0], rows.shape[1]
    return len(batch_sizes), int(batch_sizes[0]) if len(batch_sizes) else 0


def _of_directions(*groups) -> list[torch.Tensor | None]:
    """Two of each group; the last tensor serves for those that are not there."""
    found: list[torch.Tensor | None] = []
    for tensors in groups:
        found += (None, None) if tensors is None else (tensors[0].contiguous(), tensors[-1].contiguous())
    return found


def _reversed(reverse) -> int:
    """Bit d is set if direction d walks time backwards."""
    return sum(1 << d for d, flag in enumerate(reverse) if flag)


def _row_strides(rows: torch.Tensor | None) -> tuple[int, int]:
    """From step to step and from row to row; packed rows have one for both."""
    return (0, 0) if rows is None else (rows.stride(0), rows.stride(-2))


def _is_wide(rows: int, *tensors: torch.Tensor | None) -> bool:
    """Whether int32 is too small for the offsets inside a tile of so many rows."""
    return any(tensor is not None and rows * tensor.stride(-2) >= 2**31 for tensor in tensors)


def elman_grid_forward(
    x: torch.Tensor,
    weight_hh,
    h0: torch.Tensor | None = None,
    *,
    bias_ih=None,
    bias_hh=None,
    tokens: torch.Tensor | None = None,
    batch_sizes: torch.Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse=(False,),
    out: torch.Tensor | None = None,
    precision: str = "ieee",
    tile: GridTile | None = None,
    steps_per_launch: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As elman.elman_forward with projected input or tokens, W_hh shared out among programs that exchange the state.

    tile: instead of the chosen one. steps_per_launch: how many steps a launch makes, None for all; 1 lets the programs
    run in any order. Interpreted it is 1 wherever there is more than one program.
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past grid_limits.
    """
    D, H = len(weight_hh), weight_hh[0].shape[0]
    dtype, device = x.dtype, x.device
    elman._check(device, x=None if tokens is not None else x, h0=h0, out=out)
    T, B = _sizes(x if tokens is None else tokens, batch_sizes)
    tile = _tile("elman_grid_forward", tile, H, dtype, precision, device, B * D)
    if out is None:
        out = torch.empty((*(x.shape[:-1] if tokens is None else tokens.shape), D * H), dtype=dtype, device=device)
    h_n = torch.empty((D, B, H), dtype=dtype, device=device)
    if T == 0 or B == 0 or H == 0:
        return out, h_n.zero_() if h0 is None else h_n.copy_(h0)

    wide = _is_wide(tile.rows, None if tokens is not None else x, h0, out)
    wide |= tokens is not None and x.shape[0] * x.stride(0) >= 2**31
    teams = -(-B // tile.rows) * D
    form = _form(tile, H, dtype, nonlinearity == "tanh", wide)
    counters = new_counters(teams, form, device)
    pointers = (
        x,
        tokens,
        *_of_directions(weight_hh, bias_ih, bias_hh),
        h0,
        None if batch_sizes is None else elman._steps_table(batch_sizes, device),
        out,
        h_n,
        counters,
    )
    strides = (
        *((*_row_strides(x), 1) if tokens is None else (x.stride(0), 0, x.stride(1))),
        *((0, 0) if tokens is None else (tokens.stride(0), tokens.stride(-1))),
        *(h0.stride()[:2] if h0 is not None else (0, 0)),
        *_row_strides(out),
    )
    sizes = (T, B, x.shape[0], _reversed(reverse))
    launch_teams(
        elman_grid_forward_kernel,
        lambda *launch: (*pointers, *sizes, *launch, *strides),
        teams,
        T,
        steps_per_launch,
        counters,
        form,
        tile.launch_options(target_of(device)[0]),
    )
    return out, h_n


def elman_grid_backward(
    grad_out: torch.Tensor | None,
    grad_h_n: torch.Tensor | None,
    out: torch.Tensor,
    weight_hh,
    h0: torch.Tensor | None = None,
    *,
    tokens: torch.Tensor | None = None,
    num_tokens: int | None = None,
    batch_sizes: torch.Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse=(False,),
    need_weight_grad: bool = True,
    need_bias_grad: bool = True,
    precision: str = "ieee",
    tile: GridTile | None = None,
    steps_per_launch: int | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, torch.Tensor, torch.Tensor | None]:
    """As elman.elman_backward, W_hh shared out among programs that exchange d_t; grad_W by a matrix product afterwards.

    tile, steps_per_launch: as in elman_grid_forward.
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past grid_limits.
    """
    D, H = len(weight_hh), weight_hh[0].shape[0]
    dtype, device = out.dtype, out.device
    elman._check(device, grad_out=grad_out, grad_h_n=grad_h_n, h0=h0)
    if tokens is not None and num_tokens is None:
        raise ValueError("num_tokens: expected the rows of the table with tokens, got None")
    out = out.contiguous()  # grad_x has its strides, which the kernel counts on
    V = num_tokens or 0
    T, B = _sizes(out, batch_sizes)
    tile = _tile("elman_grid_backward", tile, H, dtype, precision, device, B * D)
    grad_h0 = torch.empty((D, B, H), dtype=dtype, device=device)
    if T == 0 or B == 0 or H == 0:
        grad_x = torch.zeros_like(out) if tokens is None else out.new_zeros((V, D * H))
        zeros = tuple(torch.zeros_like(w) for w in weight_hh) if need_weight_grad else None
        grad_bias = out.new_zeros(D * H) if need_bias_grad else None
        return grad_x, zeros, grad_h0.zero_() if grad_h_n is None else grad_h0.copy_(grad_h_n), grad_bias

    grad_x = torch.empty_like(out)
    row_teams = -(-B // tile.rows)
    acc_type = torch.float64 if dtype == torch.float64 else torch.float32
    h_prev = torch.empty_like(grad_x) if need_weight_grad and batch_sizes is not None else None
    partial_bias = torch.empty((row_teams, D * H), dtype=acc_type, device=device)
    wide = _is_wide(tile.rows, grad_out, grad_h_n, out, h0)
    form = _form(tile, H, dtype, nonlinearity == "tanh", wide)
    counters = new_counters(row_teams * D, form, device)
    pointers = (
        grad_out,
        grad_h_n,
        out,
        *_of_directions(weight_hh),
        h0,
        None if batch_sizes is None else elman._steps_table(batch_sizes, device),
        grad_x,
        h_prev,
        grad_h0,
        partial_bias,
        counters,
    )
    strides = (
        *_row_strides(grad_out),
        *(grad_h_n.stride()[:2] if grad_h_n is not None else (0, 0)),
        *_row_strides(out),
        *(h0.stride()[:2] if h0 is not None else (0, 0)),
    )
    sizes = (T, B, D, _reversed(reverse))
    launch_teams(
        elman_grid_backward_kernel,
        lambda *launch: (*pointers, *sizes, *launch, *strides),
        row_teams * D,
        T + 1,
        steps_per_launch,
        counters,
        form,
        tile.launch_options(target_of(device)[0]),
    )
    grad_x, grad_weight, grad_bias = sum_gradients(
        grad_x,
        out,
        h0,
        h_prev,
        partial_bias,
        None,
        tokens=tokens,
        num_tokens=V,
        reverse=reverse,
        need_weight_grad=need_weight_grad,
        need_bias_grad=need_bias_grad,
    )
    return grad_x, grad_weight, grad_h0, grad_bias

"""How a program of the recurrence walks time: where its steps lie, how its input, ids and tiles are loaded.

Shared by the kernels of one program (elman_kernels.py) and of a grid (elman_grid_kernels.py). Row b of step t lies at
p_t * stride_t + b * stride_b. p_t is t itself and B rows are active, or, with packed input, p_t is steps_ptr[t], the
packed rows before step t, and steps_ptr[T + t] are active. F, here, is any form with the fields that are used: hidden,
acc, shape, tile, ahead and wide. Imports Triton alone.
"""

from typing import NamedTuple

import triton.language as tl

from .elman_forms import zero_tile
from .gluon_interpreter import device_function, gl


class Walk(NamedTuple):
    """A program's steps: those in which its first row is active. The last three fields are what `begin_walk` finds."""

    steps_ptr: tl.tensor  # (2, T), or None
    T: tl.tensor
    B: tl.tensor
    first_row: tl.tensor
    steps: tl.tensor  # their number
    start: tl.tensor  # position of the first one
    way: tl.tensor  # to the next


@device_function
def begin_walk(steps_ptr, T, first_row, backwards):
    """A program's walk. Batch sizes do not increase, so its steps are the first ones, and bisection counts them.

    What there is before it, of which some may be None, a caller puts to it: Triton 3.6 returns no None.
    """
    steps = T
    if steps_ptr is not None:
        low = T * 0
        while low < steps:
            middle = (low + steps) // 2
            if gl.load(steps_ptr + T + middle) > first_row:
                low = middle + 1
            else:
                steps = middle
    return steps, (backwards * (steps - 1)).to(gl.int64), (1 - 2 * backwards).to(gl.int64)


@device_function
def place_of(walk, i, inside):
    """Position of step number i of the walk, and rows from the first on that are active: none unless it is `inside`."""
    t = walk.start + i * walk.way
    if walk.steps_ptr is None:
        return t, gl.where(inside, walk.B - walk.first_row, 0)
    else:
        active = gl.load(walk.steps_ptr + walk.T + t, mask=inside, other=0).to(gl.int32)
        return gl.load(walk.steps_ptr + t, mask=inside, other=0), active - walk.first_row


@device_function
def places_of(walk, i, LENGTH: tl.constexpr):
    """The same of so many steps, from number i of the walk on: a tuple of positions and one of active rows."""
    positions = ()
    actives = ()
    for k in gl.static_range(LENGTH):
        position, active = place_of(walk, i + k, i + k < walk.steps)
        positions = positions + (position,)
        actives = actives + (active,)
    return positions, actives


@device_function
def load_tile(ptr, places, k, stride_t, offs, rows, in_width, F: tl.constexpr):
    """State tile of step k of a group, zero where a row is not active or there is no tensor."""
    if ptr is None:
        return zero_tile(F)
    else:
        mask = (rows < places[1][k]) & in_width
        return gl.load(ptr + places[0][k] * stride_t + offs, mask=mask, other=0.0)


@device_function
def load_tiles(ptr, places, stride_t, offs, rows, in_width, F: tl.constexpr):
    """State tiles of a group of steps."""
    AHEAD: tl.constexpr = F.ahead
    tiles = ()
    for k in gl.static_range(AHEAD):
        tiles = tiles + (load_tile(ptr, places, k, stride_t, offs, rows, in_width, F),)
    return tiles


@device_function
def load_ids(tokens_ptr, places, LENGTH: tl.constexpr, stride_t, offs, rows):
    """Token ids of so many steps, -1 where a row is not active; an empty tuple without tokens."""
    positions, actives = places
    ids = ()
    if tokens_ptr is not None:
        for k in gl.static_range(LENGTH):
            ids = ids + (gl.load(tokens_ptr + positions[k] * stride_t + offs, mask=rows < actives[k], other=-1),)
    return ids


@device_function
def load_input(x_ptr, tokens_ptr, ids, places, k, V, stride_t, offs, rows, in_width, F: tl.constexpr):
    """Input tile of step k of a group; with tokens the rows `ids` of the table, zero for an id outside it."""
    if tokens_ptr is None:
        return load_tile(x_ptr, places, k, stride_t, offs, rows, in_width, F)
    else:
        known = (ids[k] >= 0) & (ids[k] < V)
        row = ids[k].to(gl.int64 if F.wide else gl.int32) * stride_t
        return gl.load(x_ptr + row + offs, mask=known & in_width, other=0.0)


@device_function
def of_direction(ptr, reverse_ptr, pid_d):
    """Of two directions' tensors this program's."""
    if pid_d == 1:
        ptr = reverse_ptr
    return ptr


@device_function
def load_bias(bias_ptr, bias_reverse_ptr, pid_d, units, F: tl.constexpr):
    """(H,) of this program's direction, shaped to broadcast over rows; zero without one."""
    if bias_ptr is None:
        return 0.0
    else:
        ptr = of_direction(bias_ptr, bias_reverse_ptr, pid_d)
        return gl.load(ptr + units, mask=units < F.hidden, other=0.0).to(F.acc)


@device_function
def load_state(ptr, pid_d, first_row, strides, rows, units, mask, F: tl.constexpr):
    """State tile of this program's rows and direction of a (D, B, H); zero outside the mask or where there is none."""
    if ptr is None:
        return zero_tile(F)
    else:
        ptr += pid_d.to(gl.int64) * strides[0] + first_row.to(gl.int64) * strides[1]
        return gl.load(ptr + rows * strides[1] + units, mask=mask, other=0.0)

"""The Elman recurrence with W_hh across the chip, in Gluon. Imports Triton alone.

    forward    pre_t = x_t + b + h_{t-1} @ W^T      h_t = tanh(pre_t) or relu(pre_t)
    backward   d_t = (g_t + c_t) * f'(h_t)          c_{t-1} = d_t @ W        grad_W = sum_t d_t^T @ h_{t-1}

For hidden sizes whose W no program can hold. A team of programs has some rows of the batch in one direction, each
program some units of them, with its rows of W (of W^T, backward) in registers; elman_grid_forms.py says how. All walk
time together. A step of a program: it waits until all of the team have counted the step before in, loads the whole
state of that, multiplies it with its part of W, and applies, stores and counts in its own units. What is exchanged is
the result itself: h_t in `out`, d_t in `grad_x`. Input is loaded `ahead` steps before it is needed, while the program
would wait; with packed input the positions of steps three times as many, token ids twice as many.

Counters make it right only if all programs of a launch run at once, which the launcher sees to. A launch makes
`num_steps` steps of the walk from number `first_step` on; where that is one, no program has anything to wait for, and
they may run one after another. Teams are numbered by direction, then by rows; a launch begins with `first_team`.

Rows, offsets, masks and pointers that are None are as in elman_kernels.py.
"""

import triton.language as tl

from .elman_forms import tile_rows, tile_units, zero_tile
from .elman_grid_forms import (
    COUNTER_STRIDE,
    announce,
    load_weight,
    part_counters,
    product,
    state_places,
    wait,
)
from .elman_walk import (
    Walk,
    begin_walk,
    load_bias,
    load_ids,
    load_input,
    load_state,
    load_tile,
    of_direction,
    place_of,
    places_of,
)
from .gluon_interpreter import device_function, gl, jit
from .numerics import activation, activation_backward, cast


@device_function
def _team(first_team, B, F: tl.constexpr):
    """Number of this program's team, its direction and its first row."""
    rows_teams = (B + F.rows - 1) // F.rows
    team = first_team + gl.program_id(1)
    return team, team // rows_teams, team % rows_teams * F.rows


@device_function
def _advance(places, walk, i, LENGTH: tl.constexpr):
    """Places of steps i, ...; packed, where they are loaded, all but the last of them from those of i - 1, ..."""
    if walk.steps_ptr is None:
        return places_of(walk, i, LENGTH)
    else:
        last = i + LENGTH - 1
        position, active = place_of(walk, last, last < walk.steps)
        return places[0][1:] + (position,), places[1][1:] + (active,)


@jit(do_not_specialize=["T", "B", "V", "reverse", "first_step", "num_steps", "first_team"])
def elman_grid_forward_kernel(
    # pointers
    x_ptr,  # (T, B, D*H) or packed (N, D*H), projected input; with tokens (V, D*H), the table
    tokens_ptr,  # (T, B) or packed (N,) int32 or int64, token ids, or None
    weight_ptr,  # (H, H) contiguous, recurrent weight of direction 0
    weight_reverse_ptr,  # (H, H) contiguous, recurrent weight of direction 1
    bias_ih_ptr,  # (H,) of direction 0, added to every input, or None
    bias_ih_reverse_ptr,
    bias_hh_ptr,  # (H,) of direction 0, added as well, or None
    bias_hh_reverse_ptr,
    h0_ptr,  # (D, B, H), first states, or None
    steps_ptr,  # (2, T) int64, packed rows before each step and active rows in it, or None
    out_ptr,  # (T, B, D*H) or packed (N, D*H), hidden states; may be x_ptr
    h_n_ptr,  # (D, B, H) contiguous, last states; of the launch before, where first_step is not 0
    counters_ptr,  # (1 + teams * F.counters, COUNTER_STRIDE) int32, zero: whether a wait was in vain, counters
    # sizes
    T,
    B,
    V,
    reverse,  # bit d is set if direction d walks time backwards
    first_step,
    num_steps,
    first_team,
    # strides
    stride_x_t,  # of a table: from id to id
    stride_x_b,
    stride_x_h,
    stride_tokens_t,
    stride_tokens_b,
    stride_h0_d,
    stride_h0_b,
    stride_out_t,
    stride_out_b,
    F: tl.constexpr,  # elman_grid_forms.GridForm
):
    AHEAD: tl.constexpr = F.ahead
    LENGTH: tl.constexpr = 3 * F.ahead
    team, pid_d, first_row = _team(first_team, B, F)
    first_unit = gl.program_id(0) * F.units
    rows, units = tile_rows(F), first_unit + tile_units(F)
    in_width = units < F.hidden
    state_k, state_rows = state_places(F)
    w = load_weight(of_direction(weight_ptr, weight_reverse_ptr, pid_d), first_unit, False, F)
    bias = load_bias(bias_ih_ptr, bias_ih_reverse_ptr, pid_d, units, F)
    bias += load_bias(bias_hh_ptr, bias_hh_reverse_ptr, pid_d, units, F)

    x_ptr += pid_d * F.hidden * stride_x_h
    offs_x = units * stride_x_h
    if tokens_ptr is None:
        x_ptr += first_row.to(gl.int64) * stride_x_b
        offs_x += rows * stride_x_b
    else:
        tokens_ptr += first_row.to(gl.int64) * stride_tokens_b
    offs_tokens = rows * stride_tokens_b
    out_ptr += pid_d * F.hidden + first_row.to(gl.int64) * stride_out_b
    offs_out = rows * stride_out_b + units
    h_n_ptr += (pid_d.to(gl.int64) * B + first_row) * F.hidden
    offs_h_n = rows * F.hidden + units
    in_batch = (rows < B - first_row) & in_width
    late_ptr = counters_ptr
    counters_ptr += (1 + team * F.counters) * COUNTER_STRIDE
    part_ptr, part_programs = part_counters(counters_ptr, F)
    buffer = gl.allocate_shared_memory(F.acc, F.sums_shape, F.shared)

    steps, begin, way = begin_walk(steps_ptr, T, first_row, (reverse >> pid_d) & 1)
    walk = Walk(steps_ptr, T, B, first_row, steps, begin, way)
    first = gl.minimum(first_step, walk.steps)
    last = gl.minimum(first_step + num_steps, walk.steps)
    # The state before the first step: of the step before in `out`; h0 in rows that had none, all where the walk begins.
    before, before_active = place_of(walk, first - 1, first > 0)
    continued = gl.where(first_step > 0, B - first_row, 0)
    h = gl.load(h_n_ptr + offs_h_n, mask=(rows < continued) & in_width, other=0.0).to(F.acc)
    state_ptr = out_ptr + state_rows * stride_out_b
    if h0_ptr is not None:
        h0_ptr += pid_d.to(gl.int64) * stride_h0_d + first_row.to(gl.int64) * stride_h0_b
        h += gl.load(h0_ptr + rows * stride_h0_b + units, mask=in_batch & (rows >= continued), other=0.0).to(F.acc)
        rows_ptr = gl.where(
            state_rows < before_active, state_ptr + before * stride_out_t, h0_ptr + state_rows * stride_h0_b
        )
        limit = B - first_row
    else:
        rows_ptr = state_ptr + before * stride_out_t
        limit = before_active

    places = places_of(walk, first, LENGTH)
    ids = load_ids(tokens_ptr, places, 2 * AHEAD, stride_tokens_t, offs_tokens, rows)
    x = ()
    for k in gl.static_range(AHEAD):
        x = x + (load_input(x_ptr, tokens_ptr, ids, places, k, V, stride_x_t, offs_x, rows, in_width, F),)
    late = part_programs < 0
    for i in range(first, last):
        late = wait(part_ptr, (i - first) * part_programs, late, F)
        pre = product(w, rows_ptr, state_k, state_rows < limit, late, buffer, F) + (x[0].to(F.acc) + bias)
        new = activation(pre, F.tanh)
        position, active = places[0][0], places[1][0]
        mask = (rows < active) & in_width
        gl.store(out_ptr + position * stride_out_t + offs_out, cast(new, F.dtype), mask=mask)
        announce(counters_ptr, first_unit, F)
        h = gl.where(mask, new, h)
        tile = load_input(x_ptr, tokens_ptr, ids, places, AHEAD, V, stride_x_t, offs_x, rows, in_width, F)
        x = x[1:] + (tile,)
        if tokens_ptr is not None:
            mask = rows < places[1][2 * AHEAD]
            offs = places[0][2 * AHEAD] * stride_tokens_t + offs_tokens
            ids = ids[1:] + (gl.load(tokens_ptr + offs, mask=mask, other=-1),)
        places = _advance(places, walk, i + 1, LENGTH)
        rows_ptr = state_ptr + position * stride_out_t
        if steps_ptr is not None and h0_ptr is not None:
            # Packed and backwards, rows join in later steps.
            rows_ptr = gl.where(state_rows < active, rows_ptr, h0_ptr + state_rows * stride_h0_b)
            limit = places[1][0]
        else:
            limit = active

    gl.store(h_n_ptr + offs_h_n, cast(h, F.dtype), mask=in_batch)
    gl.store(late_ptr + late.to(gl.int32) * 0, 1, mask=late)


@jit(do_not_specialize=["T", "B", "D", "reverse", "first_step", "num_steps", "first_team"])
def elman_grid_backward_kernel(
    # pointers
    grad_out_ptr,  # (T, B, D*H) or packed (N, D*H), or None
    grad_h_n_ptr,  # (D, B, H), or None
    out_ptr,  # (T, B, D*H) or packed (N, D*H), hidden states of the forward pass
    weight_ptr,  # (H, H) contiguous, recurrent weight of direction 0
    weight_reverse_ptr,  # (H, H) contiguous, recurrent weight of direction 1
    h0_ptr,  # (D, B, H), first states, or None
    steps_ptr,  # (2, T) int64, packed rows before each step and active rows in it, or None
    grad_x_ptr,  # like out, strides too: gradient of pre_t
    h_prev_ptr,  # like out, strides too: h_{t-1}, for a weight gradient outside, or None
    grad_h0_ptr,  # (D, B, H) contiguous; of the launch before, where first_step is not 0
    partial_bias_ptr,  # (teams of a direction, D, H) fp32 or fp64, sum of a team's d_t; of the launch before likewise
    counters_ptr,  # (1 + teams * F.counters, COUNTER_STRIDE) int32, zero: whether a wait was in vain, counters
    # sizes
    T,
    B,
    D,
    reverse,  # bit d is set if direction d walked time backwards
    first_step,
    num_steps,  # of T + 1: the last one gives the gradient of h0
    first_team,
    # strides
    stride_grad_out_t,
    stride_grad_out_b,
    stride_grad_h_n_d,
    stride_grad_h_n_b,
    stride_out_t,
    stride_out_b,
    stride_h0_d,
    stride_h0_b,
    F: tl.constexpr,  # elman_grid_forms.GridForm
):
    AHEAD: tl.constexpr = F.ahead
    LENGTH: tl.constexpr = 2 * F.ahead + 1
    team, pid_d, first_row = _team(first_team, B, F)
    first_unit = gl.program_id(0) * F.units
    rows, units = tile_rows(F), first_unit + tile_units(F)
    in_width = units < F.hidden
    state_k, state_rows = state_places(F)
    w = load_weight(of_direction(weight_ptr, weight_reverse_ptr, pid_d), first_unit, True, F)

    start = pid_d * F.hidden + first_row.to(gl.int64) * stride_out_b
    offs_out = rows * stride_out_b + units
    out_ptr += start
    grad_x_ptr += start
    if h_prev_ptr is not None:
        h_prev_ptr += start
    offs_grad_out = rows * stride_grad_out_b + units
    if grad_out_ptr is not None:
        grad_out_ptr += pid_d * F.hidden + first_row.to(gl.int64) * stride_grad_out_b
    grad_h0_ptr += (pid_d.to(gl.int64) * B + first_row) * F.hidden
    offs_grad_h0 = rows * F.hidden + units
    in_batch = (rows < B - first_row) & in_width
    # What is carried: of the last launch, or the gradient of the last states.
    continued = gl.where(first_step > 0, B - first_row, 0)
    carry = gl.load(grad_h0_ptr + offs_grad_h0, mask=(rows < continued) & in_width, other=0.0).to(F.acc)
    if grad_h_n_ptr is not None:
        grad_h_n_ptr += pid_d.to(gl.int64) * stride_grad_h_n_d + first_row.to(gl.int64) * stride_grad_h_n_b
        mask = in_batch & (rows >= continued)
        carry += gl.load(grad_h_n_ptr + rows * stride_grad_h_n_b + units, mask=mask, other=0.0).to(F.acc)
    h0 = load_state(h0_ptr, pid_d, first_row, (stride_h0_d, stride_h0_b), rows, units, in_batch, F)
    late_ptr = counters_ptr
    counters_ptr += (1 + team * F.counters) * COUNTER_STRIDE
    part_ptr, part_programs = part_counters(counters_ptr, F)
    buffer = gl.allocate_shared_memory(F.acc, F.sums_shape, F.shared)
    grad_bias = zero_tile(F)

    # The walk of the forward pass, from its end, and one step more, which has a product alone.
    steps, begin, way = begin_walk(steps_ptr, T, first_row, 1 - ((reverse >> pid_d) & 1))
    walk = Walk(steps_ptr, T, B, first_row, steps, begin, way)
    first = gl.minimum(first_step, walk.steps + 1)
    last = gl.minimum(first_step + num_steps, walk.steps + 1)
    before, before_active = place_of(walk, first - 1, first > 0)
    state_ptr = grad_x_ptr + state_rows * stride_out_b
    places = places_of(walk, first, LENGTH)
    h = ()
    grad = ()
    for k in gl.static_range(AHEAD):
        h = h + (load_tile(out_ptr, places, k, stride_out_t, offs_out, rows, in_width, F),)
        grad = grad + (load_tile(grad_out_ptr, places, k, stride_grad_out_t, offs_grad_out, rows, in_width, F),)
    late = part_programs < 0
    for i in range(first, last):
        late = wait(part_ptr, (i - first) * part_programs, late, F)
        rows_ptr = state_ptr + before * stride_out_t
        new = product(w, rows_ptr, state_k, state_rows < before_active, late, buffer, F)
        carry = gl.where(rows < before_active, new, carry)
        position, active = places[0][0], places[1][0]
        mask = (rows < active) & in_width
        d = activation_backward(grad[0].to(F.acc) + carry, h[0].to(F.acc), F.tanh)
        d = gl.where(mask, d, 0.0)
        offs = position * stride_out_t + offs_out
        gl.store(grad_x_ptr + offs, cast(d, F.dtype), mask=mask)
        announce(counters_ptr, first_unit, F)
        grad_bias += d
        tile = load_tile(grad_out_ptr, places, AHEAD, stride_grad_out_t, offs_grad_out, rows, in_width, F)
        grad = grad[1:] + (tile,)
        h = h[1:] + (load_tile(out_ptr, places, AHEAD, stride_out_t, offs_out, rows, in_width, F),)
        if h_prev_ptr is not None:
            # The state before a step is that of the next one of this walk; h0 where a row has no earlier step: all rows
            # at the walk's end, and, where a reverse walk began with few rows, those that joined in this step.
            h_prev = h[0]
            if h0_ptr is not None:
                h_prev = gl.where(rows < places[1][1], h_prev, h0)
            gl.store(h_prev_ptr + offs, h_prev, mask=mask)
        places = _advance(places, walk, i + 1, LENGTH)
        before, before_active = position, active

    gl.store(grad_h0_ptr + offs_grad_h0, cast(carry, F.dtype), mask=in_batch)
    row = (first_row // F.rows).to(gl.int64) * D + pid_d
    own = first_unit + gl.arange(0, F.units, layout=gl.SliceLayout(1, F.tile))
    partial_bias_ptr += row * F.hidden + own
    earlier = gl.load(partial_bias_ptr, mask=own < gl.where(first_step > 0, F.hidden, 0), other=0.0)
    gl.store(partial_bias_ptr, earlier + gl.sum(grad_bias, axis=1), mask=own < F.hidden)
    gl.store(late_ptr + late.to(gl.int32) * 0, 1, mask=late)

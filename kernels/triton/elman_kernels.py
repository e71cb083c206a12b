"""The Elman recurrence with the time loop inside one program, in Gluon. Imports Triton alone.

    forward    pre_t = x_t + b + h_{t-1} @ W^T      h_t = tanh(pre_t) or relu(pre_t)
    backward   d_t = (g_t + c_t) * f'(h_t)          c_{t-1} = d_t @ W        grad_W = sum_t d_t^T @ h_{t-1}

A program owns some rows of the batch in one direction, reads W once into registers and walks time; elman_forms.py says
how the product is laid out. A step is: product, activation, state to shared memory, store; one barrier. Memory answers
later than a step takes, so steps go by groups of `ahead`, and as soon as a step has taken its input, that of the same
step of the next group is loaded in its place. With packed input the positions are loaded three groups ahead, and token
ids, whose addresses depend on them, two.

With `inputs` the forward kernel gets features and makes their product with W_ih itself: features reach shared memory
two steps before they are needed, behind the barriers that are there anyway, and their product is made one step before,
beside that of the state, which does not wait for it.

elman_walk.py says where the rows of a step lie. A row that is not active keeps its state; past the last step, where the
last group is not full, none is. Where a program's rows and steps begin is computed in int64; inside a tile int32 is
enough and costs half the registers, unless the launcher finds rows so far apart that the form is `wide`. A pointer that
is None stands for input that is not there.
"""

import triton.language as tl

from .elman_forms import (
    feature_rows,
    features,
    fma_product,
    load_input_weight,
    load_weight,
    product,
    product_and_outer,
    state_buffers,
    store_outer,
    store_row_sums,
    tile_rows,
    tile_units,
    zero_outer,
    zero_tile,
)
from .elman_walk import (
    Walk,
    begin_walk,
    load_bias,
    load_ids,
    load_input,
    load_state,
    load_tile,
    load_tiles,
    of_direction,
    places_of,
)
from .gluon_interpreter import gl, jit
from .numerics import activation, activation_backward, cast


@jit(do_not_specialize=["T", "B", "V", "reverse"])
def elman_forward_kernel(
    # pointers
    x_ptr,  # (T, B, D*H) or packed (N, D*H), projected input; with tokens (V, D*H), the table; features (T, B, I)
    tokens_ptr,  # (T, B) or packed (N,) int32 or int64, token ids, or None
    weight_ptr,  # (H, H) contiguous, recurrent weight of direction 0
    weight_reverse_ptr,  # (H, H) contiguous, recurrent weight of direction 1
    weight_ih_ptr,  # (H, I) contiguous, input weight of direction 0, or None
    weight_ih_reverse_ptr,
    bias_ih_ptr,  # (H,) of direction 0, added to every input, or None
    bias_ih_reverse_ptr,
    bias_hh_ptr,  # (H,) of direction 0, added as well, or None
    bias_hh_reverse_ptr,
    h0_ptr,  # (D, B, H), first states, or None
    steps_ptr,  # (2, T) int64, packed rows before each step and active rows in it, or None
    out_ptr,  # (T, B, D*H) or packed (N, D*H), hidden states; may be x_ptr
    h_n_ptr,  # (D, B, H) contiguous, last states
    # sizes
    T,
    B,
    V,
    reverse,  # bit d is set if direction d walks time backwards
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
    F: tl.constexpr,  # elman_forms.Form
):
    AHEAD: tl.constexpr = F.ahead
    pid_d = gl.program_id(1)
    first_row = gl.program_id(0) * F.rows
    rows, units = tile_rows(F), tile_units(F)
    in_width = units < F.hidden
    w = load_weight(of_direction(weight_ptr, weight_reverse_ptr, pid_d), False, F)
    bias = load_bias(bias_ih_ptr, bias_ih_reverse_ptr, pid_d, units, F)
    bias += load_bias(bias_hh_ptr, bias_hh_reverse_ptr, pid_d, units, F)

    if weight_ih_ptr is not None:
        w_ih = load_input_weight(of_direction(weight_ih_ptr, weight_ih_reverse_ptr, pid_d), False, F)
        rows_x, columns_x = feature_rows(F), features(F)
        in_width_x = columns_x < F.inputs
        even = gl.allocate_shared_memory(F.acc, F.input_shape, F.shared)
        odd = gl.allocate_shared_memory(F.acc, F.input_shape, F.shared)
        inputs = (even, odd)
    else:
        x_ptr += pid_d * F.hidden * stride_x_h
        rows_x, columns_x, in_width_x = rows, units, in_width
    offs_x = columns_x * stride_x_h
    if tokens_ptr is None:
        x_ptr += first_row.to(gl.int64) * stride_x_b
        offs_x += rows_x * stride_x_b
    else:
        tokens_ptr += first_row.to(gl.int64) * stride_tokens_b
    offs_tokens = rows * stride_tokens_b
    out_ptr += pid_d * F.hidden + first_row.to(gl.int64) * stride_out_b
    offs_out = rows * stride_out_b + units
    in_batch = (rows < B - first_row) & in_width
    h = load_state(h0_ptr, pid_d, first_row, (stride_h0_d, stride_h0_b), rows, units, in_batch, F).to(F.acc)
    states = state_buffers(F)
    states[0].store(cast(h, F.operand))

    steps, begin, way = begin_walk(steps_ptr, T, first_row, (reverse >> pid_d) & 1)
    walk = Walk(steps_ptr, T, B, first_row, steps, begin, way)
    places = places_of(walk, 0, AHEAD)
    following = places_of(walk, AHEAD, AHEAD)
    if steps_ptr is not None:
        third = places_of(walk, 2 * AHEAD, AHEAD)
    ids = load_ids(tokens_ptr, places, AHEAD, stride_tokens_t, offs_tokens, rows)
    x = ()
    for k in gl.static_range(AHEAD):
        x = x + (load_input(x_ptr, tokens_ptr, ids, places, k, V, stride_x_t, offs_x, rows_x, in_width_x, F),)
    if weight_ih_ptr is not None:
        inputs[0].store(x[0].to(F.acc))
        projected = fma_product(inputs[0], w_ih, F)
        # So that what the loop begins with waits for is what it waits for when it repeats.
        inputs[1].store(x[1].to(F.acc))
    ids = load_ids(tokens_ptr, following, AHEAD, stride_tokens_t, offs_tokens, rows)
    for i in range(0, walk.steps, AHEAD):
        if steps_ptr is None:
            places = places_of(walk, i, AHEAD)
            following = places_of(walk, i + AHEAD, AHEAD)
            third = places_of(walk, i + 2 * AHEAD, AHEAD)
        ids_next = load_ids(tokens_ptr, third, AHEAD, stride_tokens_t, offs_tokens, rows)
        x_next = ()
        for k in gl.static_range(AHEAD):
            tile = load_input(x_ptr, tokens_ptr, ids, following, k, V, stride_x_t, offs_x, rows_x, in_width_x, F)
            x_next = x_next + (tile,)
            if weight_ih_ptr is None:
                added = x[k].to(F.acc) + bias
            else:
                added = projected + bias
                if k + 2 < AHEAD:
                    later = x[k + 2]
                else:
                    later = x_next[k + 2 - AHEAD]
                projected = fma_product(inputs[1 - k % 2], w_ih, F)
                inputs[k % 2].store(later.to(F.acc))
            pre = product(states[k % 2], w, added, F)
            mask = (rows < places[1][k]) & in_width
            h = gl.where(mask, activation(pre, F.tanh), h)
            states[1 - k % 2].store(cast(h, F.operand))
            gl.store(out_ptr + places[0][k] * stride_out_t + offs_out, cast(h, F.dtype), mask=mask)
        x, ids = x_next, ids_next
        if steps_ptr is not None:
            places, following = following, third
            third = places_of(walk, i + 3 * AHEAD, AHEAD)

    h_n_ptr += (pid_d.to(gl.int64) * B + first_row) * F.hidden
    gl.store(h_n_ptr + rows * F.hidden + units, cast(h, F.dtype), mask=in_batch)


@jit(do_not_specialize=["T", "B", "reverse"])
def elman_backward_kernel(
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
    grad_h0_ptr,  # (D, B, H) contiguous
    partial_bias_ptr,  # (programs over B, D, H) fp32 or fp64, sum of a program's d_t
    partial_weight_ptr,  # (programs over B, D, H, H) fp32 or fp64, grad_W of a program's rows, or None
    # sizes
    T,
    B,
    reverse,  # bit d is set if direction d walked time backwards
    # strides
    stride_grad_out_t,
    stride_grad_out_b,
    stride_grad_h_n_d,
    stride_grad_h_n_b,
    stride_out_t,
    stride_out_b,
    stride_h0_d,
    stride_h0_b,
    F: tl.constexpr,  # elman_forms.Form
):
    AHEAD: tl.constexpr = F.ahead
    pid_d = gl.program_id(1)
    first_row = gl.program_id(0) * F.rows
    rows, units = tile_rows(F), tile_units(F)
    in_width = units < F.hidden
    w = load_weight(of_direction(weight_ptr, weight_reverse_ptr, pid_d), True, F)
    grad_bias = zero_tile(F)
    if partial_weight_ptr is not None:
        outer = zero_outer(F.pieces, F)

    start = pid_d * F.hidden + first_row.to(gl.int64) * stride_out_b
    offs_out = rows * stride_out_b + units
    out_ptr += start
    grad_x_ptr += start
    if h_prev_ptr is not None:
        h_prev_ptr += start
    if grad_out_ptr is not None:
        grad_out_ptr += pid_d * F.hidden + first_row.to(gl.int64) * stride_grad_out_b
    offs_grad_out = rows * stride_grad_out_b + units
    in_batch = (rows < B - first_row) & in_width
    strides = (stride_grad_h_n_d, stride_grad_h_n_b)
    carry = load_state(grad_h_n_ptr, pid_d, first_row, strides, rows, units, in_batch, F).to(F.acc)
    h0 = load_state(h0_ptr, pid_d, first_row, (stride_h0_d, stride_h0_b), rows, units, in_batch, F)
    gradients = state_buffers(F)

    # The walk of the forward pass, from its end.
    steps, begin, way = begin_walk(steps_ptr, T, first_row, 1 - ((reverse >> pid_d) & 1))
    walk = Walk(steps_ptr, T, B, first_row, steps, begin, way)
    places = places_of(walk, 0, AHEAD)
    following = places_of(walk, AHEAD, AHEAD)
    h = load_tiles(out_ptr, places, stride_out_t, offs_out, rows, in_width, F)
    grad = load_tiles(grad_out_ptr, places, stride_grad_out_t, offs_grad_out, rows, in_width, F)
    for i in range(0, walk.steps, AHEAD):
        if steps_ptr is None:
            places = places_of(walk, i, AHEAD)
            following = places_of(walk, i + AHEAD, AHEAD)
        # The state before step k is that of step k + 1 of this walk; h0 where a row has no earlier step: all rows at
        # the walk's end, and, where a reverse walk began with few rows, those that joined in this step.
        active_earlier = places[1] + following[1]
        h_next = ()
        grad_next = ()
        for k in gl.static_range(AHEAD):
            mask = (rows < places[1][k]) & in_width
            d = activation_backward(grad[k].to(F.acc) + carry, h[k].to(F.acc), F.tanh)
            h_next = h_next + (load_tile(out_ptr, following, k, stride_out_t, offs_out, rows, in_width, F),)
            tile = load_tile(grad_out_ptr, following, k, stride_grad_out_t, offs_grad_out, rows, in_width, F)
            grad_next = grad_next + (tile,)
            d = gl.where(mask, d, 0.0)
            gradients[k % 2].store(cast(d, F.operand))
            offs = places[0][k] * stride_out_t + offs_out
            gl.store(grad_x_ptr + offs, cast(d, F.dtype), mask=mask)
            if k + 1 < AHEAD:
                h_prev = h[k + 1]
            else:
                h_prev = h_next[0]
            if h0_ptr is not None:
                h_prev = gl.where(rows < active_earlier[k + 1], h_prev, h0)
            if h_prev_ptr is not None:
                gl.store(h_prev_ptr + offs, h_prev, mask=mask)
            grad_bias += d
            if partial_weight_ptr is not None:
                new, outer = product_and_outer(gradients[k % 2], w[0], outer, h_prev.to(F.acc), F)
            else:
                new = product(gradients[k % 2], w, None, F)
            carry = gl.where(rows < places[1][k], new, carry)
        h, grad = h_next, grad_next
        if steps_ptr is not None:
            places = following
            following = places_of(walk, i + 2 * AHEAD, AHEAD)

    grad_h0_ptr += (pid_d.to(gl.int64) * B + first_row) * F.hidden
    gl.store(grad_h0_ptr + rows * F.hidden + units, cast(carry, F.dtype), mask=in_batch)
    program = gl.program_id(0).to(gl.int64) * gl.num_programs(1) + pid_d
    store_row_sums(partial_bias_ptr + program * F.hidden, grad_bias, F)
    if partial_weight_ptr is not None:
        store_outer(partial_weight_ptr + program * F.hidden * F.hidden, outer, False, F.hidden, F)

"""A one-layer character model from token ids to partial sums of every gradient, in Gluon. Imports Triton alone.

    h_t = f(W_ih[:, token_t] + b + h_{t-1} W_hh^T)      o_t = h_t W_q^T + b_q
    loss = sum_t log sum_v exp(o_tv) - o_t[target_t]    g_t = softmax(o_t) - one_hot(target_t)
    grad_W_q = sum_t g_t^T h_t                          d_t = (g_t W_q + d_{t+1} W_hh) * f'(h_t)
    grad_W_hh = sum_t d_t^T h_{t-1}                     grad_W_ih[:, v] = sum of d_t over token_t = v

No row of the batch needs another before the gradients are added up, so a program takes a row through all of it: the
walk over time, the head over the row's states, the walk back. States and their gradients lie in memory of the program's
own, which its multiprocessor's cache holds. It then goes on to another row, and leaves one set of sums: unscaled, since
the number of targets that count is known only when all rows are done (language_model_update_kernels.py adds them up).

The walks are those of elman_kernels.py with one row a program: W_hh in registers, one barrier a step, input loaded a
group of steps ahead. The head takes `rows` steps at a time: their states pass through shared memory to the product with
W_q, logits to the layout in which a warp has whole rows, their gradients back to the products with W_q^T and states.
The gradient of W_ih is a table in shared memory to which each step adds a row; there are two, used in turn, so that
between a step that reads a row and the next one that may read the same there is always the recurrence's own barrier.
"""

from typing import NamedTuple

import triton.language as tl

from .elman_forms import (
    fma_product,
    load_input_weight,
    load_piece,
    load_weight,
    product,
    product_and_outer,
    state_buffers,
    store_outer,
    store_sum,
    tile_units,
    zero_outer,
    zero_tile,
)
from .gluon_interpreter import HAS_REINTERPRET, barrier, device_function, gl, jit
from .numerics import activation, activation_backward


class Own(NamedTuple):
    """A program's own memory; but for the first, None without GRADS."""

    states_ptr: tl.tensor  # (T, H)
    grads_ptr: tl.tensor  # (T, H)
    # sums over its rows of the batch
    table_ptr: tl.tensor  # (V, H), of W_ih
    weight_ptr: tl.tensor  # (H, H)
    head_ptr: tl.tensor  # (V, H)
    bias_ptr: tl.tensor  # (H,)
    head_bias_ptr: tl.tensor  # (V,)


@device_function
def _row_by_row(buffer):
    """The same shared memory as tiles of one row, which `index` takes."""
    if HAS_REINTERPRET:
        return buffer.reinterpret(buffer.dtype, [buffer.shape[0], 1, buffer.shape[1]], buffer.layout)
    else:
        return buffer._reinterpret(buffer.dtype, [buffer.shape[0], 1, buffer.shape[1]], buffer.layout)


@device_function
def _load_units(ptr, offs, units, F: tl.constexpr):
    """H numbers shaped like a state tile; zero without a tensor."""
    if ptr is None:
        return zero_tile(F)
    else:
        return gl.load(ptr + offs, mask=units < F.hidden, other=0.0)


@device_function
def _load_ids(ptr, first, way, i, T, stride_t, F: tl.constexpr):
    """Token ids of the group of steps from number i of a walk, scalars; -1 past its end."""
    AHEAD: tl.constexpr = F.ahead
    ids = ()
    for k in gl.static_range(AHEAD):
        at = ptr + (first + way * (i + k)).to(gl.int64) * stride_t
        ids = ids + (gl.load(at, mask=i + k < T, other=0).to(gl.int32) - gl.where(i + k < T, 0, 1),)
    return ids


@device_function
def _load_input(weight_ih_ptr, token, units, F: tl.constexpr):
    """Column `token` of W_ih (H, V), zero for an id that is none; the pointer stands at the units' rows."""
    known = (token >= 0) & (token < F.inputs)
    return gl.load(weight_ih_ptr + token, mask=units < gl.where(known, F.hidden, 0), other=0.0)


@device_function
def _load_state(ptr, i, T, units, F: tl.constexpr):
    """State tile of step number i of the walk back from (T, H), zero past its end."""
    return gl.load(ptr + (T - 1 - i) * F.hidden + units, mask=units < gl.where(i < T, F.hidden, 0), other=0.0)


@device_function
def _walk(tokens_ptr, stride_t, weight_ih_ptr, weight_hh_ptr, bias, h, states_ptr, T, F: tl.constexpr):
    """All steps of one row from state h; states (T, H) are stored."""
    AHEAD: tl.constexpr = F.ahead
    units = tile_units(F)
    weight_ih_ptr += units * F.inputs
    w = load_weight(weight_hh_ptr, False, F)
    states = state_buffers(F)
    states[0].store(h)
    ids = _load_ids(tokens_ptr, T * 0, 1, 0, T, stride_t, F)
    x = ()
    for k in gl.static_range(AHEAD):
        x = x + (_load_input(weight_ih_ptr, ids[k], units, F),)
    ids = _load_ids(tokens_ptr, T * 0, 1, AHEAD, T, stride_t, F)
    for i in range(0, T, AHEAD):
        ids_next = _load_ids(tokens_ptr, T * 0, 1, i + 2 * AHEAD, T, stride_t, F)
        x_next = ()
        for k in gl.static_range(AHEAD):
            x_next = x_next + (_load_input(weight_ih_ptr, ids[k], units, F),)
            pre = product(states[k % 2], w, x[k] + bias, F)
            mask = units < gl.where(i + k < T, F.hidden, 0)
            h = gl.where(mask, activation(pre, F.tanh), h)
            states[1 - k % 2].store(h)
            gl.store(states_ptr + (i + k) * F.hidden + units, h, mask=mask)
        x, ids = x_next, ids_next


@device_function
def _whole_states(ROWS: tl.constexpr, F: tl.constexpr, HEAD: tl.constexpr):
    """Rows and units of a tile of states as it is loaded, each shaped to broadcast over the other."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, HEAD.whole_states))
    return rows.expand_dims(1), gl.arange(0, F.width, layout=gl.SliceLayout(0, HEAD.whole_states)).expand_dims(0)


@device_function
def _load_rows(ptr, first, T, rows, units, F: tl.constexpr):
    """A tile of states (rows of time, units), zero outside."""
    mask = (first + rows < T) & (units < F.hidden)
    return gl.load(ptr + (first + rows) * F.hidden + units, mask=mask, other=0.0)


@device_function
def _head(
    own,
    targets_ptr,
    stride_t,
    weights,  # W_q (V, H), b_q (V,) or None
    again,
    T,
    ignore_index,
    GRADS: tl.constexpr,
    F: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Loss and number of targets that count of one row's states, and with GRADS g_t W_q and the head's gradients."""
    V: tl.constexpr = HEAD.hidden
    ROWS: tl.constexpr = HEAD.rows
    weight_ptr, bias_ptr = weights
    w = load_input_weight(weight_ptr, False, HEAD)
    units = tile_units(F)
    bias = 0.0
    if bias_ptr is not None:
        offs = tile_units(HEAD)
        bias = gl.load(bias_ptr + offs, mask=offs < V, other=0.0)
    hidden = gl.allocate_shared_memory(F.acc, HEAD.states_shape, F.shared)
    hidden_rows = _row_by_row(hidden)
    logits = gl.allocate_shared_memory(F.acc, HEAD.shape, HEAD.shared)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, HEAD.whole_rows))
    classes = gl.arange(0, HEAD.width, layout=gl.SliceLayout(0, HEAD.whole_rows)).expand_dims(0)
    rows_h, units_h = _whole_states(ROWS, F, HEAD)
    log_sums = gl.full([ROWS], 0.0, F.acc, layout=gl.SliceLayout(1, HEAD.whole_rows))
    counts = gl.full([ROWS], 0.0, F.acc, layout=gl.SliceLayout(1, HEAD.whole_rows))
    chosen = gl.full(HEAD.shape, 0.0, F.acc, layout=HEAD.whole_rows)
    if GRADS:
        w_back = load_input_weight(weight_ptr, True, F)
        outer = zero_outer(F.input_pieces, F)
        grad_logits = gl.allocate_shared_memory(F.acc, HEAD.shape, HEAD.shared)
        grad_rows = _row_by_row(grad_logits)
        grad_bias = gl.full(HEAD.shape, 0.0, F.acc, layout=HEAD.whole_rows)
    h = _load_rows(own.states_ptr, 0, T, rows_h, units_h, F)
    for i in range(0, T, ROWS):
        hidden.store(h)
        h = _load_rows(own.states_ptr, i + ROWS, T, rows_h, units_h, F)
        target = gl.load(targets_ptr + (i + rows).to(gl.int64) * stride_t, mask=i + rows < T, other=0)
        logits.store(fma_product(hidden, w, HEAD) + bias)
        o = gl.where(classes < V, logits.load(HEAD.whole_rows), float("-inf"))
        o -= gl.max(o, axis=1).expand_dims(1)
        exponentials = gl.exp(o)
        total = gl.sum(exponentials, axis=1)
        counted = (i + rows < T) & (target != ignore_index)
        log_sum = gl.where((target >= 0) & (target < V), gl.log(total), float("nan"))
        log_sums += gl.where(counted, log_sum, 0.0)
        counts += gl.where(counted, 1.0, 0.0)
        is_target = counted.expand_dims(1) & (target.expand_dims(1) == classes)
        chosen += gl.where(is_target, o, 0.0)
        if GRADS:
            g = gl.where(counted.expand_dims(1), exponentials / total.expand_dims(1), 0.0)
            g -= gl.where(is_target, 1.0, 0.0)
            grad_bias += g
            grad_logits.store(g)
            barrier()  # or the compiler puts one into each turn of the loop
            for m in range(ROWS):  # as straight code it would take more registers than there are
                state = hidden_rows.index(m).load(F.tile)
                grad, outer = product_and_outer(grad_rows.index(m), w_back, outer, state, F)
                mask = units < gl.where(i + m < T, F.hidden, 0)
                gl.store(own.grads_ptr + (i + m) * F.hidden + units, grad, mask=mask)
    if GRADS:
        store_outer(own.head_ptr, outer, again, V, F)
        offs = gl.arange(0, HEAD.width, layout=gl.SliceLayout(0, HEAD.whole_rows))
        store_sum(own.head_bias_ptr + offs, gl.sum(grad_bias, axis=0), offs < V, again)
    return gl.sum(log_sums, axis=0) - gl.sum(gl.sum(chosen, axis=1), axis=0), gl.sum(counts, axis=0)


@device_function
def _walk_back(own, tokens_ptr, stride_t, weight_hh_ptr, h0, again, T, F: tl.constexpr, HEAD: tl.constexpr):
    """Back over the steps of one row: gradients of the recurrence's weights."""
    AHEAD: tl.constexpr = F.ahead
    V: tl.constexpr = F.inputs
    units = tile_units(F)
    w = load_weight(weight_hh_ptr, True, F)
    if not HEAD.apart:
        outer = zero_outer(F.pieces, F)
    grad_bias = zero_tile(F)
    buffers = state_buffers(F)
    even_table = gl.allocate_shared_memory(F.acc, HEAD.table_shape, F.shared)
    odd_table = gl.allocate_shared_memory(F.acc, HEAD.table_shape, F.shared)
    even_table.store(gl.full(HEAD.table_shape, 0.0, F.acc, layout=HEAD.whole_states))
    odd_table.store(gl.full(HEAD.table_shape, 0.0, F.acc, layout=HEAD.whole_states))
    table_rows = (_row_by_row(even_table), _row_by_row(odd_table))
    carry = zero_tile(F)
    ids = _load_ids(tokens_ptr, T - 1, -1, 0, T, stride_t, F)
    h = ()
    grad = ()
    for k in gl.static_range(AHEAD):
        h = h + (_load_state(own.states_ptr, k, T, units, F),)
        grad = grad + (_load_state(own.grads_ptr, k, T, units, F),)
    for i in range(0, T, AHEAD):
        ids_next = _load_ids(tokens_ptr, T - 1, -1, i + AHEAD, T, stride_t, F)
        h_next = ()
        grad_next = ()
        for k in gl.static_range(AHEAD):
            d = activation_backward(grad[k] + carry, h[k], F.tanh)
            h_next = h_next + (_load_state(own.states_ptr, i + AHEAD + k, T, units, F),)
            grad_next = grad_next + (_load_state(own.grads_ptr, i + AHEAD + k, T, units, F),)
            d = gl.where(units < gl.where(i + k < T, F.hidden, 0), d, 0.0)
            known = (ids[k] >= 0) & (ids[k] < V)
            place = table_rows[k % 2].index(gl.where(known, ids[k], 0))
            buffer = buffers[k % 2]
            so_far = place.load(F.tile)
            buffer.store(d)
            if k + 1 < AHEAD:
                h_prev = h[k + 1]
            else:
                h_prev = h_next[0]
            h_prev = gl.where(i + k + 1 < T, h_prev, h0)
            if HEAD.apart:
                new = product(buffer, w, None, F)
                mask = units < gl.where(i + k < T, F.hidden, 0)
                gl.store(own.grads_ptr + (T - 1 - i - k) * F.hidden + units, d, mask=mask)
            else:
                new, outer = product_and_outer(buffer, w[0], outer, h_prev, F)
            place.store(so_far + gl.where(known, d, 0.0))
            grad_bias += d
            carry = gl.where(i + k < T, new, carry)
        h, grad, ids = h_next, grad_next, ids_next
    ids_v, units_v = _whole_states(HEAD.width, F, HEAD)
    total = even_table.load(HEAD.whole_states) + odd_table.load(HEAD.whole_states)
    mask = (ids_v < V) & (units_v < F.hidden)
    store_sum(own.table_ptr + ids_v * F.hidden + units_v, total, mask, again)
    if not HEAD.apart:
        store_outer(own.weight_ptr, outer, again, F.hidden, F)
    store_sum(own.bias_ptr + units, grad_bias, units < F.hidden, again)


@device_function
def _add_outer_products(buffer, outer, h_prev, F: tl.constexpr):
    """`outer` plus h_prev x d for the one row d in `buffer`."""
    added = ()
    for a in gl.static_range(len(outer)):
        added = added + (outer[a] + h_prev.expand_dims(2) * load_piece(buffer, a, F).expand_dims(1),)
    return added


@device_function
def _outer_products(own, h0, again, T, F: tl.constexpr, HEAD: tl.constexpr):
    """The gradient of W_hh where the walk back has left d_t (T, H) in memory: no registers for W_hh beside it."""
    ROWS: tl.constexpr = HEAD.rows
    units = tile_units(F)
    outer = zero_outer(F.pieces, F)
    first = gl.allocate_shared_memory(F.acc, F.shape, F.shared)
    first.store(gl.load(own.grads_ptr + units, mask=units < F.hidden, other=0.0))
    outer = _add_outer_products(first, outer, h0, F)
    later = gl.allocate_shared_memory(F.acc, HEAD.states_shape, F.shared)
    before = gl.allocate_shared_memory(F.acc, HEAD.states_shape, F.shared)
    later_rows, before_rows = _row_by_row(later), _row_by_row(before)
    rows, units_h = _whole_states(ROWS, F, HEAD)
    d = _load_rows(own.grads_ptr, 1, T, rows, units_h, F)
    h = _load_rows(own.states_ptr, 0, T - 1, rows, units_h, F)
    for i in range(1, T, ROWS):
        later.store(d)
        before.store(h)
        d = _load_rows(own.grads_ptr, i + ROWS, T, rows, units_h, F)
        h = _load_rows(own.states_ptr, i + ROWS - 1, T - 1, rows, units_h, F)
        barrier()
        for m in range(ROWS):
            outer = _add_outer_products(later_rows.index(m), outer, before_rows.index(m).load(F.tile), F)
    store_outer(own.weight_ptr, outer, again, F.hidden, F)


@jit(do_not_specialize=["T", "B", "ignore_index"])
def language_model_kernel(
    # pointers
    tokens_ptr,  # ids of any integer type
    targets_ptr,  # likewise
    starts_ptr,  # (B,) int64, where each row of both begins, in elements; None: by stride_tokens_b and stride_targets_b
    weight_ih_ptr,  # (H, V) contiguous, as all weights are
    weight_hh_ptr,  # (H, H)
    bias_ih_ptr,  # (H,), or None
    bias_hh_ptr,  # (H,), or None
    head_weight_ptr,  # (V, H)
    head_bias_ptr,  # (V,), or None
    h0_ptr,  # (B, H) contiguous, or None
    h_n_ptr,  # (B, H) contiguous, last states; may be h0_ptr
    states_ptr,  # (programs, 2, T, H), or without GRADS (programs, T, H): the program's own memory
    partial_ptr,  # (programs, 2 V H + H H + H + V): table (V, H), W_hh, W_q, b, b_q; written with GRADS
    losses_ptr,  # (2, programs): sum of the losses in nats, targets that count
    # sizes
    T,
    B,
    ignore_index,  # targets of this id do not count
    # strides
    stride_tokens_b,
    stride_tokens_t,
    stride_targets_b,
    stride_targets_t,
    # meta-parameters
    GRADS: tl.constexpr,
    F: tl.constexpr,  # elman_forms.Form of a row, with V as inputs
    HEAD: tl.constexpr,  # language_model_forms.HeadForm
):
    H: tl.constexpr = F.hidden
    V: tl.constexpr = F.inputs
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    units = tile_units(F)
    bias = _load_units(bias_ih_ptr, units, units, F) + _load_units(bias_hh_ptr, units, units, F)
    if GRADS:
        states_ptr += pid.to(gl.int64) * 2 * T * H
        grads_ptr = states_ptr + T * H
        table_ptr = partial_ptr + pid.to(gl.int64) * (2 * V * H + H * H + H + V)
        weight_ptr = table_ptr + V * H
        head_ptr = weight_ptr + H * H
        bias_ptr = head_ptr + V * H
        own = Own(states_ptr, grads_ptr, table_ptr, weight_ptr, head_ptr, bias_ptr, bias_ptr + H)
    else:
        states_ptr += pid.to(gl.int64) * T * H
        own = Own(states_ptr, None, None, None, None, None, None)
    loss = 0.0
    count = 0.0
    for row in range(pid, B, programs):
        again = row > pid
        if starts_ptr is None:
            own_tokens_ptr = tokens_ptr + gl.cast(row, gl.int64) * stride_tokens_b
            own_targets_ptr = targets_ptr + gl.cast(row, gl.int64) * stride_targets_b
        else:
            start = gl.load(starts_ptr + row)
            own_tokens_ptr = tokens_ptr + start * stride_tokens_t
            own_targets_ptr = targets_ptr + start * stride_targets_t
        offs_h = gl.cast(row, gl.int64) * H + units
        h = _load_units(h0_ptr, offs_h, units, F)
        _walk(own_tokens_ptr, stride_tokens_t, weight_ih_ptr, weight_hh_ptr, bias, h, states_ptr, T, F)
        barrier()  # the states are read in other layouts than they were written in
        head = (head_weight_ptr, head_bias_ptr)
        row_loss, row_count = _head(
            own, own_targets_ptr, stride_targets_t, head, again, T, ignore_index, GRADS, F, HEAD
        )
        loss += row_loss
        count += row_count
        barrier()
        if GRADS:
            h = _load_units(h0_ptr, offs_h, units, F)
            _walk_back(own, own_tokens_ptr, stride_tokens_t, weight_hh_ptr, h, again, T, F, HEAD)
            if HEAD.apart:
                barrier()
                h = _load_units(h0_ptr, offs_h, units, F)
                _outer_products(own, h, again, T, F, HEAD)
        # Only now: it may be where the first states are.
        gl.store(h_n_ptr + offs_h, _load_state(states_ptr, 0, T, units, F), mask=units < H)
        barrier()
    gl.store(losses_ptr + pid, loss)
    gl.store(losses_ptr + programs + pid, count)

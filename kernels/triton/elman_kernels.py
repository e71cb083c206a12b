"""The Elman recurrence with the time loop inside one program. Imports Triton alone: it compiles where torch is missing.

    forward    pre_t = x_t + h_{t-1} @ W^T          h_t = tanh(pre_t) or relu(pre_t)
    backward   d_t = (g_t + c_t) * f'(h_t)          c_{t-1} = d_t @ W        grad_W = sum_t d_t^T @ h_{t-1}

A program owns BLOCK_B rows of the batch in one direction. It reads W (BLOCK_H x BLOCK_H, zero-padded) once, keeps it,
and walks time; the state never leaves it. The state tile is (BLOCK_B, BLOCK_H) with W as the dot's right operand, or,
with W_LEFT, transposed (BLOCK_H, BLOCK_B) with W as the left one. The next step's input is loaded before this step's
dot.

Row b of step t lies at p_t * stride_t + b * stride_b. p_t is t itself and B rows are active, or, with PACKED, p_t is
steps_ptr[t], the packed rows before step t, and steps_ptr[T + t] are active. A row that is not active keeps its state.
Where a program's rows and steps begin is computed in int64; inside a tile int32 is enough and costs half the registers,
unless the launcher finds rows so far apart that it sets WIDE.
"""

import triton
import triton.language as tl

from .numerics import activation, activation_backward, cast, dot


@triton.jit
def _walk(steps_ptr, T, first_row, backwards, PACKED: tl.constexpr):
    """Number of steps in which `first_row` is active, the first of the walk over them and the stride to the next.

    Batch sizes do not increase, so those steps are the first ones.
    """
    steps = T
    if PACKED:
        steps = tl.sum(tl.zeros((128,), tl.int32))
        for start in range(0, T, 128):
            offs_t = start + tl.arange(0, 128)
            sizes = tl.load(steps_ptr + T + offs_t, mask=offs_t < T, other=0)
            steps += tl.sum((sizes > first_row).to(tl.int32))
    return steps, (backwards * (steps - 1)).to(tl.int64), (1 - 2 * backwards).to(tl.int64)


@triton.jit
def _step(steps_ptr, t, T, B, first_row, PACKED: tl.constexpr):
    """Position of step t and the number of rows, from `first_row` on, that are active in it."""
    if PACKED:
        return tl.load(steps_ptr + t), tl.load(steps_ptr + T + t).to(tl.int32) - first_row
    else:
        return t, B - first_row


@triton.jit
def _load_weight(
    weight_ptr, weight_reverse_ptr, pid_d, H: tl.constexpr, BLOCK_H: tl.constexpr, TRANSPOSE: tl.constexpr
):
    """W of this program's direction, zero outside H x H, as it is or transposed."""
    rows = tl.arange(0, BLOCK_H)[:, None]
    cols = tl.arange(0, BLOCK_H)[None, :]
    mask = (rows < H) & (cols < H)
    offsets = cols * H + rows if TRANSPOSE else rows * H + cols
    if pid_d == 0:
        w = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    else:
        w = tl.load(weight_reverse_ptr + offsets, mask=mask, other=0.0)
    return w


@triton.jit
def _tile_indices(BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, W_LEFT: tl.constexpr, WIDE: tl.constexpr):
    """Rows and columns of the state tile, shaped to broadcast against each other."""
    offs_b = tl.arange(0, BLOCK_B).to(tl.int64 if WIDE else tl.int32)
    offs_h = tl.arange(0, BLOCK_H)
    if W_LEFT:
        return offs_b[None, :], offs_h[:, None]
    else:
        return offs_b[:, None], offs_h[None, :]


@triton.jit
def _load_input(x_ptr, ids, position, offs, cols, mask, stride_x_t, V, TOKENS: tl.constexpr, WIDE: tl.constexpr):
    """Input tile of the step at `position`; with TOKENS, rows `ids` of the table (zero for an id outside it)."""
    if TOKENS:
        known = (ids >= 0) & (ids < V)
        offs = ids.to(tl.int64 if WIDE else tl.int32) * stride_x_t + cols
        return tl.load(x_ptr + offs, mask=mask & known, other=0.0)
    else:
        return tl.load(x_ptr + position * stride_x_t + offs, mask=mask, other=0.0)


@triton.jit
def _load_ids(tokens_ptr, position, offs, mask, stride_tokens_t, TOKENS: tl.constexpr):
    if TOKENS:
        return tl.load(tokens_ptr + position * stride_tokens_t + offs, mask=mask, other=-1)
    else:
        return 0


@triton.jit(do_not_specialize=["T", "B", "V", "reverse"])
def elman_forward_kernel(
    # pointers
    x_ptr,  # (T, B, D*H) or packed (N, D*H), projected input; with TOKENS (V, D*H), the table
    tokens_ptr,  # (T, B) or packed (N,) int32 or int64, token ids; read with TOKENS
    weight_ptr,  # (H, H) contiguous, recurrent weight of direction 0
    weight_reverse_ptr,  # (H, H) contiguous, recurrent weight of direction 1
    h0_ptr,  # (D, B, H), first states; read with HAS_H0
    steps_ptr,  # (2, T) int64, packed rows before each step and active rows in it; read with PACKED
    out_ptr,  # (T, B, D*H) or packed (N, D*H), hidden states; may be x_ptr
    h_n_ptr,  # (D, B, H) contiguous, last states
    # sizes
    T,
    B,
    V,
    reverse,  # bit d is set if direction d walks time backwards
    # strides
    stride_x_t,
    stride_x_b,
    stride_tokens_t,
    stride_tokens_b,
    stride_h0_d,
    stride_h0_b,
    stride_out_t,
    stride_out_b,
    # meta-parameters
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # power of two, at least H
    W_LEFT: tl.constexpr,
    TANH: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_H0: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,  # of the dot: "ieee", "tf32x3" or "tf32"
    WIDE: tl.constexpr,
):
    pid_d = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_B
    rows, cols = _tile_indices(BLOCK_B, BLOCK_H, W_LEFT, WIDE)
    state_mask = (rows < B - first_row) & (cols < H)
    acc_type = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    operand_type = weight_ptr.dtype.element_ty
    w = _load_weight(weight_ptr, weight_reverse_ptr, pid_d, H, BLOCK_H, TRANSPOSE=not W_LEFT)

    x_ptr += pid_d * H
    out_ptr += pid_d * H + first_row.to(tl.int64) * stride_out_b
    if TOKENS:
        tokens_ptr += first_row.to(tl.int64) * stride_tokens_b
    else:
        x_ptr += first_row.to(tl.int64) * stride_x_b
    offs_x = rows * stride_x_b + cols
    offs_tokens = rows * stride_tokens_b
    offs_out = rows * stride_out_b + cols
    h = tl.zeros((BLOCK_H, BLOCK_B) if W_LEFT else (BLOCK_B, BLOCK_H), acc_type)
    if HAS_H0:
        h0_ptr += pid_d.to(tl.int64) * stride_h0_d + first_row.to(tl.int64) * stride_h0_b
        h = tl.load(h0_ptr + rows * stride_h0_b + cols, mask=state_mask, other=0.0).to(acc_type)

    steps, t, t_step = _walk(steps_ptr, T, first_row, (reverse >> pid_d) & 1, PACKED)
    t_last = steps - 1 - t
    position, active = _step(steps_ptr, t, T, B, first_row, PACKED)
    ids = _load_ids(tokens_ptr, position, offs_tokens, rows < active, stride_tokens_t, TOKENS)
    x = _load_input(x_ptr, ids, position, offs_x, cols, (rows < active) & (cols < H), stride_x_t, V, TOKENS, WIDE)
    t = tl.where(t == t_last, t, t + t_step)
    position_next, active_next = _step(steps_ptr, t, T, B, first_row, PACKED)
    ids = _load_ids(tokens_ptr, position_next, offs_tokens, rows < active_next, stride_tokens_t, TOKENS)
    for _ in range(steps):
        # One step ahead: the input tile; two steps ahead: what its address depends on.
        mask_next = (rows < active_next) & (cols < H)
        x_next = _load_input(x_ptr, ids, position_next, offs_x, cols, mask_next, stride_x_t, V, TOKENS, WIDE)
        t = tl.where(t == t_last, t, t + t_step)
        position_after, active_after = _step(steps_ptr, t, T, B, first_row, PACKED)
        ids = _load_ids(tokens_ptr, position_after, offs_tokens, rows < active_after, stride_tokens_t, TOKENS)

        operand = cast(h, operand_type)
        pre = dot(w, operand, x.to(acc_type), PRECISION) if W_LEFT else dot(operand, w, x.to(acc_type), PRECISION)
        new = activation(pre, TANH)
        h = tl.where(rows < active, new, h) if PACKED else new
        mask = (rows < active) & (cols < H)
        tl.store(out_ptr + position * stride_out_t + offs_out, cast(h, out_ptr.dtype.element_ty), mask=mask)
        x = x_next
        position, active = position_next, active_next
        position_next, active_next = position_after, active_after

    h_n_ptr += (pid_d.to(tl.int64) * B + first_row) * H
    tl.store(h_n_ptr + rows * H + cols, cast(h, h_n_ptr.dtype.element_ty), mask=state_mask)


@triton.jit(do_not_specialize=["T", "B", "V", "reverse"])
def elman_backward_kernel(
    # pointers
    grad_out_ptr,  # (T, B, D*H) or packed (N, D*H); read with HAS_GRAD_OUT
    grad_h_n_ptr,  # (D, B, H); read with HAS_GRAD_H_N
    out_ptr,  # (T, B, D*H) or packed (N, D*H), hidden states of the forward pass
    tokens_ptr,  # (T, B) or packed (N,) int32 or int64, token ids; read with GRAD_TABLE
    weight_ptr,  # (H, H) contiguous, recurrent weight of direction 0
    weight_reverse_ptr,  # (H, H) contiguous, recurrent weight of direction 1
    h0_ptr,  # (D, B, H), first states; read with HAS_H0
    steps_ptr,  # (2, T) int64, packed rows before each step and active rows in it; read with PACKED
    grad_x_ptr,  # (T, B, D*H) or packed (N, D*H), gradient of pre_t; written with GRAD_X
    h_prev_ptr,  # like grad_x, strides too: h_{t-1}, for a weight gradient outside; written with SAVE_H_PREV
    grad_h0_ptr,  # (D, B, H) contiguous
    partial_weight_ptr,  # (programs over B, D, H, H) fp32 or fp64, grad_W of a program's rows; written with GRAD_WEIGHT
    partial_table_ptr,  # (programs over B, D, V, H) fp32 or fp64, grad of the table likewise; written with GRAD_TABLE
    # sizes
    T,
    B,
    V,
    reverse,  # bit d is set if direction d walked time backwards
    # strides
    stride_grad_out_t,
    stride_grad_out_b,
    stride_grad_h_n_d,
    stride_grad_h_n_b,
    stride_out_t,
    stride_out_b,
    stride_tokens_t,
    stride_tokens_b,
    stride_h0_d,
    stride_h0_b,
    stride_grad_x_t,
    stride_grad_x_b,
    # meta-parameters
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # power of two, at least H
    BLOCK_V: tl.constexpr,  # power of two, at least V; used with GRAD_TABLE
    W_LEFT: tl.constexpr,
    TANH: tl.constexpr,
    HAS_GRAD_OUT: tl.constexpr,
    HAS_GRAD_H_N: tl.constexpr,
    HAS_H0: tl.constexpr,
    PACKED: tl.constexpr,
    GRAD_X: tl.constexpr,
    SAVE_H_PREV: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,  # of the dots: "ieee", "tf32x3" or "tf32"
    WIDE: tl.constexpr,
):
    pid_d = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_B
    rows, cols = _tile_indices(BLOCK_B, BLOCK_H, W_LEFT, WIDE)
    state_mask = (rows < B - first_row) & (cols < H)
    acc_type = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    operand_type = weight_ptr.dtype.element_ty
    w = _load_weight(weight_ptr, weight_reverse_ptr, pid_d, H, BLOCK_H, TRANSPOSE=W_LEFT)

    out_ptr += pid_d * H + first_row.to(tl.int64) * stride_out_b
    offs_grad_out = rows * stride_grad_out_b + cols
    offs_out = rows * stride_out_b + cols
    offs_grad_x = rows * stride_grad_x_b + cols
    if HAS_GRAD_OUT:
        grad_out_ptr += pid_d * H + first_row.to(tl.int64) * stride_grad_out_b
    if GRAD_X:
        grad_x_ptr += pid_d * H + first_row.to(tl.int64) * stride_grad_x_b
    if SAVE_H_PREV:
        h_prev_ptr += pid_d * H + first_row.to(tl.int64) * stride_grad_x_b
    zeros = tl.zeros((BLOCK_H, BLOCK_B) if W_LEFT else (BLOCK_B, BLOCK_H), acc_type)
    carry = zeros
    if HAS_GRAD_H_N:
        grad_h_n_ptr += pid_d.to(tl.int64) * stride_grad_h_n_d + first_row.to(tl.int64) * stride_grad_h_n_b
        carry = tl.load(grad_h_n_ptr + rows * stride_grad_h_n_b + cols, mask=state_mask, other=0.0).to(acc_type)
    h0 = zeros.to(out_ptr.dtype.element_ty)
    if HAS_H0:
        h0_ptr += pid_d.to(tl.int64) * stride_h0_d + first_row.to(tl.int64) * stride_h0_b
        h0 = tl.load(h0_ptr + rows * stride_h0_b + cols, mask=state_mask, other=0.0)
    if GRAD_WEIGHT:
        grad_w = tl.zeros((BLOCK_H, BLOCK_H), acc_type)
    # Against the tile's orientation: rows are the dimension that the table gradient's dot sums over.
    ids_rows, offs_v = _tile_indices(BLOCK_B, BLOCK_V, not W_LEFT, WIDE)
    offs_tokens = ids_rows * stride_tokens_b
    if GRAD_TABLE:
        tokens_ptr += first_row.to(tl.int64) * stride_tokens_b
        grad_table = tl.zeros((BLOCK_H, BLOCK_V) if W_LEFT else (BLOCK_V, BLOCK_H), acc_type)

    # The walk of the forward pass, from its end.
    steps, t, t_step = _walk(steps_ptr, T, first_row, 1 - ((reverse >> pid_d) & 1), PACKED)
    t_last = steps - 1 - t
    position, active = _step(steps_ptr, t, T, B, first_row, PACKED)
    mask = (rows < active) & (cols < H)
    h = tl.load(out_ptr + position * stride_out_t + offs_out, mask=mask, other=0.0)
    grad = zeros
    if HAS_GRAD_OUT:
        grad = tl.load(grad_out_ptr + position * stride_grad_out_t + offs_grad_out, mask=mask, other=0.0)
    ids = _load_ids(tokens_ptr, position, offs_tokens, ids_rows < active, stride_tokens_t, GRAD_TABLE)
    for _ in range(steps):
        # Loaded ahead of this step's dot: the state before it, which is the next step's own, and the next gradient.
        # Before its first step a row has h0: all rows in the last step of this walk, and, where a reverse walk began
        # with few rows, those that joined in this step.
        is_last = t == t_last
        t = tl.where(is_last, t, t + t_step)
        position_prev, active_prev = _step(steps_ptr, t, T, B, first_row, PACKED)
        active_prev = tl.where(is_last, 0, active_prev)
        mask_prev = (rows < active_prev) & (cols < H)
        h_prev = tl.load(out_ptr + position_prev * stride_out_t + offs_out, mask=mask_prev, other=0.0)
        if HAS_H0:
            h_prev = tl.where(rows < active_prev, h_prev, h0)
        grad_prev = zeros
        if HAS_GRAD_OUT:
            grad_prev = tl.load(
                grad_out_ptr + position_prev * stride_grad_out_t + offs_grad_out, mask=mask_prev, other=0.0
            )
        ids_prev = _load_ids(
            tokens_ptr, position_prev, offs_tokens, ids_rows < active_prev, stride_tokens_t, GRAD_TABLE
        )

        d = activation_backward(grad.to(acc_type) + carry, h.to(acc_type), TANH)
        if PACKED:
            d = tl.where(rows < active, d, 0.0)
        mask = (rows < active) & (cols < H)
        if GRAD_X:
            tl.store(
                grad_x_ptr + position * stride_grad_x_t + offs_grad_x,
                cast(d, grad_x_ptr.dtype.element_ty),
                mask=mask,
            )
        if SAVE_H_PREV:
            tl.store(h_prev_ptr + position * stride_grad_x_t + offs_grad_x, h_prev, mask=mask)
        operand = cast(d, operand_type)
        new = dot(w, operand, zeros, PRECISION) if W_LEFT else dot(operand, w, zeros, PRECISION)
        carry = tl.where(rows < active, new, carry) if PACKED else new
        if GRAD_WEIGHT:
            if W_LEFT:
                grad_w = dot(operand, tl.trans(h_prev), grad_w, PRECISION)
            else:
                grad_w = dot(tl.trans(operand), h_prev, grad_w, PRECISION)
        if GRAD_TABLE:
            one_hot = (ids == offs_v).to(tl.float32).to(operand_type)
            if W_LEFT:
                grad_table = dot(operand, one_hot, grad_table, PRECISION)
            else:
                grad_table = dot(one_hot, operand, grad_table, PRECISION)
        h, grad, ids = h_prev, grad_prev, ids_prev
        position, active = position_prev, active_prev

    grad_h0_ptr += (pid_d.to(tl.int64) * B + first_row) * H
    tl.store(grad_h0_ptr + rows * H + cols, cast(carry, grad_h0_ptr.dtype.element_ty), mask=state_mask)
    offs_n = tl.arange(0, BLOCK_H)[:, None]
    offs_k = tl.arange(0, BLOCK_H)[None, :]
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + pid_d
    if GRAD_WEIGHT:
        offsets = (program * H + offs_n) * H + offs_k
        tl.store(partial_weight_ptr + offsets, grad_w, mask=(offs_n < H) & (offs_k < H))
    if GRAD_TABLE:
        table_cols = tl.arange(0, BLOCK_H)[:, None] if W_LEFT else tl.arange(0, BLOCK_H)[None, :]
        offsets = (program * V + offs_v) * H + table_cols
        tl.store(partial_table_ptr + offsets, grad_table, mask=(offs_v < V) & (table_cols < H))

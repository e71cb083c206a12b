"""The whole decoding loop in one program. Imports Triton alone: it compiles where torch is missing.

    h^l_t = f(input^l_t + W_hh h^l_{t-1}),   input^0_t = table[id_t],   input^l_t = W_ih h^{l-1}_t + bias
    o_t = W h^L_t + b,   next id: argmax o, or the first whose cumulated q exceeds u sum q,   q = exp(alpha o / tau)

A program decodes one sequence: it reads the prompt, then its own ids. Every product is a matrix times a vector, so the
weights are read in tiles (BLOCK_K, BLOCK_N) of the transposed matrix: neighbouring threads read neighbouring outputs,
each thread adds up its own products over all tiles, and one sum over the tile's first axis ends an output. All weights
are padded with zeros to whole tiles, so that nothing is masked; a padded unit stays 0 = tanh(0) = relu(0), and a padded
id has the bias -inf. With RESIDENT (one layer) the recurrent matrix and the head are single tiles, kept in registers
over all steps; else they come from the cache again at each step.

Such a tile is written down as (K, N), or where LANES_K is not 1 as (LANES_K, N / LANES_N, K / LANES_K, LANES_N): with
(8, 16) lanes have eight rows of 16 columns, registers eight times eight rows, and each warp columns of its own: the sum
over K is one of registers and one over lanes, and nothing of it goes through shared memory or waits at a barrier. Over
warps, Triton 3.6 exchanges sums with 32-way bank conflicts: 6,400 wavefronts a character at H=256.

The state is in global memory, two vectors a layer in turn: a step reads one and writes the other. What a thread writes
there, others read after the barrier that follows each layer. Within one program that is enough: on NVIDIA bar.sync
orders the accesses to memory of the threads that take part (PTX ISA, "bar"), and the loads are plain ld.global, never
of the read-only kind; for AMD the barrier is compiled between a release and an acquire fence of the workgroup. A vector
is written again only two steps after it was, with a barrier between its last reader and that.
"""

import triton
import triton.language as tl

from .numerics import activation, device_function


@triton.jit
def _rows(BLOCK: tl.constexpr):
    """(LANES_K, K / LANES_K), or (K,): the rows of a tile's elements."""
    if BLOCK.lanes_k == 1:
        return tl.arange(0, BLOCK.k)
    else:
        return tl.arange(0, BLOCK.lanes_k)[:, None] + tl.arange(0, BLOCK.k // BLOCK.lanes_k)[None, :] * BLOCK.lanes_k


@triton.jit
def _columns(BLOCK: tl.constexpr):
    """(N / LANES_N, LANES_N), or (N,): the columns of its sums."""
    if BLOCK.lanes_k == 1:
        return tl.arange(0, BLOCK.n)
    else:
        return tl.arange(0, BLOCK.n // BLOCK.lanes_n)[:, None] * BLOCK.lanes_n + tl.arange(0, BLOCK.lanes_n)[None, :]


@triton.jit
def _along_rows(values, BLOCK: tl.constexpr):
    """What there is of each row, shaped to broadcast over a tile's columns."""
    return values[:, None] if BLOCK.lanes_k == 1 else values[:, None, :, None]


@triton.jit
def _load_tile(ptr, stride: tl.constexpr, BLOCK: tl.constexpr):
    """Rows 0 to K-1 and columns 0 to N-1 of a matrix."""
    columns = _columns(BLOCK)
    columns = columns[None, :] if BLOCK.lanes_k == 1 else columns[None, :, None, :]
    return tl.load(ptr + _along_rows(_rows(BLOCK), BLOCK) * stride + columns)


@triton.jit
def _load_vector(ptr, BLOCK: tl.constexpr):
    """What the rows of a tile are multiplied by."""
    return _along_rows(tl.load(ptr + _rows(BLOCK)), BLOCK)


@triton.jit
def _zeros(BLOCK: tl.constexpr, dtype: tl.constexpr):
    """A tile of zeros."""
    if BLOCK.lanes_k == 1:
        return tl.full((BLOCK.k, BLOCK.n), 0, dtype)
    else:
        shape: tl.constexpr = (BLOCK.lanes_k, BLOCK.n // BLOCK.lanes_n, BLOCK.k // BLOCK.lanes_k, BLOCK.lanes_n)
        return tl.full(shape, 0, dtype)


@triton.jit
def _add_product(acc, weight_ptr, vector_ptr, DEPTH, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """acc + the products of weight (DEPTH, N) and vector (DEPTH), a tile of K rows at a time; `_total` ends the sum."""
    for k in tl.range(0, DEPTH, BLOCK.k, loop_unroll_factor=2):
        w = _load_tile(weight_ptr + k * WIDTH, WIDTH, BLOCK)
        acc += w.to(acc.dtype) * _load_vector(vector_ptr + k, BLOCK)
    return acc


@triton.jit
def _total(products, BLOCK: tl.constexpr):
    """The sums over the rows of a tile, in the shape of its columns."""
    if BLOCK.lanes_k == 1:
        return tl.sum(products, 0)
    else:
        return tl.sum(tl.sum(products, 2), 0)


@triton.jit
def _rank(logits, logits_ptr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many logits are larger than each: below k exactly for the k largest and those equal to the k-th."""
    offs_v, offs_j = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_J)
    tl.store(logits_ptr + offs_v, logits)
    tl.debug_barrier()
    larger = tl.zeros((BLOCK_V, BLOCK_J), tl.int32)
    for j in range(0, BLOCK_V, BLOCK_J):
        others = tl.load(logits_ptr + j + offs_j)
        larger += (others[None, :] > logits[:, None]).to(tl.int32)
    return tl.sum(larger, 1)


@device_function
def argmax(logits, ids, V):
    """The first of the largest; the last id if there is a NaN, so that whatever the logits are it is an id."""
    return tl.min(tl.where(logits == tl.max(logits, 0), ids, V - 1), 0)


@device_function
def probabilities(logits, largest, sharpness):
    """q times a constant, in fp64. largest: of all logits."""
    return tl.exp((logits - largest).to(tl.float64) * sharpness)


@device_function
def draw(q, ids, uniform):
    """The first id of nonzero q whose cumulated q exceeds uniform * sum q, in fp64 like the reference.

    A parallel scan rounds otherwise than the sum does: where that leaves no such id it is the last of nonzero q.
    """
    reached = tl.cumsum(q, 0) > uniform * tl.sum(q, 0)
    last = tl.max(tl.where(q > 0.0, ids, 0), 0)
    return tl.min(tl.where(reached & (q > 0.0), ids, last), 0)


@triton.jit(do_not_specialize=["P", "N", "V", "L", "top_k", "sharpness_bits"])
def generate_kernel(
    # pointers
    prompt_ptr,  # (B, P) int64; an id outside 0..V-1 counts as a zero row of the table
    rows_ptr,  # (V + L, WIDTH): the table, the biases of layers 1 to L-1, zeros
    weight_ih_ptr,  # (L, WIDTH, WIDTH), transposed input weights; the first is not read
    weight_hh_ptr,  # (L, WIDTH, WIDTH), transposed recurrent weights
    head_ptr,  # (DEPTH, BLOCK_V), transposed
    head_bias_ptr,  # (BLOCK_V), -inf from V on
    uniforms_ptr,  # (B, N) fp64 in [0, 1); read with SAMPLE
    states_ptr,  # (B, 2, L, DEPTH) fp32 or fp64: in half 0 the first states; the last end in half (P + N - 1) % 2
    logits_ptr,  # (B, BLOCK_V) of the states' dtype, for use within the kernel; with TOP_K
    ids_ptr,  # (B, N) int64, the result
    # sizes
    P,
    N,
    V,
    L,
    # scalars
    top_k,
    sharpness_bits: tl.int64,  # alpha / tau, the 64 bits of a double: a float would arrive as fp32
    # meta-parameters
    TANH: tl.constexpr,
    STACKED: tl.constexpr,  # L > 1
    SAMPLE: tl.constexpr,
    TOP_K: tl.constexpr,
    F: tl.constexpr,  # generate_tiles.GenerateTile
):
    WIDTH: tl.constexpr = F.width
    DEPTH: tl.constexpr = F.depth
    LAYER: tl.constexpr = F.layer
    HEAD: tl.constexpr = F.head
    pid_b = tl.program_id(0).to(tl.int64)
    acc_type: tl.constexpr = states_ptr.dtype.element_ty
    offs_n, offs_v = _columns(LAYER), _columns(HEAD)
    prompt_ptr += pid_b * P
    ids_ptr += pid_b * N
    states_ptr += pid_b * 2 * L * DEPTH
    head_bias = tl.load(head_bias_ptr + offs_v).to(acc_type)
    sharpness = tl.cast(sharpness_bits, tl.int64).to(tl.float64, bitcast=True)
    if SAMPLE:
        uniforms_ptr += pid_b * N
    if TOP_K:
        logits_ptr += pid_b * HEAD.n
    if F.resident:
        w = _load_tile(weight_hh_ptr, WIDTH, LAYER).to(acc_type)
        head = _load_tile(head_ptr, HEAD.n, HEAD).to(acc_type)

    token = tl.full((), 0, tl.int64)
    for step in range(P + N - 1):
        if step < P:
            token = tl.load(prompt_ptr + step)
            token = tl.where((token >= 0) & (token < V), token, V + L - 1)
        now_ptr = states_ptr + (step % 2) * L * DEPTH
        next_ptr = states_ptr + (1 - step % 2) * L * DEPTH
        for layer in range(L):
            row = tl.where(layer == 0, token, V + layer - 1)
            for n in range(0, WIDTH, LAYER.n):
                x = tl.load(rows_ptr + row * WIDTH + n + offs_n).to(acc_type)
                if F.resident:
                    products = w * _load_vector(now_ptr, LAYER)
                else:
                    products = _zeros(LAYER, acc_type)
                    at = tl.cast(layer, tl.int64) * WIDTH * WIDTH + n
                    old_ptr = now_ptr + layer * DEPTH
                    products = _add_product(products, weight_hh_ptr + at, old_ptr, WIDTH, WIDTH, LAYER)
                    if STACKED:
                        # No products in the first layer: an empty loop instead of a branch around the accumulator.
                        below_ptr = next_ptr + tl.maximum(layer - 1, 0) * DEPTH
                        depth = tl.where(layer > 0, WIDTH, 0)
                        products = _add_product(products, weight_ih_ptr + at, below_ptr, depth, WIDTH, LAYER)
                tl.store(next_ptr + layer * DEPTH + n + offs_n, activation(x + _total(products, LAYER), TANH))
            tl.debug_barrier()
        if step >= P - 1:
            top_ptr = next_ptr + (L - 1) * DEPTH
            if F.resident:
                products = head * _load_vector(top_ptr, HEAD)
            else:
                products = _add_product(_zeros(HEAD, acc_type), head_ptr, top_ptr, DEPTH, HEAD.n, HEAD)
            logits = head_bias + _total(products, HEAD)
            if HEAD.lanes_k != 1:
                logits = tl.reshape(logits, (HEAD.n,))
            place = step - (P - 1)
            if SAMPLE:
                uniform = tl.load(uniforms_ptr + place)
                q = probabilities(logits, tl.max(logits, 0), sharpness)
                if TOP_K:
                    q = tl.where(_rank(logits, logits_ptr, HEAD.n, F.block_j) < top_k, q, 0.0)
                chosen = draw(q, tl.arange(0, HEAD.n), uniform)
            else:
                chosen = argmax(logits, tl.arange(0, HEAD.n), V)
            token = chosen.to(tl.int64)
            tl.store(ids_ptr + place, token)

"""The decoding loop across the chip, in Gluon: a team of programs a sequence. Imports Triton alone.

    h_t = f(table[id_t] + W_hh h_{t-1}),   o_t = W h_t + b,   next id: as in generate_kernels.py

For layers whose weights no program can hold. A program has `units` rows of each W_hh (and W_ih) and as many columns of
the head in registers, by FMA (elman_grid_forms.py), and the table's columns of these units in shared memory. What the
programs exchange are their units of a layer's h_t, and with those of the last layer, in one go, what these add to every
logit: each program adds the partial logits of all others in the same order, and so knows the next id without asking.
One wait a layer; the partial logits are V numbers from each program, a few KB, where a second exchange would take as
long as the first.

Steps are numbered from 0, L of them an id, each of a layer, and each waits until all have counted the one before in.
Step i L + l computes layer l of h_{i+1} from that of h_i and, above the first layer, from layer l - 1 of h_{i+1}. Where
l = 0 and the prompt has ended it chooses id number i - P from the logits of h_i before. The last step has i = P + N - 1
and l = 0: it chooses, and what it computes is read by nobody. Sums, tanh and what is exchanged are fp32, or fp64 for
fp64.
"""

from dataclasses import dataclass

import triton.language as tl

from .elman_forms import sum_of, tile_units
from .elman_grid_forms import (
    COUNTER_STRIDE,
    GridForm,
    announce,
    load_weight,
    part_counters,
    product,
    state_places,
    wait,
)
from .generate_kernels import argmax, draw, probabilities
from .gluon_interpreter import HAS_REINTERPRET, barrier, device_function, gl, jit
from .numerics import activation

RANKED = tl.constexpr(16)  # logits that all are compared with at a time


@dataclass(frozen=True, kw_only=True, repr=False)
class GenerateForm(GridForm):
    """A mapping by FMA with one row, and what is chosen how."""

    block_v: int = 32  # power of two, at least 32 and V
    sample: bool = False
    top_k: bool = False
    layers: int = 1  # L

    @property
    def width(self) -> int:
        """Of a state in memory: whole programs."""
        return self.programs * self.units

    @property
    def part_programs(self) -> int:
        """Whose units are a warp's part of k."""
        return self.part // self.units

    @property
    def logits_of_parts(self):
        """Layout (warps, block_v) in which a warp adds the partial logits of the programs it waits for."""
        return gl.BlockedLayout([1, self.block_v // 32], [1, 32], [self.warps, 1], [1, 0])

    @property
    def logits_of_all(self):
        """Layout (warps, block_v) in which every warp has all of them."""
        return gl.BlockedLayout([self.warps, self.block_v // 32], [1, 32], [1, self.warps], [1, 0])

    @property
    def logits(self):
        """Layout (block_v,): every warp has all, so that it chooses without asking the others.

        As SliceLayout(0, logits_of_all) has them: Triton scans no slices.
        """
        return gl.BlockedLayout([self.block_v // 32], [32], [self.warps], [0])

    @property
    def ranks(self):
        """Layout (block_v, RANKED) of comparisons."""
        return gl.BlockedLayout([1, RANKED.value], [32, 1], [self.warps, 1], [1, 0])

    @property
    def head(self):
        """Layout (block_v, units) of this program's columns of the head: all units of an id in one thread."""
        return gl.BlockedLayout(
            [max(1, self.block_v // (32 * self.warps)), self.units], [32, 1], [self.warps, 1], [1, 0]
        )

    @property
    def flat(self):
        """Layout of a vector of block_v * units."""
        return gl.BlockedLayout([4], [32], [self.warps], [0])

    @property
    def plain(self):
        """Layout of a vector in shared memory."""
        return gl.SwizzledSharedLayout(1, 1, 1, [0])

    @property
    def plain_rows(self):
        """Layout of a matrix in shared memory."""
        return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


def grid_form(tile, hidden_size: int, vocab: int, dtype: tl.dtype, **options) -> GenerateForm:
    """The kernel's compile-time argument for a tile of generate_grid_tiles.py; dtype: of the weights."""
    return GenerateForm.of(tile, hidden_size, dtype, block_v=max(32, 1 << (vocab - 1).bit_length()), **options)


@device_function
def _table_in_shared(table_ptr, first_unit, V, F: tl.constexpr):
    """(block_v, units, 1) in shared memory: this program's columns of the table."""
    memory = gl.allocate_shared_memory(F.dtype, [F.block_v, F.units, 1], F.plain_rows)
    offs = gl.arange(0, F.block_v * F.units, layout=F.flat)
    ids, units = offs // F.units, first_unit + offs % F.units
    values = gl.load(table_ptr + ids * F.hidden + units, mask=(ids < V) & (units < F.hidden), other=0.0)
    if HAS_REINTERPRET:
        memory.reinterpret(F.dtype, [F.block_v * F.units], F.plain).store(values)
    else:
        memory._reinterpret(F.dtype, [F.block_v * F.units], F.plain).store(values)
    return memory


@device_function
def _load_head(head_ptr, first_unit, V, F: tl.constexpr):
    """(block_v, units): this program's columns of the head, zero outside."""
    ids = gl.arange(0, F.block_v, layout=gl.SliceLayout(1, F.head)).expand_dims(1)
    units = first_unit + gl.arange(0, F.units, layout=gl.SliceLayout(0, F.head)).expand_dims(0)
    return gl.load(head_ptr + ids * F.hidden + units, mask=(ids < V) & (units < F.hidden), other=0.0).to(F.acc)


@device_function
def _load_parts(partials_ptr, wanted, F: tl.constexpr):
    """(warps, block_v): of each warp's part the sum of its programs' partial logits; zero if they are not `wanted`."""
    EACH: tl.constexpr = F.part_programs
    part = gl.arange(0, F.warps, layout=gl.SliceLayout(1, F.logits_of_parts)).expand_dims(1)
    ids = gl.arange(0, F.block_v, layout=gl.SliceLayout(0, F.logits_of_parts)).expand_dims(0)
    limit = gl.where(wanted, F.programs, 0)
    loaded = ()
    for j in gl.static_range(EACH):
        program = part * EACH + j
        offs = program * F.block_v + ids
        values = gl.load(partials_ptr + offs, mask=(program < limit) & (ids >= 0), other=0.0, cache_modifier=".cg")
        loaded = loaded + (values,)
    return sum_of(loaded)


@device_function
def _spread_probabilities(logits, memory, sharpness, top_k, F: tl.constexpr):
    """q of all ids in every warp, of which each has computed a share: exponentials in fp64 are dear.

    With F.top_k zero where top_k logits or more are larger: of those that are not the k largest or equal to the k-th.
    """
    largest = gl.max(logits, axis=0)
    memory.store(logits)
    own = memory.load(gl.SliceLayout(1, F.ranks))
    q = probabilities(own, largest, sharpness)
    if F.top_k:
        larger = gl.full([F.block_v], 0, gl.int32, layout=gl.SliceLayout(1, F.ranks))
        for j in gl.static_range(F.block_v // RANKED):
            others = memory.slice(j * RANKED, RANKED).load(gl.SliceLayout(0, F.ranks)).expand_dims(0)
            larger += gl.sum((others > own.expand_dims(1)).to(gl.int32), axis=1)
        q = gl.where(larger < top_k, q, 0.0)
    return gl.convert_layout(q, F.logits)


@device_function
def _load_layers(weight_ptr, first_unit, F: tl.constexpr, LAYERS: tl.constexpr):
    """This program's rows of matrices (LAYERS, H, H): a tuple of load_weight's."""
    found = ()
    for layer in gl.static_range(LAYERS):
        found = found + (load_weight(weight_ptr + layer * F.hidden * F.hidden, first_unit, False, F),)
    return found


@device_function
def _load_biases(bias_ptr, first_unit, F: tl.constexpr):
    """Of the layers above the first, (L-1, H): a tuple of this program's units of each."""
    ABOVE: tl.constexpr = F.layers - 1
    units = first_unit + tile_units(F)
    found = ()
    for layer in gl.static_range(ABOVE):
        found = found + (gl.load(bias_ptr + layer * F.hidden + units, mask=units < F.hidden, other=0.0).to(F.acc),)
    return found


@device_function
def _next_token(prompt_ptr, uniforms_ptr, i, P, F: tl.constexpr):
    """Whether id number i - P is to be chosen; the prompt's id, and the uniform number for a draw."""
    chooses = i >= P
    token = gl.load(prompt_ptr + i, mask=i < P, other=0)
    if F.sample:
        uniform = gl.load(uniforms_ptr + (i - P), mask=chooses, other=0.0)
    else:
        uniform = 0.0
    return chooses, token, uniform


@device_function
def _choose(logits, ids, uniform, V, sharpness, top_k, buffer, F: tl.constexpr):
    """The next id."""
    if F.sample:
        chosen = draw(_spread_probabilities(logits, buffer, sharpness, top_k, F), ids, uniform)
    else:
        chosen = argmax(logits, ids, V)
    return chosen.to(gl.int64)


@jit(do_not_specialize=["P", "N", "V", "top_k", "sharpness_bits", "first_step", "num_steps", "first_team"])
def generate_grid_kernel(
    # pointers
    prompt_ptr,  # (B, P) int64; an id outside 0..V-1 counts as a zero row of the table
    table_ptr,  # (V, H) contiguous
    weight_ptr,  # (L, H, H) contiguous, recurrent weights
    weight_ih_ptr,  # (L-1, H, H) contiguous, input weights of the layers above the first, or None
    bias_ptr,  # (L-1, H) contiguous, their biases, or None
    head_ptr,  # (V, H) contiguous
    head_bias_ptr,  # (V,) or None
    uniforms_ptr,  # (B, N) fp64 in [0, 1), or None: greedy
    states_ptr,  # (B, 2, L, F.width) fp32 or fp64: in half 0 the first states; h_i lies in half i % 2
    partials_ptr,  # (B, 2, F.programs, F.block_v) likewise: what each program's units of h_i add to the logits
    ids_ptr,  # (B, N) int64, the result
    counters_ptr,  # (1 + B * F.counters, COUNTER_STRIDE) int32, zero: whether a wait was in vain, counters
    # sizes
    P,
    N,
    V,
    # scalars
    top_k,
    sharpness_bits: tl.int64,  # alpha / tau, the 64 bits of a double
    first_step,
    num_steps,
    first_team,
    F: tl.constexpr,  # GenerateForm
):
    L: tl.constexpr = F.layers
    program = gl.program_id(0)
    team = (first_team + gl.program_id(1)).to(gl.int64)
    first_unit = program * F.units
    prompt_ptr += team * P
    ids_ptr += team * N
    if uniforms_ptr is not None:
        uniforms_ptr += team * N
    states_ptr += team * (2 * L * F.width)
    partials_ptr += team * 2 * F.programs * F.block_v
    late_ptr = counters_ptr
    counters_ptr += (1 + team * F.counters) * COUNTER_STRIDE
    part_ptr, part_programs = part_counters(counters_ptr, F)

    w = _load_layers(weight_ptr, first_unit, F, L)
    w_ih = _load_layers(weight_ih_ptr, first_unit, F, L - 1)
    biases = _load_biases(bias_ptr, first_unit, F)
    head = _load_head(head_ptr, first_unit, V, F)
    table = _table_in_shared(table_ptr, first_unit, V, F)
    ids = gl.arange(0, F.block_v, layout=F.logits)
    head_bias = gl.where(ids < V, 0.0, -float("inf")).to(F.acc)
    if head_bias_ptr is not None:
        head_bias += gl.load(head_bias_ptr + ids, mask=ids < V, other=0.0).to(F.acc)
    state_k, state_rows = state_places(F)
    offs_own = first_unit + tile_units(F)
    offs_partial = program * F.block_v + gl.arange(0, F.block_v, layout=gl.SliceLayout(1, F.head))
    buffer = gl.allocate_shared_memory(F.acc, F.sums_shape, F.shared)
    parts_buffer = gl.allocate_shared_memory(F.acc, [F.warps, F.block_v], F.plain_rows)
    logits_buffer = parts_buffer
    if F.sample:
        logits_buffer = gl.allocate_shared_memory(F.acc, [F.block_v], F.plain)
    sharpness = sharpness_bits.to(gl.float64, bitcast=True)
    barrier()

    late = part_programs < 0
    last = gl.minimum(first_step + num_steps, (P + N - 1) * L + 1)
    for i in range(first_step // L, (last + L - 1) // L):
        now = i % 2 * (L * F.width)
        then = L * F.width - now
        partials_now = i % 2 * (F.programs * F.block_v)
        partials_then = F.programs * F.block_v - partials_now
        for layer in gl.static_range(L):
            step = i * L + layer
            if (step >= first_step) & (step < last):
                if layer == 0:
                    chooses, token, uniform = _next_token(prompt_ptr, uniforms_ptr, i, P, F)
                    late = wait(part_ptr, (step - first_step) * part_programs, late, F)
                    parts_buffer.store(_load_parts(partials_ptr + partials_now, chooses, F))
                    pre = product(w[0], states_ptr + (now + state_rows), state_k, state_rows < 1, late, buffer, F)
                    logits = gl.convert_layout(gl.sum(parts_buffer.load(F.logits_of_all), axis=0), F.logits)
                    chosen = _choose(logits + head_bias, ids, uniform, V, sharpness, top_k, logits_buffer, F)
                    token = gl.where(chooses, chosen, token)
                    gl.store(ids_ptr + (i - P), token, mask=chooses & (program == 0))
                    known = (token >= 0) & (token < V)
                    x = table.index(gl.where(known, token, 0).to(gl.int32)).load(F.tile).to(F.acc)
                    x = gl.where(known, x, 0.0)
                else:
                    late = wait(part_ptr, (step - first_step) * part_programs, late, F)
                    old = states_ptr + (now + layer * F.width + state_rows)
                    below = states_ptr + (then + (layer - 1) * F.width + state_rows)
                    mask = state_rows < 1
                    pre = product(w[layer], old, state_k, mask, late, buffer, F, w_ih[layer - 1], below)
                    x = biases[layer - 1]
                h = activation(pre + x, F.tanh)
                gl.store(states_ptr + (then + layer * F.width + offs_own), h)
                if layer == L - 1:
                    own = gl.convert_layout(gl.sum(h, axis=1), gl.SliceLayout(0, F.head))
                    partial = gl.sum(head * own.expand_dims(0), axis=1)
                    gl.store(partials_ptr + (partials_then + offs_partial), partial)
                announce(counters_ptr, first_unit, F)

    gl.store(late_ptr + late.to(gl.int32) * 0, 1, mask=late)

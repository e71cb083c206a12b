"""How the product h W^T is laid out over a grid of programs, W_hh in their registers. Gluon; imports Triton alone.

A program owns `units` rows of W (of its transpose, backward) and, of R batch rows, these units of the state. Its warps
split K, the dimension summed over: warp s sums over k from s * pieces * KP on. W is a tuple of register tensors
(warps, units, KP), one a piece. The whole state of the step before is loaded from memory, where all programs of the
group stored their units, straight into the layout in which it is multiplied; the warps' sums (warps, units, R) are
added through shared memory, after which every thread has the same few elements of the tile (units, R).

- MMA: W the left operand of mma.sync, the state the right one, eight rows a matrix instruction. k_width is 128 bits, so
  that a thread's loads are. 16-bit operands, or float32 in one product of ten bits (tf32) or in three (tf32x3: high and
  low part of both, all but low times low; W's low parts take as many registers again).
- FMA: float64, and float32 where registers hold W once. A thread owns units / lanes_n units and of each piece the 16
  bytes of k that one of lanes_k lanes has.

Shared memory is written in the MMA's order and read eight rows by four units a warp, with no bank conflict.
"""

import functools
from dataclasses import dataclass

import triton.language as tl

from .elman_forms import AnyForm, multiply_add, sum_of, tf32_low
from .gluon_interpreter import INTERPRETED, barrier, device_function, gl
from .numerics import tf32_high

COUNTER_STRIDE = tl.constexpr(32)  # int32 between two counters: 128 bytes, a line of the second-level cache


@dataclass(frozen=True, kw_only=True, repr=False)
class GridForm(AnyForm):
    """A mapping onto a grid of programs. rows: 8 or a power of two above it; FMA: any power of two."""

    units: int  # of a program; 16 or a power of two above it
    most_chains: int = 4  # MMA: sums of a warp that do not wait for each other, over all its units
    by_part: bool = True  # a counter for each warp's part of k, else one for all
    most_polls: int = 1 << 24  # of a counter before the others are given up

    LAYOUTS = ("products", "sums", "shared")
    units_first = True

    @property
    def programs(self) -> int:
        """That share the units."""
        return -(-self.hidden // self.units)

    @property
    def k_width(self) -> int:
        """Neighbouring k of a thread: 16 bytes."""
        return 128 // self.operand.primitive_bitwidth

    @property
    def piece(self) -> int:
        """KP, values of k of a warp in a piece."""
        return self.k_width * (8 if self.mma else self.lanes_k)

    @property
    def pieces(self) -> int:
        return -(-self.hidden // (self.warps * self.piece))

    @property
    def part(self) -> int:
        """Values of k of a warp: a whole number of programs' units."""
        return self.pieces * self.piece

    @property
    def counters(self) -> int:
        """Of a team."""
        return self.warps if self.by_part else 1

    @property
    def chains(self) -> int:
        """Sums that an MMA's unit of 16 x 8 is made of."""
        return min(self.pieces, max(1, self.most_chains * 16 * 8 // (self.units * self.rows)))

    @property
    def exact(self) -> bool:
        """Whether the pieces end where H does, so that no k has to be masked."""
        return self.warps * self.part == self.hidden

    @functools.cached_property
    def products(self):
        """Layout of the warps' products: MMA (warps, units, R), FMA (warps, units, R, KP)."""
        if self.mma:
            return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[self.warps, 1, 1], instr_shape=[1, 16, 8])
        lanes_n = 32 // self.lanes_k
        return gl.BlockedLayout(
            [1, self.units // lanes_n, self.rows, self.k_width],
            [1, lanes_n, 1, self.lanes_k],
            [self.warps, 1, 1, 1],
            [3, 2, 1, 0],
        )

    @property
    def warp_sums(self):
        """Layout of the warps' sums as they are made, (warps, units, R)."""
        return self.products if self.mma else gl.SliceLayout(3, self.products)

    @property
    def weight(self):
        """Layout of a piece of W, (warps, units, KP)."""
        return gl.DotOperandLayout(0, self.products, self.k_width) if self.mma else gl.SliceLayout(2, self.products)

    @property
    def transposed(self):
        """Layout in which a piece of W's transpose is read, (warps, KP, units): 16 bytes a thread along the units."""
        lanes = max(1, self.units // self.k_width)
        return gl.BlockedLayout([1, 1, self.k_width], [1, 32 // lanes, lanes], [self.warps, 1, 1], [2, 1, 0])

    @property
    def state(self):
        """Layout of a piece of the state: MMA (warps, KP, R), FMA (warps, R, KP)."""
        return gl.DotOperandLayout(1, self.products, self.k_width) if self.mma else gl.SliceLayout(1, self.products)

    @property
    def sums_shape(self) -> list[int]:
        return [self.warps, self.units, self.rows]

    @property
    def sums(self):
        """Layout in which the warps' sums are read: one element of the tile after the other, each from all warps."""
        lanes_r = min(8, self.rows)
        lanes_n = 32 // lanes_r
        along = min(self.warps, max(1, self.units // lanes_n))
        return gl.BlockedLayout([self.warps, 1, 1], [1, lanes_n, lanes_r], [1, along, self.warps // along], [2, 1, 0])

    @property
    def shape(self) -> list[int]:
        """Of a tile."""
        return [self.units, self.rows]

    @property
    def tile(self):
        """Layout of a tile, (units, R)."""
        return gl.SliceLayout(0, self.sums)

    @property
    def shared(self):
        """Layout of the warps' sums in shared memory: blocks of eight rows, moved so that units do not conflict."""
        phases = min(4, max(1, self.rows // 8))
        return gl.SwizzledSharedLayout(min(8, self.rows), 4 // phases, phases, [2, 1, 0])


@device_function
def load_weight(weight_ptr, first_unit, TRANSPOSE: tl.constexpr, F: tl.constexpr):
    """This program's rows of W (H, H) contiguous, or of its transpose, zero outside: a tuple of pieces.

    For tf32x3 the high parts, then the low. The transpose is read along its units, as it lies, and turned in
    shared memory: read where it is needed, a thread would have a value at a time, and registers for all of them.
    """
    PIECES: tl.constexpr = F.pieces
    L: tl.constexpr = F.transposed if TRANSPOSE else F.weight
    s = gl.arange(0, F.warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, L))).expand_dims(1).expand_dims(2)
    middle: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L))
    last: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))
    if TRANSPOSE:
        n = gl.arange(0, F.units, layout=last).expand_dims(0).expand_dims(1) + first_unit
        k = gl.arange(0, F.piece, layout=middle).expand_dims(0).expand_dims(2) + s * F.part
    else:
        n = gl.arange(0, F.units, layout=middle).expand_dims(0).expand_dims(2) + first_unit
        k = gl.arange(0, F.piece, layout=last).expand_dims(0).expand_dims(1) + s * F.part
    highs = ()
    lows = ()
    for a in gl.static_range(PIECES):
        column = k + a * F.piece
        offsets = column * F.hidden + n if TRANSPOSE else n * F.hidden + column
        high = gl.load(weight_ptr + offsets, mask=(n < F.hidden) & (column < F.hidden), other=0.0)
        if TRANSPOSE:
            high = gl.convert_layout(gl.permute(high, (0, 2, 1)), F.weight)
        high = high.to(F.operand)
        if F.three:
            low = high
            high = tf32_high(low)
            lows = lows + (tf32_low(low, high),)
        highs = highs + (high,)
        # Piece by piece: the addresses of all take more registers than W. And what a transposed one passed through is
        # shared memory that the steps use.
        barrier()
    return highs + lows


@device_function
def state_places(F: tl.constexpr):
    """Of the first piece of a state: k, and batch rows, each shaped to broadcast over the other."""
    s = gl.arange(0, F.warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, F.state))).expand_dims(1).expand_dims(2)
    if F.mma:
        k = gl.arange(0, F.piece, layout=gl.SliceLayout(0, gl.SliceLayout(2, F.state))).expand_dims(0).expand_dims(2)
        rows = gl.arange(0, F.rows, layout=gl.SliceLayout(0, gl.SliceLayout(1, F.state))).expand_dims(0).expand_dims(1)
    else:
        k = gl.arange(0, F.piece, layout=gl.SliceLayout(0, gl.SliceLayout(1, F.state))).expand_dims(0).expand_dims(1)
        rows = gl.arange(0, F.rows, layout=gl.SliceLayout(0, gl.SliceLayout(2, F.state))).expand_dims(0).expand_dims(2)
    if F.wide:
        rows = rows.to(gl.int64)
    return k + s * F.part, rows


@device_function
def _load_piece(rows_ptr, k, mask_rows, a, F: tl.constexpr):
    """Piece a of a state, zero outside `mask_rows`; past the first-level cache, which may be old."""
    if F.exact:
        mask = mask_rows & (k >= 0)
    else:
        mask = mask_rows & (k + a * F.piece < F.hidden)
    return gl.load(rows_ptr + (k + a * F.piece), mask=mask, other=0.0, cache_modifier=".cg")


@device_function
def product(w, rows_ptr, k, mask_rows, late, buffer, F: tl.constexpr, other_w=None, other_ptr=None):
    """This program's units of state W^T, a tile (units, R); NaN if a warp is `late`.

    rows_ptr: where the state's rows lie, shaped to broadcast over k; k: of state_places; buffer: of the warps' sums.
    other_w, other_ptr: of another product to be added, by FMA.
    """
    PIECES: tl.constexpr = F.pieces
    state = ()
    for a in gl.static_range(PIECES):
        state = state + (_load_piece(rows_ptr, k, mask_rows, a, F),)
    if other_w is not None:
        for a in gl.static_range(PIECES):
            state = state + (_load_piece(other_ptr, k, mask_rows, a, F),)
    if F.mma:
        chains = ()
        for a in gl.static_range(PIECES):
            low = w[PIECES + a] if F.three else None
            if a < F.chains:
                zero = gl.full(F.sums_shape, 0.0, F.acc, layout=F.products)
                chains = chains + (multiply_add(w[a], low, state[a], zero, F),)
            else:
                # The oldest chain, which is the first one, comes last again.
                chains = chains[1:] + (multiply_add(w[a], low, state[a], chains[0], F),)
        total = sum_of(chains)
    else:
        products = w[0].expand_dims(2) * state[0].to(F.acc).expand_dims(1)
        for a in gl.static_range(1, PIECES):
            products += w[a].expand_dims(2) * state[a].to(F.acc).expand_dims(1)
        if other_w is not None:
            for a in gl.static_range(PIECES):
                products += other_w[a].expand_dims(2) * state[PIECES + a].to(F.acc).expand_dims(1)
        total = gl.sum(products, axis=3)
    total += gl.where(late, float("nan"), 0.0).to(F.acc).expand_dims(1).expand_dims(2)
    buffer.store(total)
    return gl.sum(buffer.load(F.sums), axis=0)


@device_function
def announce(counters_ptr, first_unit, F: tl.constexpr):
    """Count this program in, after all that its threads stored; at the counter of the part of k that its units are.

    One thread adds after one barrier. Triton 3.9's own addition has a barrier before it as well, 3.6's has none.
    """
    barrier()
    if F.by_part:
        counters_ptr += first_unit // F.part * COUNTER_STRIDE
    if INTERPRETED:
        gl.atomic_add(counters_ptr, 1, sem="release", scope="gpu")
    else:
        gl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first red.release.gpu.global.add.u32 [$1], 1;
            mov.b32 $0, 0;
            }""",
            "=r,l",
            [counters_ptr],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@device_function
def parts(F: tl.constexpr):
    """The numbers of the warps' parts of k, in a layout that gives each warp its own."""
    return gl.arange(0, F.warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, F.warp_sums)))


@device_function
def part_counters(counters_ptr, F: tl.constexpr):
    """Of each part: the address of its counter, and how many programs a step adds to it."""
    part = parts(F)
    if F.by_part:
        units = gl.minimum(gl.maximum(F.hidden - part * F.part, 0), F.part)
        return counters_ptr + part * COUNTER_STRIDE, (units + F.units - 1) // F.units
    else:
        return counters_ptr + part * 0, part * 0 + F.programs


@device_function
def wait(counters_ptr, target, late, F: tl.constexpr):
    """Each warp waits until the counter of its part is at `target`; whether that, or an earlier wait, was in vain.

    In vain after most_polls. The launcher has all programs run at once, so that is an error that should not be; whoever
    is late once waits no more, and what it computes from then on is NaN. What others stored before they counted
    themselves in is seen by the loads after this.
    """
    polls = gl.where(late, 0, F.most_polls)
    if INTERPRETED:
        behind = gl.load(counters_ptr) - target
        tries = 0
        while gl.max(gl.where((behind < 0) & (tries < polls), 1, 0), axis=0) > 0:
            behind = gl.load(counters_ptr) - target
            tries += 1
    else:
        behind = gl.inline_asm_elementwise(
            """{
            .reg .pred again, more;
            .reg .b32 left;
            mov.b32 left, $3;
            POLL:
            ld.acquire.gpu.global.b32 $0, [$1];
            sub.s32 $0, $0, $2;
            setp.lt.s32 again, $0, 0;
            setp.gt.s32 more, left, 0;
            sub.s32 left, left, 1;
            and.pred again, again, more;
            @again bra POLL;
            }""",
            "=&r,l,r,r",
            [counters_ptr, target, polls],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    return late | (behind < 0)

"""The two mappings of h W^T onto a GPU, W held in registers for all time steps. Written in Gluon; imports Triton alone.

A program owns R rows of the batch. The state, R x N (N: a power of two, at least the H hidden units), passes through
shared memory once a step, in one of two buffers used in turn, so that one barrier a step is enough. K, the dimension
summed over, is cut into pieces of KP, and W is a tuple of one register tensor a piece; pieces beyond H are left out.

- FMA: state tile (R, N), products in a tensor (R, N, KP). A thread owns N / (lanes_n * warps) units and of each piece
  the 16 bytes of k that one of lanes_k lanes has; these share a unit and add by shuffles. Neighbouring lanes read
  neighbouring values of the state, which conflicts with nothing. Every product is an exact FMA in float32 or float64,
  in chains as long as there are pieces: the sum over pieces is written out, because Triton 3.8 and newer make a tree of
  products and sums of what is left to a reduction.
- MMA: state tile (N, R), W the left operand of mma.sync, the pieces dealt out to chains that do not wait for each
  other. Operands of 16 bits, or float32 in one product of ten bits each (tf32), or in three (tf32x3: high and low part
  of both, all but low times low). Where registers do not hold all of W, the last pieces stay in shared memory.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import triton.language as tl

from .gluon_interpreter import device_function, gl, mma_v2
from .numerics import tf32_high


@dataclass(frozen=True, kw_only=True)
class AnyForm:
    """One mapping, by one program (`Form`) or a grid of them (elman_grid_forms.py), with all its sizes; the kernels get
    it as their one compile-time argument.
    """

    hidden: int  # H
    rows: int  # R, batch rows of a program
    warps: int
    dtype: tl.dtype  # of the tensors
    mma: bool = False
    three: bool = False  # tf32x3
    lanes_k: int = 8  # FMA: lanes that share a unit
    ahead: int = 4  # steps by which input is loaded before it is needed; of one program even
    tanh: bool = True  # else relu
    wide: bool = False  # offsets inside a tile need int64

    LAYOUTS: ClassVar[tuple[str, ...]]

    @classmethod
    def of(cls, tile: Any, hidden: int, dtype: tl.dtype, **options: Any):
        """That of a tile of the tables, whose fields have these names. options: what the tile does not say."""
        values = {field.name: getattr(tile, field.name) for field in fields(cls) if hasattr(tile, field.name)}
        values |= {"hidden": hidden, "dtype": dtype, "mma": tile.form != "fma", "three": tile.form == "mma3"}
        return cls(**values | options)

    def __repr__(self) -> str:
        """Names the layouts as well: Triton's cache of compiled kernels tells constants apart by this."""
        names = [field.name for field in fields(self)] + [*self.LAYOUTS]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    @property
    def acc(self) -> tl.dtype:
        """Of sums, tanh and carried gradients."""
        return tl.float64 if self.dtype == tl.float64 else tl.float32

    @property
    def operand(self) -> tl.dtype:
        """Of W and the state in the product."""
        return self.dtype if self.mma else self.acc


@dataclass(frozen=True, kw_only=True, repr=False)
class Form(AnyForm):
    """A mapping onto one program."""

    lanes_n: int  # FMA: lanes of a warp along the units
    in_shared: int = 0  # MMA: pieces of W that stay in shared memory
    inputs: int = 0  # FMA, forward: I features whose product with W_ih the kernel makes itself; 0: input is projected

    LAYOUTS: ClassVar[tuple[str, ...]] = ("products", "tile", "weight", "shared")

    @functools.cached_property
    def width(self) -> int:
        """N; not less than what the threads of a program have between them."""
        least = 16 * self.warps if self.mma else self.lanes_n * self.warps
        return max(least, 1 << (self.hidden - 1).bit_length())

    @property
    def units_first(self) -> bool:
        """In a state tile, which else is (rows, units)."""
        return self.mma

    @property
    def piece(self) -> int:
        """KP, values of k in a piece."""
        if self.mma:
            return 512 // self.operand.primitive_bitwidth  # 64 bytes: one ldmatrix of the state
        return self.lanes_k * (128 // self.acc.primitive_bitwidth)

    @property
    def pieces(self) -> int:
        return -(-self.hidden // self.piece)

    @property
    def input_pieces(self) -> int:
        return -(-self.inputs // self.piece)

    @property
    def input_shape(self) -> list[int]:
        """Of a tile of features."""
        return [self.rows, max(self.piece, 1 << (self.inputs - 1).bit_length())]

    @property
    def input_tile(self):
        """Layout of a tile of features, neighbouring lanes at neighbouring features."""
        lanes = self.lanes_n * self.lanes_k
        each = max(1, self.input_shape[1] // (lanes * self.warps))
        return gl.BlockedLayout([self.rows, each], [1, lanes], [1, self.warps], [1, 0])

    @property
    def chains(self) -> int:
        """Sums that an MMA's unit of 16 x 8 is made of; four a warp over all its units, as latency asks for."""
        return min(self.pieces, max(1, 4 * 16 * self.warps // self.width))

    @property
    def shape(self) -> list[int]:
        """Of the state tile."""
        return [self.width, self.rows] if self.mma else [self.rows, self.width]

    @property
    def products(self):
        """Layout of the products, or of the state as the right operand of an MMA."""
        if self.mma:
            return gl.DotOperandLayout(1, self.tile, self._k_width)
        units = self.width // (self.lanes_n * self.warps)
        return gl.BlockedLayout(
            [self.rows, units, self.piece // self.lanes_k],
            [1, self.lanes_n, self.lanes_k],
            [1, self.warps, 1],
            [2, 1, 0],
        )

    @property
    def tile(self):
        """Layout of the state tile."""
        if self.mma:
            return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[self.warps, 1], instr_shape=[16, 8])
        return gl.SliceLayout(2, self.products)

    @property
    def weight(self):
        """Layout of a piece of W, (N, KP)."""
        return gl.DotOperandLayout(0, self.tile, self._k_width) if self.mma else gl.SliceLayout(0, self.products)

    @property
    def shared(self):
        """Layout of the state in shared memory, contiguous along the units."""
        if self.mma:
            return gl.SwizzledSharedLayout(128 // self.operand.primitive_bitwidth, 1, 8, [0, 1])
        return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    @property
    def weight_shape(self) -> list[int]:
        """Of the pieces of W in shared memory."""
        return [self.in_shared * (2 if self.three else 1), self.width, self.piece]

    @property
    def weight_shared(self):
        """Layout of the pieces of W in shared memory: rows of 64 bytes, moved so that ldmatrix meets no conflict."""
        return gl.SwizzledSharedLayout(128 // self.operand.primitive_bitwidth, 2, 4, [1, 0])

    @property
    def _k_width(self) -> int:
        return 32 // self.operand.primitive_bitwidth


@device_function
def tile_rows(F: tl.constexpr):
    """Batch rows of the state tile, shaped to broadcast over its units."""
    rows = gl.arange(0, F.rows, layout=gl.SliceLayout(0 if F.units_first else 1, F.tile))
    if F.wide:
        rows = rows.to(gl.int64)
    return rows.expand_dims(0 if F.units_first else 1)


@device_function
def tile_units(F: tl.constexpr):
    """Units of the state tile, shaped to broadcast over its rows; a grid's from the program's first one."""
    count: tl.constexpr = F.shape[0 if F.units_first else 1]
    units = gl.arange(0, count, layout=gl.SliceLayout(1 if F.units_first else 0, F.tile))
    return units.expand_dims(1 if F.units_first else 0)


@device_function
def feature_rows(F: tl.constexpr):
    """Batch rows of a tile of features, shaped to broadcast over these."""
    rows = gl.arange(0, F.rows, layout=gl.SliceLayout(1, F.input_tile))
    if F.wide:
        rows = rows.to(gl.int64)
    return rows.expand_dims(1)


@device_function
def features(F: tl.constexpr):
    """Features of such a tile, shaped to broadcast over its rows."""
    return gl.arange(0, F.input_shape[1], layout=gl.SliceLayout(0, F.input_tile)).expand_dims(0)


@device_function
def zero_tile(F: tl.constexpr):
    return gl.full(F.shape, 0.0, F.acc, layout=F.tile)


@device_function
def state_buffers(F: tl.constexpr):
    """Shared memory for two state tiles, which steps use in turn."""
    even = gl.allocate_shared_memory(F.operand, F.shape, F.shared)
    odd = gl.allocate_shared_memory(F.operand, F.shape, F.shared)
    return even, odd


@device_function
def tf32_low(x, high):
    """What `high` leaves of x; nothing where x is infinite, whose difference would be NaN."""
    return gl.where(gl.abs(x) == float("inf"), 0.0, x - high)


@device_function
def _load_weight_piece(weight_ptr, a, COLUMNS: tl.constexpr, TRANSPOSE: tl.constexpr, F: tl.constexpr):
    """Piece a of a matrix (H, COLUMNS) contiguous, or of the transpose of one (COLUMNS, H), zero outside."""
    n = gl.arange(0, F.width, layout=gl.SliceLayout(1, F.weight)).expand_dims(1)
    k = gl.arange(0, F.piece, layout=gl.SliceLayout(0, F.weight)).expand_dims(0) + a * F.piece
    offsets = k * F.hidden + n if TRANSPOSE else n * COLUMNS + k
    return gl.load(weight_ptr + offsets, mask=(n < F.hidden) & (k < COLUMNS), other=0.0).to(F.operand)


@device_function
def load_weight(weight_ptr, TRANSPOSE: tl.constexpr, F: tl.constexpr):
    """W (H, H) or its transpose: a tuple of pieces; for tf32x3 the high parts, then the low.

    And the buffer of those that stay in shared memory, in the same order; an empty tuple if none do.
    """
    PIECES: tl.constexpr = F.pieces
    IN_REGISTERS: tl.constexpr = F.pieces - F.in_shared
    highs = ()
    lows = ()
    if F.in_shared > 0:
        stored = (gl.allocate_shared_memory(F.operand, F.weight_shape, F.weight_shared),)
    else:
        stored = ()
    for a in gl.static_range(PIECES):
        high = _load_weight_piece(weight_ptr, a, F.hidden, TRANSPOSE, F)
        low = high
        if F.three:
            high = tf32_high(high)
            low = tf32_low(low, high)
        if a < IN_REGISTERS:
            highs = highs + (high,)
            lows = lows + (low,)
        else:
            stored[0].index(a - IN_REGISTERS).store(high)
            if F.three:
                stored[0].index(a - IN_REGISTERS + F.in_shared).store(low)
    if F.three:
        return highs + lows, stored
    else:
        return highs, stored


@device_function
def load_input_weight(weight_ptr, TRANSPOSE: tl.constexpr, F: tl.constexpr):
    """W_ih (H, I), or the transpose of an (I, H): a tuple of pieces like W's. FMA form."""
    PIECES: tl.constexpr = F.input_pieces
    pieces = ()
    for a in gl.static_range(PIECES):
        pieces = pieces + (_load_weight_piece(weight_ptr, a, F.inputs, TRANSPOSE, F),)
    return pieces


@device_function
def load_piece(buffer, a, F: tl.constexpr):
    """Piece a of the rows in `buffer`, (R, KP), where products of it are made. FMA form."""
    return buffer.slice(a * F.piece, F.piece, dim=1).load(gl.SliceLayout(1, F.products))


@device_function
def fma_product(buffer, w, F: tl.constexpr):
    """The rows in `buffer` times the pieces w, (R, N)."""
    products = w[0].expand_dims(0) * load_piece(buffer, 0, F).expand_dims(1)
    for a in gl.static_range(1, len(w)):
        products += w[a].expand_dims(0) * load_piece(buffer, a, F).expand_dims(1)
    return gl.sum(products, axis=2)


@device_function
def multiply_add(high, low, state, chain, F: tl.constexpr):
    """chain + a piece of W, its high and low part, times a piece of the state, by mma.sync."""
    if F.three:
        state_high = tf32_high(state)
        chain = mma_v2(high, tf32_low(state, state_high), chain)
        # An infinite state counts in the last product alone: W's low parts have signs of their own.
        chain = mma_v2(low, gl.where(gl.abs(state) == float("inf"), 0.0, state_high), chain)
        state = state_high
    return mma_v2(high, state, chain)


@device_function
def sum_of(chains):
    """Of the tensors of a tuple, in their order."""
    total = chains[0]
    for c in gl.static_range(1, len(chains)):
        total += chains[c]
    return total


@device_function
def _chain_step(chain, w, stored, state, a, F: tl.constexpr):
    """chain + piece a of W times its piece of the state."""
    IN_REGISTERS: tl.constexpr = F.pieces - F.in_shared
    if a < IN_REGISTERS:
        high = w[a]
    else:
        high = stored[0].index(a - IN_REGISTERS).load(F.weight)
    low = None
    if F.three:
        if a < IN_REGISTERS:
            low = w[IN_REGISTERS + a]
        else:
            low = stored[0].index(a - IN_REGISTERS + F.in_shared).load(F.weight)
    return multiply_add(high, low, state, chain, F)


@device_function
def product(buffer, weight, x, F: tl.constexpr):
    """x + state W^T for the state in `buffer`; x None: zero. weight: of load_weight."""
    PIECES: tl.constexpr = F.pieces
    CHAINS: tl.constexpr = F.chains
    w, stored = weight
    if F.mma:
        chains = ()
        for a in gl.static_range(PIECES):
            state = buffer.slice(a * F.piece, F.piece, dim=0).load(F.products)
            if a == 0 and x is not None:
                chains = chains + (_chain_step(x, w, stored, state, a, F),)
            elif a < CHAINS:
                chains = chains + (_chain_step(zero_tile(F), w, stored, state, a, F),)
            else:
                # The oldest chain, which is the first one, comes last again.
                chains = chains[1:] + (_chain_step(chains[0], w, stored, state, a, F),)
        return sum_of(chains)
    else:
        total = fma_product(buffer, w, F)
        if x is not None:
            total += x
        return total


@device_function
def product_and_outer(buffer, w, outer, h_prev, F: tl.constexpr):
    """state W, and `outer` plus, over the rows, h_prev x state, in pieces like W's. FMA form.

    Both take the state from one reading, and h_prev as it lies: the sum over time is a weight gradient's transpose.
    """
    state = load_piece(buffer, 0, F).expand_dims(1)
    products = w[0].expand_dims(0) * state
    added = (outer[0] + gl.sum(h_prev.expand_dims(2) * state, axis=0).expand_dims(0),)
    for a in gl.static_range(1, len(w)):
        state = load_piece(buffer, a, F).expand_dims(1)
        products += w[a].expand_dims(0) * state
        added = added + (outer[a] + gl.sum(h_prev.expand_dims(2) * state, axis=0).expand_dims(0),)
    return gl.sum(products, axis=2), added


@device_function
def zero_outer(PIECES: tl.constexpr, F: tl.constexpr):
    """What `product_and_outer` begins with: a tuple of so many pieces (1, N, KP)."""
    pieces = ()
    for _ in gl.static_range(PIECES):
        pieces = pieces + (gl.full([1, F.width, F.piece], 0.0, F.acc, layout=F.products),)
    return pieces


@device_function
def store_sum(ptr, value, mask, again):
    """Store a sum; if `again`, on top of what this program left there before."""
    if again:  # a branch: as a mask it would have all of a matrix loaded before any of it is added
        value += gl.load(ptr, mask=mask, other=0.0)
    gl.store(ptr, value, mask=mask)


@device_function
def store_outer(ptr, outer, again, ROWS: tl.constexpr, F: tl.constexpr):
    """`store_sum` of the transpose of the pieces to a matrix (ROWS, H)."""
    n = gl.arange(0, F.width, layout=gl.SliceLayout(0, gl.SliceLayout(2, F.products))).expand_dims(0).expand_dims(2)
    k = gl.arange(0, F.piece, layout=gl.SliceLayout(0, gl.SliceLayout(1, F.products))).expand_dims(0).expand_dims(1)
    for a in gl.static_range(len(outer)):
        row = k + a * F.piece
        store_sum(ptr + row * F.hidden + n, outer[a], (n < F.hidden) & (row < ROWS), again)


@device_function
def store_row_sums(ptr, tile, F: tl.constexpr):
    """Sum of a state tile over its rows, (H,)."""
    along: tl.constexpr = 1 if F.mma else 0
    units = gl.arange(0, F.width, layout=gl.SliceLayout(along, F.tile))
    gl.store(ptr + units, gl.sum(tile, axis=along), mask=units < F.hidden)

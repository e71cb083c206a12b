"""Tile sizes of the decoding kernel (plain Python, imports nothing but the standard library).

No autotuning: the sizes follow from how many registers a thread can give to weights. Behind them stand static figures,
per warp and step: bench/results/static.json has them (bench/static.py measures, tests/kernels/test_static.py holds it).
"""

import functools
from dataclasses import dataclass

from .elman_tiles import next_power_of_2
from .targets import TileOfWarps

MAX_VOCAB = 1024  # the logits are one tile
MAX_RESIDENT = {4: 128, 8: 64}  # widest square matrix kept in registers, by the size of a number in bytes: 64 KB, 32 KB


@dataclass(frozen=True)
class Block:
    """A tile of a matrix: k rows and n columns, and of these what a warp has side by side."""

    k: int
    n: int
    lanes_k: int
    lanes_n: int


@dataclass(frozen=True)
class GenerateTile(TileOfWarps):
    """How one program decodes; generate_kernel gets it as a compile-time argument."""

    width: int  # H in whole tiles of a layer
    depth: int  # and in whole tiles of the head
    layer: Block
    head: Block  # n: a power of two, at least V
    block_j: int  # logits compared with all at a time
    resident: bool  # the weights stay in registers
    warps: int


def _whole(size: int, block: int) -> int:
    return -(-size // block) * block


def _block(k: int, n: int, warps: int, number_bytes: int) -> Block:
    """A warp has eight of 16 rows and columns where that gives each warp columns of its own, whichever of a tile's
    equal axes this version of Triton gives out first, else all as Triton likes.
    """
    own_columns = number_bytes == 4 and k == 8 * 8 and n == 16 * warps
    return Block(k, n, 8, 16) if own_columns else Block(k, n, 1, n)


def generate_tile(hidden_size: int, vocab: int, num_layers: int, number_bytes: int) -> GenerateTile:
    """The tile for H, V, L and the bytes of a number that the kernel computes with (4 or 8).

    - One warp up to H = V = 32, where each further one would only repeat the same instructions and add barriers; four
      up to 64. Eight beyond: two tiles of 32 KB on their way are what one multiprocessor takes in from the L2 cache in
      the time that a load needs.
    - A row of a tile is 128 outputs, so a warp reads 512 bytes side by side, or 64 bytes of each of eight rows. It is
      64 outputs where 128 would pad H too far.
    """
    block_v = max(16, next_power_of_2(vocab))
    narrow = max(16, next_power_of_2(hidden_size))
    largest = narrow * max(narrow, block_v)
    warps = 1 if largest <= 32 * 32 else 4 if largest <= 64 * 64 else 8
    per_thread = 128 // number_bytes  # elements of a tile: 32 registers
    tile = per_thread * 32 * warps
    block_of = functools.partial(_block, warps=warps, number_bytes=number_bytes)
    block_j = min(block_v, (1024 if warps == 1 else 2048) // block_v)  # more at a time spills
    if num_layers == 1 and narrow <= MAX_RESIDENT[number_bytes] and narrow * block_v <= 2 * tile:
        return GenerateTile(narrow, narrow, block_of(narrow, narrow), block_of(narrow, block_v), block_j, True, warps)
    block_n = narrow if narrow <= 128 else 128 if _whole(hidden_size, 128) == _whole(hidden_size, 64) else 64
    width = _whole(hidden_size, block_n)
    layer = block_of(min(64, width, tile // block_n), block_n)
    head = block_of(max(1, min(narrow, tile // block_v)), block_v)
    return GenerateTile(width, _whole(width, head.k), layer, head, block_j, False, warps)

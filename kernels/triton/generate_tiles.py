"""Tile sizes of the decoding kernel (plain Python, imports nothing but the standard library).

No autotuning: the sizes follow from how many registers a thread can give to weights. Behind them stand static figures,
per warp and step: bench/results/static.json has them (bench/static.py measures, tests/kernels/test_static.py holds it).
"""

import functools
from dataclasses import dataclass

from .elman_tiles import next_power_of_2
from .targets import launch_options

MAX_VOCAB = 1024  # the logits are one tile
MAX_RESIDENT = {4: 128, 8: 64}  # widest square matrix kept in registers, by the size of a number in bytes: 64 KB, 32 KB


@dataclass(frozen=True)
class GenerateTile:
    """How one program decodes: see generate_kernel for the names."""

    width: int
    depth: int
    block_k: int
    block_n: int
    block_v: int
    head_k: int
    block_j: int
    resident: bool
    warps: int
    lanes: tuple[int, int, int, int]  # rows and columns that a warp has of a layer's tile, and of the head's

    def constants(self) -> dict[str, object]:
        return {
            "WIDTH": self.width,
            "DEPTH": self.depth,
            "BLOCK_K": self.block_k,
            "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v,
            "HEAD_K": self.head_k,
            "BLOCK_J": self.block_j,
            "RESIDENT": self.resident,
            **dict(zip(("LANES_K", "LANES_N", "HEAD_LANES_K", "HEAD_LANES_N"), self.lanes, strict=True)),
        }

    def launch_options(self, target: str) -> dict[str, object]:
        return launch_options(self.warps, target)


def _whole(size: int, block: int) -> int:
    return -(-size // block) * block


def _lanes(rows: int, columns: int, warps: int, number_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile that a warp has side by side: eight of 16 where that gives each warp columns of its
    own, whichever of a tile's equal axes this version of Triton gives out first, else all as Triton likes.
    """
    own_columns = number_bytes == 4 and rows == 8 * 8 and columns == 16 * warps
    return (8, 16) if own_columns else (1, columns)


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
    lanes_of = functools.partial(_lanes, warps=warps, number_bytes=number_bytes)
    block_j = min(block_v, (1024 if warps == 1 else 2048) // block_v)  # more at a time spills
    if num_layers == 1 and narrow <= MAX_RESIDENT[number_bytes] and narrow * block_v <= 2 * tile:
        return GenerateTile(
            width=narrow,
            depth=narrow,
            block_k=narrow,
            block_n=narrow,
            block_v=block_v,
            head_k=narrow,
            block_j=block_j,
            resident=True,
            warps=warps,
            lanes=lanes_of(narrow, narrow) + lanes_of(narrow, block_v),
        )
    block_n = narrow if narrow <= 128 else 128 if _whole(hidden_size, 128) == _whole(hidden_size, 64) else 64
    width = _whole(hidden_size, block_n)
    block_k = min(64, width, tile // block_n)
    head_k = max(1, min(narrow, tile // block_v))
    return GenerateTile(
        width=width,
        depth=_whole(width, head_k),
        block_k=block_k,
        block_n=block_n,
        block_v=block_v,
        head_k=head_k,
        block_j=block_j,
        resident=False,
        warps=warps,
        lanes=lanes_of(block_k, block_n) + lanes_of(head_k, block_v),
    )

"""Tile sizes of the Elman kernels (plain Python, imports nothing but the standard library).

No autotuning: these programs take microseconds. Behind each entry stand static figures, per warp and time step:
bench/results/static.json has them (bench/static.py measures, tests/kernels/test_static.py holds it), bench/NOTES.md
says what else was tried.
"""

from dataclasses import dataclass

from .targets import AMD, AMPERE_HOPPER, BLACKWELL, NVIDIA, launch_options


@dataclass(frozen=True)
class Tile:
    """How one program of an Elman kernel is laid out."""

    block_b: int  # batch rows of a program
    side: str  # of W in the dot: "left" (state transposed) or "right"
    warps: int
    targets: tuple[str, ...]  # where it compiles without spills and fits
    shared_kb: int = 99  # shared memory that it may need; 99 is what every target since sm_80 has

    @property
    def w_left(self) -> bool:
        return self.side == "left"

    def launch_options(self, target: str) -> dict[str, object]:
        return launch_options(self.warps, target)


# (kind, width of the state tile): tiles of the forward and the backward kernel, one for each target. Kind is the dot's:
# "ieee" (FMA on NVIDIA, MFMA on AMD), "tf32x3" and "tf32" for fp32; "16bit" for fp16 and bf16; "fp64".
# - ieee: one element of the state for each thread, so that nothing changes its layout but the dot: 2 barriers a step.
# - W on the right up to a width of 32 (64 in 16 bit), where a warp has few of its columns to read again each step.
# - W on the left above, on Ampere and Hopper: it is the wide operand, kept in registers or read by HGMMA straight from
#   shared memory, and the 8 rows are the narrow one. On Blackwell that form takes the way through tensor memory, with
#   more barriers, and spills at 128.
# Figures: forward / backward kernel "plain", per warp and step, on sm_90 by Triton 3.9.
TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    # 87 / 75 instructions, 2 / 2 barriers, 60 / 62 registers
    ("ieee", 16): (Tile(8, "right", 4, NVIDIA), Tile(16, "right", 1, AMD)),
    # 111 / 99 instructions, 2 / 2 barriers, 60 / 62 registers
    ("ieee", 32): (Tile(4, "right", 4, NVIDIA), Tile(16, "right", 2, AMD)),
    # 149 / 146 instructions, 2 / 2 barriers, 56 / 63 registers
    ("ieee", 64): (Tile(2, "right", 4, NVIDIA), Tile(16, "right", 4, AMD)),
    # 252 / 250 instructions, 2 / 2 barriers, 140 / 150 registers
    ("ieee", 128): (Tile(1, "right", 4, NVIDIA), Tile(16, "right", 8, AMD)),
    # 150 / 128 instructions, 6 / 8 barriers, 62 / 62 registers
    ("tf32x3", 16): (Tile(8, "right", 2, NVIDIA),),
    # 189 / 173 instructions, 6 / 8 barriers, 70 / 66 registers
    ("tf32x3", 32): (Tile(8, "right", 4, NVIDIA),),
    # 251 / 278 instructions, 6 / 8 barriers, 87 / 92 registers
    ("tf32x3", 64): (Tile(8, "left", 4, AMPERE_HOPPER), Tile(8, "right", 4, BLACKWELL)),
    # 343 / 462 instructions, 8 / 10 barriers, 139 / 141 registers
    ("tf32x3", 128): (Tile(8, "left", 8, AMPERE_HOPPER, 144), Tile(8, "right", 8, BLACKWELL, 144)),
    # 108 / 82 instructions, 6 / 8 barriers, 56 / 56 registers
    ("tf32", 16): (Tile(8, "right", 2, NVIDIA),),
    # 122 / 98 instructions, 6 / 8 barriers, 56 / 56 registers
    ("tf32", 32): (Tile(8, "right", 4, NVIDIA),),
    # 173 / 151 instructions, 4 / 6 barriers, 89 / 105 registers
    ("tf32", 64): (Tile(8, "left", 4, AMPERE_HOPPER), Tile(8, "right", 4, BLACKWELL)),
    # 207 / 207 instructions, 4 / 6 barriers, 117 / 132 registers
    ("tf32", 128): (Tile(8, "left", 8, AMPERE_HOPPER), Tile(8, "right", 8, BLACKWELL)),
    # 106 / 81 instructions, 4 / 8 barriers, 53 / 48 registers
    ("16bit", 16): (Tile(8, "right", 2, NVIDIA), Tile(16, "right", 1, AMD)),
    # 110 / 85 instructions, 4 / 8 barriers, 50 / 48 registers
    ("16bit", 32): (Tile(8, "right", 4, NVIDIA), Tile(16, "right", 2, AMD)),
    # 180 / 139 instructions, 4 / 8 barriers, 65 / 76 registers
    ("16bit", 64): (Tile(8, "right", 4, NVIDIA), Tile(16, "right", 4, AMD)),
    # 270 / 158 instructions, 4 / 6 barriers, 110 / 128 registers
    ("16bit", 128): (Tile(8, "left", 4, AMPERE_HOPPER), Tile(8, "right", 4, BLACKWELL), Tile(16, "right", 4, AMD)),
    # 331 / 223 instructions, 4 / 6 barriers, 180 / 199 registers
    ("16bit", 256): (Tile(8, "left", 8, AMPERE_HOPPER, 144), Tile(8, "right", 8, BLACKWELL, 144)),
    # 282 / 85 instructions, 6 / 8 barriers, 76 / 64 registers
    ("fp64", 16): (Tile(8, "right", 4, NVIDIA), Tile(16, "right", 1, AMD)),
    # 297 / 92 instructions, 6 / 8 barriers, 80 / 64 registers
    ("fp64", 32): (Tile(8, "right", 4, NVIDIA), Tile(16, "right", 2, AMD)),
    # 544 / 206 instructions, 6 / 8 barriers, 96 / 121 registers
    ("fp64", 64): (Tile(8, "right", 4, AMPERE_HOPPER), Tile(4, "right", 8, BLACKWELL), Tile(16, "right", 4, AMD)),
    # 643 / 302 instructions, 6 / 8 barriers, 161 / 168 registers
    ("fp64", 128): (Tile(8, "right", 8, AMPERE_HOPPER, 144),),
}

# The same for the backward kernel that sums the gradients of weight and table itself, up to MAX_SUM_STEPS steps and
# this V. 16 rows: the least that Triton 3.6 lets a dot sum over. Wider, the sums cost more than a GEMM does. Summing
# makes each step longer by some 200 cycles (0.1 us); a GEMM costs near 10 us however long the sequence is.
MAX_SUM_STEPS = 64
MAX_SUM_VOCAB = 64
SUM_TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    # 277 instructions, 7 barriers, 122 registers
    ("ieee", 16): (Tile(16, "right", 4, NVIDIA), Tile(16, "right", 1, AMD)),
    # 634 instructions, 4 barriers, 96 registers
    ("ieee", 32): (Tile(16, "right", 4, NVIDIA), Tile(16, "right", 2, AMD)),
    # 282 instructions, 10 barriers, 149 registers
    ("tf32x3", 16): (Tile(16, "left", 4, NVIDIA),),
    # 680 instructions, 10 barriers, 239 registers
    ("tf32x3", 32): (Tile(16, "left", 4, NVIDIA),),
    # 154 instructions, 10 barriers, 123 registers
    ("tf32", 16): (Tile(16, "left", 4, NVIDIA),),
    # 261 instructions, 10 barriers, 190 registers
    ("tf32", 32): (Tile(16, "left", 4, NVIDIA),),
    # 124 instructions, 8 barriers, 107 registers
    ("16bit", 16): (Tile(16, "right", 4, NVIDIA), Tile(16, "right", 1, AMD)),
    # 196 instructions, 8 barriers, 161 registers
    ("16bit", 32): (Tile(16, "right", 4, AMPERE_HOPPER), Tile(16, "left", 4, BLACKWELL), Tile(16, "right", 2, AMD)),
    # 216 instructions, 10 barriers, 156 registers
    ("fp64", 16): (Tile(16, "left", 4, NVIDIA), Tile(16, "right", 1, AMD)),
    # 311 instructions, 10 barriers, 204 registers
    ("fp64", 32): (Tile(16, "left", 4, AMPERE_HOPPER), Tile(16, "right", 8, BLACKWELL), Tile(16, "right", 2, AMD)),
}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def block_width(hidden_size: int) -> int:
    """Width of the state tile: a power of two, and at least what a 16-bit dot sums over."""
    return max(16, next_power_of_2(hidden_size))


def find_tile(tiles: dict, kind: str, hidden_size: int, target: str, shared_kb: float = 1024) -> Tile | None:
    """The entry of TILES or SUM_TILES for a hidden size, or None if there is none that fits one program.

    kind: as in TILES; target: "sm_80", "sm_90", "sm_100" or "gfx942"; shared_kb: what the device has for one program.
    """
    entries = tiles.get((kind, block_width(hidden_size)), ())
    return next(
        (tile for tile in entries if target in tile.targets and (target in AMD or tile.shared_kb <= shared_kb)), None
    )

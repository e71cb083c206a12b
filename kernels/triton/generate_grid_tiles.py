"""When a string is decoded across the chip, and in which tile. Imports the standard library alone.

The decoder across the chip (generate_grid_kernels.py) has not run on a GPU. Its times here are the recurrence's of the
prototype (one row, H200, November 2026, elman_grid_tiles.py) and, derived, a microsecond for a choice: of the compiled
code's instructions a step some 120 choose the largest of 28 logits, and 780 draw among the best of 90. The decoder of
one program (generate_kernels.py) was timed there in fp32, greedy: 6.5 us an id at H=256, 15 at 512. Since then it has
lost its bank conflicts, which were at most 3.4 and 3 us of that. Until both are timed beside each other the first is
taken where it is predicted to be faster than what then remains, by the recurrence's margins.
"""

from dataclasses import dataclass

from .elman_grid_tiles import ELSEWHERE, MARGIN
from .targets import NVIDIA, TileOfWarps

MAX_GRID_VOCAB = 128  # each warp has all logits, a lane four of them
CHOICE_US = 1.0


@dataclass(frozen=True)
class GenerateGridTile(TileOfWarps):
    """How the programs of a team are laid out, by FMA and with a row each; elman_grid_forms.py has the words."""

    form, rows = "fma", 1
    units: int
    warps: int
    us: float  # a step of the recurrence
    lanes_k: int = 8
    by_part: bool = True
    targets: tuple[str, ...] = NVIDIA

    def programs(self, hidden_size: int) -> int:
        return -(-hidden_size // self.units)


# The most registers of a thread for weights, by warps. Four warps where they do, as each reads all partial logits.
MOST_REGISTERS = {4: 96, 8: 128}
# Microseconds a step of the recurrence, by the most hidden units.
STEP_US = {256: 1.24, 512: 1.36, 1024: 1.74, 2048: 2.8}
# Microseconds an id that the decoder of one program takes at least on an H200, one sequence, by hidden size; in 16 bit
# it reads half as much, and of L layers 2L - 1 matrices, more than L times as much: derived. Each has a multiprocessor,
# so many sequences take as long as one.
ONE_PROGRAM_US = {256: 3.1, 512: 12.0}


def grid_tile(hidden_size: int, number_bytes: int, num_layers: int = 1) -> GenerateGridTile | None:
    """The tile for H, L and the bytes of a number in registers (4; 8 has none), whatever is faster."""
    if number_bytes != 4 or hidden_size > max(STEP_US):
        return None
    # Of each matrix a warp has 16 rows of its part of k, in pieces of 32.
    registers = {warps: (2 * num_layers - 1) * 16 * -(-hidden_size // (32 * warps)) for warps in MOST_REGISTERS}
    warps = next((warps for warps, most in MOST_REGISTERS.items() if registers[warps] <= most), None)
    if warps is None:
        return None
    us = STEP_US[min(most for most in STEP_US if hidden_size <= most)]
    return GenerateGridTile(16, warps, us)


def one_program_us(hidden_size: int, itemsize: int, num_layers: int = 1) -> float:
    """Microseconds an id of the decoder of one program, at least: by the next smaller hidden size of the table."""
    us = max((us for width, us in ONE_PROGRAM_US.items() if width <= hidden_size), default=0.0)
    return us * num_layers * min(itemsize, 4) / 4


def grid_us(tile: GenerateGridTile, hidden_size: int, batch: int, processors: int, num_layers: int = 1) -> float:
    """Microseconds of an id of each of `batch` sequences; infinite where a team does not fit."""
    at_once = processors // tile.programs(hidden_size)
    return (tile.us * num_layers + CHOICE_US) * -(-batch // at_once) if at_once else float("inf")


def why_not_grid(
    hidden_size: int, vocab: int, num_layers: int, batch: int, itemsize: int, target: str, processors: int
) -> str | None:
    """None if the decoder goes across the chip, else one clause that says why not.

    itemsize: bytes of a weight; target: a GPU of the tile tables, or ""; processors: its multiprocessors.
    """
    if vocab > MAX_GRID_VOCAB:
        return f"vocabulary {vocab} is above the {MAX_GRID_VOCAB} of a grid of programs"
    tile = grid_tile(hidden_size, max(itemsize, 4), num_layers)
    if tile is None or target not in tile.targets:
        of_layers = f" and {num_layers} layers" if num_layers > 1 else ""
        return f"no grid of programs for hidden size {hidden_size}{of_layers} in {8 * itemsize} bits on this GPU"
    ours = grid_us(tile, hidden_size, batch, processors, num_layers)
    theirs = one_program_us(hidden_size, itemsize, num_layers)
    if ours == float("inf"):
        return f"{tile.programs(hidden_size)} programs do not run at once on {processors} multiprocessors"
    if ours * MARGIN.get(target, ELSEWHERE) > theirs:
        known = f"at least {theirs:.1f}" if theirs else "not timed"
        return f"a grid of programs is not known to be faster: {ours:.1f} us an id predicted, one program {known}"
    return None

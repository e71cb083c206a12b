"""Which form and tile an Elman kernel takes, by operand, width, target and rows. Imports the standard library alone.

No autotuning: these programs take microseconds. Each entry says why it is there: a measurement in microseconds a step
(H200, Triton 3.6, November 2026; cuDNN's own kernel beside it) or what it was derived from. Static figures of every
entry, per warp and step, are in bench/results/static.json; bench/NOTES.md says what else was tried.
"""

from dataclasses import dataclass, replace

from .targets import AMD, AMPERE_HOPPER, BLACKWELL, NVIDIA, TileOfWarps

SOME, ALL = 2.0, float("inf")


@dataclass(frozen=True)
class Tile(TileOfWarps):
    """How one program of an Elman kernel is laid out; elman_forms.py has the words."""

    form: str  # "fma"; "mma" or, with float32 in three products, "mma3"
    rows: int  # batch rows of a program
    lanes_n: int  # fma: lanes of a warp along the units
    lanes_k: int  # fma: lanes that share a unit
    warps: int
    targets: tuple[str, ...]
    why: str
    most: float = ALL  # batch rows, of all directions, for each multiprocessor, up to which this entry is taken
    ahead: int = 4  # steps by which input is loaded before it is needed
    ahead_sums: int = 0  # the same of the backward kernel that sums the gradient of W; 0: it does not compile to fit
    ahead_inputs: int = 0  # the same of the forward kernel that makes the product with W_ih; 0: there is none
    in_shared: int = 0  # mma: pieces of W in shared memory
    shared_kb: int = 99  # shared memory that it may need; 99 is what every target since sm_80 has

    @property
    def most_inputs(self) -> int:
        """Features of which the forward kernel makes the product with W_ih itself."""
        return min(64, 32 * self.lanes_k) if self.ahead_inputs else 0


def _fma(rows, lanes_n, lanes_k, warps, why, most=ALL, targets=NVIDIA, **options) -> Tile:
    return Tile("fma", rows, lanes_n, lanes_k, warps, targets, why, most, **options)


def _mma(form, warps, why, most=ALL, targets=NVIDIA, **options) -> Tile:
    return Tile(form, 8, 1, 1, warps, targets, why, most, **options)


# AMD has the fma form alone: mma.sync is NVIDIA's, and sixty-four lanes make a warp.
_AMD_32, _AMD_64, _AMD_128 = (
    _fma(1, 32, 2, warps, "derived from NVIDIA's tile, 64 lanes a warp", targets=AMD, ahead_sums=4, ahead_inputs=6)
    for warps in (1, 2, 4)
)
_AMD_16 = _fma(1, 16, 4, 1, "derived from NVIDIA's tile, 64 lanes a warp", targets=AMD, ahead_sums=4, ahead_inputs=6)
_FMA_16 = _fma(1, 16, 2, 1, "derived from width 32: a warp holds all of W", ahead_sums=4, ahead_inputs=6)
_FMA_32 = _fma(
    1,
    32,
    1,
    1,
    "0.12 forward and 0.10 backward at B=1, 0.23 and 0.32 at B=1024; cuDNN 0.24, 0.37, 0.47, 0.62",
    ahead_sums=4,
    ahead_inputs=6,
)
_FMA_64 = _fma(
    1,
    16,
    2,
    4,
    "0.15 and 0.13 at B=1, 0.22 and 0.27 at B=256; cuDNN 0.30, 0.45, 0.42, 0.69",
    SOME,
    ahead_sums=4,
    ahead_inputs=6,
)
_FMA_64_ROWS = _fma(2, 32, 1, 2, "0.54 and 0.56 at B=1024; cuDNN 0.57 and 0.78")
_FMA_128 = _fma(
    1, 16, 2, 8, "0.29 and 0.26 at B=1, 0.31 and 0.30 at B=128; cuDNN 0.44, 0.59, 0.48, 0.85", 1.0, ahead_sums=2
)
_FMA_128_ROWS = _fma(2, 16, 2, 8, "0.49 and 0.50 at B=256; cuDNN 0.53 and 0.89", 4.0)

_MMA3_128 = "derived: tf32's 0.58 at B=1024 with three products; fma 1.9"
_MMA_256 = "0.72 forward at B=1, 0.93 at B=1024, with all of W in registers; backward derived"

# (kind, width): entries for each target, those for few rows first. Kind: "fp32" exact, "tf32" where ten bits of
# mantissa are allowed, "16bit" for fp16 and bf16, "fp64".
TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("fp32", 16): (_FMA_16, _AMD_16),
    ("fp32", 32): (_FMA_32, _AMD_32),
    ("fp32", 64): (_FMA_64, _FMA_64_ROWS, _AMD_64),
    ("fp32", 128): (
        _FMA_128,
        _FMA_128_ROWS,
        _mma("mma3", 8, _MMA3_128, ahead=2, in_shared=4, shared_kb=144, targets=AMPERE_HOPPER),
        _mma("mma3", 8, _MMA3_128, ahead=2, in_shared=8, shared_kb=144, targets=BLACKWELL),
        replace(_FMA_128_ROWS, most=ALL, why="1.97 and 2.00 at B=1024; cuDNN 1.92 and 2.81; mma3 spills on sm_120"),
        _AMD_128,
    ),
    ("tf32", 16): (_FMA_16,),
    ("tf32", 32): (_FMA_32,),
    ("tf32", 64): (_FMA_64, _mma("mma", 4, "0.41 forward at B=1024; fma 0.54, cuDNN 0.57; backward derived")),
    ("tf32", 128): (
        _FMA_128,
        _fma(2, 16, 2, 8, _FMA_128_ROWS.why, SOME),
        _mma("mma", 8, "0.58 forward at B=1024; cuDNN 1.92; backward derived"),
    ),
    ("16bit", 16): (_FMA_16, _AMD_16),
    ("16bit", 32): (_fma(1, 32, 1, 1, "as in fp32: W is float32 in registers", ahead_sums=4, ahead_inputs=6), _AMD_32),
    ("16bit", 64): (
        _fma(1, 16, 2, 4, "as in fp32; mma 0.20 at B=1 and 0.37 at B=256", SOME, ahead_sums=4, ahead_inputs=6),
        _mma("mma", 4, "0.44 forward at B=1024; fma 0.54; backward derived"),
        _AMD_64,
    ),
    ("16bit", 128): (
        _fma(1, 16, 2, 8, "as in fp32; mma 0.34 at B=1 and 0.44 at B=128", 1.0, ahead_sums=2),
        _mma("mma", 8, "0.44 forward at B=256, 0.51 at B=1024; fma 0.49 and 1.9; backward derived"),
        _AMD_128,
    ),
    ("16bit", 256): (
        _mma("mma", 8, _MMA_256, ahead=2, in_shared=4, shared_kb=144, targets=("sm_90", "sm_100")),
        _mma("mma", 8, _MMA_256, ahead=2, in_shared=8, shared_kb=144, targets=("sm_80",)),
    ),
    ("fp64", 16): (_fma(1, 16, 2, 1, "derived from fp32's"), replace(_AMD_16, ahead_sums=0)),
    ("fp64", 32): (_fma(1, 32, 1, 1, "derived from fp32's"), replace(_AMD_32, ahead_sums=0)),
    ("fp64", 64): (_fma(1, 16, 2, 4, "derived from fp32's"), replace(_AMD_64, ahead_sums=0)),
    ("fp64", 128): (
        _fma(1, 16, 2, 8, "derived from fp32's: W takes half the registers"),
        replace(_AMD_128, ahead_sums=0),
    ),
}

# Of the forward kernel that makes the product with W_ih: no more features than 32 registers a thread hold, and so few
# steps that a matrix product before it, near 5 us and a launch, would take longer. Derived from instructions: a step
# becomes 0.02 (16 features) to 0.06 us (64) longer.
MAX_INPUT_STEPS = 256

# Of the backward kernel that sums the gradient of W as well, in registers that cost it neighbours: where it compiles
# without spills, while all programs run at once, and for so few steps that a matrix product afterwards, near 10 us
# however few they are, would take longer. Derived from instructions: a step becomes 0.03 (width 32) to 0.1 us (128)
# longer.
MAX_SUM_STEPS = {16: 512, 32: 512, 64: 256, 128: 128}


# Of the kernels that sum afterwards (elman_sums_kernels.py). Partial sums and elements at a time: so many that all
# loads of a program are under way together.
TOKEN_ROWS, TOKEN_WARPS = 64, 4
PARTIAL_SUMS, PARTIAL_ELEMENTS, PARTIAL_WARPS = 256, 32, 8


def token_blocks(classes: int, columns: int) -> tuple[int, int]:
    """Classes and columns of a program that sums rows by token id."""
    return min(64, max(16, next_power_of_2(classes))), min(32, max(16, next_power_of_2(columns)))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def find_tile(
    kind: str, hidden_size: int, target: str, rows_per_processor: float = 0.0, shared_kb: float = 1024
) -> Tile | None:
    """The entry of TILES for a hidden size, or None if there is none that fits one program.

    kind: as in TILES; target: "sm_80", "sm_90", "sm_100" or "gfx942"; rows_per_processor: batch rows times directions
    over the device's multiprocessors; shared_kb: what the device has for one program.
    """
    entries = TILES.get((kind, max(16, next_power_of_2(hidden_size))), ())
    fitting = (tile for tile in entries if target in tile.targets and tile.shared_kb <= max(shared_kb, 99))
    return next((tile for tile in fitting if rows_per_processor <= tile.most), None)


def projected_steps(tile: Tile, features: int) -> int:
    """The most steps for which the forward kernel makes the product of input and W_ih itself; 0: for none."""
    return MAX_INPUT_STEPS if 0 < features <= tile.most_inputs else 0


def sum_steps(tile: Tile, hidden_size: int, programs: int, processors: int) -> int:
    """The most steps for which the backward kernel, in so many programs, sums the gradient of W itself; 0: for none."""
    if not tile.ahead_sums or programs > tile.programs_per_core * processors:
        return 0
    return MAX_SUM_STEPS.get(max(16, next_power_of_2(hidden_size)), 0)

"""When the recurrence goes across the chip, and in which tile. Imports the standard library alone.

Each tile has the microseconds of a step that its prototype took on an H200 (Triton 3.6, November 2026, forward, as many
teams at work as there is room for) at the hidden size it is for. CUDNN has torch.nn.RNN's on the same device: the whole
forward pass in a CUDA graph, by batch size. Rows for which the chip has no room go in several launches, one after the
other, and the choice is by the time of all of them. Where nothing was measured (backward, hidden sizes between, three
products) it is by the next larger size's forward figure, or says "derived"; an advantage of less than MARGIN is none.
"""

from dataclasses import dataclass

from .targets import NVIDIA, TileOfWarps


@dataclass(frozen=True)
class Chip:
    """What a device has for programs that run at once: of each multiprocessor, but for their number."""

    processors: int
    registers: int = 65536
    shared: int = 233472  # bytes
    threads: int = 2048
    programs: int = 32


# A100, H100 and H200 (SXM), B200.
CHIPS = {"sm_80": Chip(108, shared=167936), "sm_90": Chip(132), "sm_100": Chip(148)}
_WARP_REGISTERS = 256  # registers are given to a warp by so many,
_SHARED_RESERVED = 1024  # and a program has so many bytes of shared memory besides its own


def programs_at_once(registers: int, shared: int, warps: int, chip: Chip) -> int:
    """Programs that run at once on a chip, by the rules of CUDA's occupancy.

    registers: a thread; shared: bytes a program.
    """
    of_warp = -(-registers * 32 // _WARP_REGISTERS) * _WARP_REGISTERS
    by_registers = 4 * (chip.registers // 4 // of_warp) // warps  # a multiprocessor has four parts
    by_shared = chip.shared // (shared + _SHARED_RESERVED)
    return chip.processors * min(by_registers, by_shared, chip.threads // (32 * warps), chip.programs)


@dataclass(frozen=True)
class GridTile(TileOfWarps):
    """How the programs of a grid are laid out; elman_grid_forms.py has the words."""

    form: str  # "mma"; with float32 in three products "mma3"; "fma"
    units: int
    rows: int
    warps: int
    us: float  # a step
    why: str
    most_chains: int = 4  # mma: sums that do not wait for each other
    lanes_k: int = 8  # fma
    ahead: int = 2
    by_part: bool = True  # derived: fewer additions to one counter, and a warp waits for what it reads alone
    targets: tuple[str, ...] = NVIDIA

    def programs(self, hidden_size: int) -> int:
        return -(-hidden_size // self.units)

    def describe(self, hidden_size: int, itemsize: int, rows: int) -> str:
        """One line: what is resident where."""
        name = {"fma": "FMA", "mma": "tensor cores", "mma3": "tensor cores in three products"}[self.form]
        programs, teams = self.programs(hidden_size), -(-rows // self.rows)
        resident = hidden_size * self.units * itemsize
        return (
            f"a grid by {name}: {programs} programs of {self.warps} warps a team, each with {self.units} rows of W_hh "
            f"({resident} bytes) in registers, {teams} teams of {self.rows} batch rows ({self.why})"
        )


def _mma(units, rows, warps, us, **options) -> GridTile:
    return GridTile("mma", units, rows, warps, us, f"prototype: {us} us a step forward", **options)


def _mma3(units, rows, warps, us) -> GridTile:
    return GridTile("mma3", units, rows, warps, us, "derived: tf32's time and its products twice more")


def _fma(rows, warps, us, why="derived: it compiles without spills, and no time is known") -> GridTile:
    return GridTile("fma", 16, rows, warps, us, why)


# (kind, most hidden units): tiles, those of fewer rows first. Kinds as in elman_tiles.py.
GRID_TILES: dict[tuple[str, int], tuple[GridTile, ...]] = {
    ("tf32", 256): (_mma(16, 8, 8, 1.56), _mma(16, 16, 4, 1.97)),
    ("tf32", 512): (_mma(16, 8, 8, 1.68), _mma(16, 16, 8, 2.36)),
    ("tf32", 1024): (_mma(16, 8, 8, 2.37), _mma(16, 16, 8, 2.53)),
    ("tf32", 2048): (_mma(16, 8, 8, 2.77, most_chains=2),),
    ("16bit", 256): (_mma(16, 8, 4, 1.58), _mma(16, 16, 4, 1.53)),
    ("16bit", 512): (_mma(16, 8, 8, 1.62), _mma(16, 16, 4, 1.80)),
    ("16bit", 1024): (_mma(16, 8, 8, 2.01), _mma(32, 16, 8, 2.50)),
    ("16bit", 2048): (_mma(16, 8, 8, 2.48), _mma(16, 16, 8, 3.67)),
    ("fp32", 256): (_mma3(16, 8, 8, 1.7), _mma3(16, 16, 4, 2.4)),
    ("fp32", 512): (_mma3(16, 8, 8, 1.9), _mma3(16, 16, 8, 2.9)),
    ("fp32", 1024): (_mma3(16, 8, 8, 2.8),),
    ("fp32", 2048): (_fma(1, 8, 2.8, "derived: FMA at one row has half the instructions of tf32's eight"),),
    ("fp64", 256): (_fma(2, 4, 3.0),),
    ("fp64", 512): (_fma(2, 8, 3.0),),
    ("fp64", 1024): (_fma(2, 8, 4.0),),
}

# Microseconds a step of torch.nn.RNN forward on an H200, by (kind, hidden size): {batch: time}; in a CUDA graph, and
# what is persistent in float16 eager. cuDNN multiplies float32 exactly, whatever is allowed, where it is persistent; of
# its hidden sizes between 128 and 256 nothing was measured, so they count as 128.
CUDNN: dict[tuple[str, int], dict[int, float]] = {
    ("fp32", 255): {1: 0.44, 128: 0.48},
    ("fp32", 256): {1: 1.9, 16: 1.9, 64: 2.0, 128: 2.1},
    ("fp32", 512): {1: 4.5, 16: 5.8, 64: 8.9, 128: 8.1},
    ("fp32", 1024): {1: 5.1, 16: 13.6, 64: 15.0, 128: 15.8},
    ("fp32", 2048): {1: 8.7, 16: 17.8, 64: 20.9, 128: 21.2},
    ("bf16", 256): {1: 4.1, 128: 5.0},
    ("bf16", 512): {1: 4.6, 128: 5.8},
    ("bf16", 1024): {1: 5.2, 128: 7.2},
    ("bf16", 2048): {1: 7.2, 128: 10.0},
    ("fp16", 255): {1: 0.44, 128: 0.48},
    ("fp16", 256): {1: 2.3, 16: 1.45, 64: 1.8},
    ("fp16", 512): {1: 4.6, 16: 3.5, 64: 4.7},
    ("fp16", 1024): {1: 5.2, 16: 3.5, 64: 5.1},
    ("fp16", 2048): {1: 7.2, 128: 10.0},
}
CUDNN |= {("tf32", width): times for (kind, width), times in CUDNN.items() if kind == "fp32"}
# Times ours that cuDNN's time has to be. Neither was measured on other chips than sm_90's.
MARGIN = {"sm_90": 1.2}
ELSEWHERE = 2.0


def grid_width(kind: str, hidden_size: int) -> int | None:
    """The hidden size of GRID_TILES that one of `hidden_size` has its tiles from; None beyond the last."""
    return min((width for of, width in GRID_TILES if of == kind and width >= hidden_size), default=None)


def grid_us(tile: GridTile, hidden_size: int, rows: int, processors: int) -> float:
    """Microseconds of a step of all rows, a program on each multiprocessor; infinite where a team does not fit."""
    at_once = processors // tile.programs(hidden_size)
    return tile.us * -(-rows // (tile.rows * at_once)) if at_once else float("inf")


def cudnn_us(dtype: str, hidden_size: int, rows: int) -> float | None:
    """Microseconds of a step of torch.nn.RNN, by the next larger hidden size and the next smaller batch measured."""
    width = min((width for of, width in CUDNN if of == dtype and width >= hidden_size), default=None)
    if width is None:
        return None
    times = CUDNN[dtype, width]
    return times[max(batch for batch in times if batch <= max(rows, 1))]


def find_grid_tile(
    kind: str, hidden_size: int, target: str, rows: int, processors: int, dtype: str | None = None
) -> GridTile | None:
    """The fastest tile for so many rows of all directions, or None if none fits or cuDNN is as fast.

    kind: as in GRID_TILES; dtype: as in CUDNN, where it is not the kind.
    """
    width = grid_width(kind, hidden_size)
    theirs = cudnn_us(dtype or kind, hidden_size, rows)
    if width is None or theirs is None:
        return None
    tiles = [tile for tile in GRID_TILES[kind, width] if target in tile.targets]
    best = min(tiles, key=lambda tile: grid_us(tile, hidden_size, rows, processors), default=None)
    if best is None:
        return None
    ours = grid_us(best, hidden_size, rows, processors)
    return best if ours * MARGIN.get(target, ELSEWHERE) <= theirs else None

"""Tile sizes of the linear cross-entropy kernels (plain Python, imports nothing but the standard library).

Behind each entry stand static figures, as in elman_tiles.py: bench/results/static.json has them. They say that a tile
compiles without spills and which instructions it has; none of it has been timed on a GPU.
"""

from dataclasses import dataclass

from .targets import AMD, AMPERE_HOPPER, NVIDIA, TileOfWarps, launch_options

AMPERE = ("sm_80",)
HOPPER_BLACKWELL = ("sm_90", "sm_100")
EVERY = NVIDIA + AMD
ANY = 1 << 62
# sum_partials_kernel's block: the partial sums of all programs, of which there are no more than this, in loads that are
# all on their way at once; few columns, so that many programs share the sums of a small model.
SUM_PROGRAMS, SUM_COLUMNS, SUM_WARPS = 1024, 8, 8


@dataclass(frozen=True)
class Tile(TileOfWarps):
    """How one program is laid out, and the largest H and V that it is for."""

    max_h: int
    max_v: int
    block_n: int  # rows
    block_v: int  # classes
    block_h: int  # of H at a time; "classes" and "rows" hold all of it
    warps: int
    stages: int  # of the software pipeline over the loop
    targets: tuple[str, ...]  # where it compiles without spills; every tile fits in 99 KB of shared memory, AMD's in 64
    multiple: int = 1  # what H must be a multiple of
    halves: bool = False  # "classes": the three products of tf32x3 are the kernel's own

    def takes(self, hidden_size: int, classes: int) -> bool:
        return hidden_size <= self.max_h and classes <= self.max_v and hidden_size % self.multiple == 0

    def launch_options(self, target: str) -> dict[str, object]:
        return launch_options(self.warps, target, self.stages)


# (step, kind): the first entry for H, V and the target is used. Kind is the dot's, as in elman_tiles.py. Steps:
# - "loss": loss_kernel. A small tile for a character model; large ones for the rest, where an H without a remainder
#   needs no mask along it and leaves registers for more.
# - "classes": grad_by_classes_kernel. Its three products and the sums of a weight gradient bound it by registers.
# - "rows": grad_by_rows_kernel, in use beside "classes" where one of its tiles does not have all classes.
# - "logits": grad_logits_kernel. For an H without tiles in "classes" and "rows", where GEMMs do better anyhow.
TILES: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("loss", "ieee"): (Tile(32, 32, 64, 32, 32, 4, 2, EVERY), Tile(ANY, ANY, 64, 64, 16, 8, 2, EVERY)),
    ("loss", "tf32x3"): (
        Tile(32, 32, 64, 32, 32, 4, 2, NVIDIA),
        Tile(ANY, ANY, 128, 128, 32, 8, 2, HOPPER_BLACKWELL, multiple=32),
        Tile(ANY, ANY, 64, 64, 32, 8, 1, HOPPER_BLACKWELL),
        Tile(ANY, ANY, 64, 64, 16, 8, 2, AMPERE),
    ),
    ("loss", "tf32"): (
        Tile(32, 32, 64, 32, 32, 4, 2, NVIDIA),
        Tile(ANY, ANY, 128, 128, 32, 8, 2, AMPERE_HOPPER, multiple=32),
        Tile(ANY, ANY, 64, 64, 32, 8, 2, NVIDIA),
    ),
    ("loss", "16bit"): (
        Tile(32, 32, 64, 32, 32, 4, 2, EVERY),
        Tile(ANY, ANY, 128, 128, 32, 8, 2, EVERY, multiple=32),
        Tile(ANY, ANY, 64, 64, 32, 8, 2, EVERY),
    ),
    ("loss", "fp64"): (Tile(32, 32, 32, 32, 32, 4, 2, EVERY), Tile(ANY, ANY, 64, 64, 16, 8, 2, EVERY)),
    ("classes", "ieee"): (Tile(32, 32, 32, 32, 32, 8, 2, EVERY), Tile(64, ANY, 16, 64, 64, 8, 1, EVERY)),
    ("classes", "tf32x3"): (
        Tile(32, 32, 16, 32, 32, 1, 1, HOPPER_BLACKWELL, multiple=32, halves=True),
        Tile(32, 32, 16, 32, 32, 1, 1, NVIDIA),
        Tile(64, ANY, 16, 32, 64, 8, 1, NVIDIA),
    ),
    ("classes", "tf32"): (Tile(32, 32, 16, 32, 32, 1, 1, NVIDIA), Tile(64, ANY, 32, 64, 64, 8, 1, NVIDIA)),
    ("classes", "16bit"): (
        Tile(32, 32, 16, 32, 32, 1, 1, NVIDIA),
        Tile(32, 32, 32, 32, 32, 4, 2, AMD),
        Tile(64, ANY, 32, 32, 64, 8, 1, EVERY),
        Tile(128, ANY, 32, 64, 128, 8, 1, NVIDIA),
    ),
    ("classes", "fp64"): (Tile(32, 32, 16, 32, 32, 8, 1, EVERY), Tile(64, ANY, 16, 32, 64, 8, 1, AMPERE_HOPPER + AMD)),
    ("rows", "ieee"): (Tile(64, ANY, 32, 32, 64, 8, 1, EVERY),),
    ("rows", "tf32x3"): (Tile(64, ANY, 32, 64, 64, 8, 1, NVIDIA),),
    ("rows", "tf32"): (Tile(64, ANY, 64, 64, 64, 8, 2, HOPPER_BLACKWELL), Tile(64, ANY, 32, 64, 64, 8, 1, AMPERE)),
    ("rows", "16bit"): (Tile(64, ANY, 64, 64, 64, 8, 2, EVERY), Tile(128, ANY, 64, 64, 128, 8, 2, NVIDIA)),
    ("rows", "fp64"): (Tile(64, ANY, 16, 32, 64, 8, 1, EVERY),),
    ("logits", "ieee"): (Tile(ANY, ANY, 64, 64, 16, 8, 2, EVERY),),
    ("logits", "tf32x3"): (
        Tile(ANY, ANY, 128, 128, 32, 8, 2, HOPPER_BLACKWELL, multiple=32),
        Tile(ANY, ANY, 64, 64, 32, 8, 1, NVIDIA),
    ),
    ("logits", "tf32"): (
        Tile(ANY, ANY, 128, 128, 32, 8, 3, NVIDIA, multiple=32),
        Tile(ANY, ANY, 64, 64, 32, 8, 2, NVIDIA),
    ),
    ("logits", "16bit"): (
        Tile(ANY, ANY, 128, 128, 32, 8, 3, EVERY, multiple=32),
        Tile(ANY, ANY, 64, 64, 32, 8, 2, EVERY),
    ),
    ("logits", "fp64"): (Tile(ANY, ANY, 64, 64, 16, 8, 2, EVERY),),
}


def find_tile(step: str, kind: str, hidden_size: int, classes: int, target: str) -> Tile | None:
    """The entry for these sizes, or None if there is none.

    step, kind: as in TILES; target: "sm_80", "sm_90", "sm_100" or "gfx942".
    """
    return next((t for t in TILES.get((step, kind), ()) if t.takes(hidden_size, classes) and target in t.targets), None)

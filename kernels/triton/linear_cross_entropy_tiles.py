"""Tile sizes of the linear cross-entropy kernels (plain Python, imports nothing but the standard library)."""

from dataclasses import dataclass

from .elman_tiles import AMD, NVIDIA

ANY = 1 << 62


@dataclass(frozen=True)
class Tile:
    """How one program is laid out, and the largest H and V that it is for."""

    max_h: int
    max_v: int
    block_n: int  # rows
    block_v: int  # classes
    block_h: int  # of H at a time; "classes" and "rows" need all of it
    warps: int
    stages: int
    targets: tuple[str, ...]

    def launch_options(self, target: str) -> dict[str, object]:
        """Compiler options. All registers are allowed: left alone, ptxas spills to reach a rounder number."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if target in AMD else options | {"maxnreg": 255}

    @property
    def programs_per_core(self) -> int:
        """How many of them one multiprocessor holds, going by registers."""
        return max(1, 8 // self.warps)


TILES: dict[tuple[str, str], tuple[Tile, ...]] = {
    (step, kind): (
        (Tile(32, 32, 64, 32, 32, 4, 2, NVIDIA + AMD), Tile(ANY, ANY, 64, 64, 32, 4, 2, NVIDIA + AMD))
        if step == "loss"
        else (Tile(32, 32, 32, 32, 32, 4, 2, NVIDIA + AMD), Tile(64, ANY, 32, 64, 64, 8, 2, NVIDIA + AMD))
        if step == "classes"
        else (Tile(32, ANY, 32, 32, 32, 4, 2, NVIDIA + AMD), Tile(64, ANY, 32, 64, 64, 8, 2, NVIDIA + AMD))
        if step == "rows"
        else (Tile(ANY, ANY, 64, 64, 32, 4, 2, NVIDIA + AMD),)
    )
    for step in ("loss", "classes", "rows", "logits")
    for kind in ("ieee", "tf32x3", "tf32", "16bit", "fp64")
}


def find_tile(step: str, kind: str, hidden_size: int, classes: int, target: str) -> Tile | None:
    """The first entry for these sizes, or None if there is none.

    step, kind: as in TILES; target: "sm_80", "sm_90", "sm_100" or "gfx942".
    """
    entries = TILES.get((step, kind), ())
    return next(
        (t for t in entries if hidden_size <= t.max_h and classes <= t.max_v and target in t.targets),
        None,
    )

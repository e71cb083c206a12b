"""Bank conflicts that are known and why they stay: what bench/static.py asks for before it records any.

A tile whose program needs over NOTABLE times the least possible wavefronts, in a turn of its loop or beside it, is a
fault unless a statement here is about it. A statement about no such tile is a fault too, so that it leaves with its
cause. How many conflicts a tile has is in bench/results/static.json, and more than those is a fault as well.
"""

import re
from dataclasses import dataclass

NOTABLE = 1.15


@dataclass(frozen=True)
class Statement:
    tiles: str  # a regular expression for the beginning of their names
    reason: str


FMA_DOT = "Triton's dot by FMA reads its right operand, which lies along K, at a stride of K"
STATEMENTS = (
    Statement("(loss|classes|rows|logits) ieee ", f"{FMA_DOT}; operations on NVIDIA ask for tf32x3, and AMD has MFMA"),
    Statement("elman (forward|backward\\w*) (ieee|fp64) ", FMA_DOT),
)


def statement(name: str) -> Statement | None:
    """The statement about a tile, by the name of its case."""
    return next((found for found in STATEMENTS if re.match(found.tiles, name)), None)


def notable(figures: dict) -> bool:
    """Whether a tile has more conflicts than may go without a statement."""
    return any(
        figures.get(total, 0) > NOTABLE * (figures[total] - figures[conflicts])
        for total, conflicts in (("wavefronts", "conflicts"), ("wavefronts_once", "conflicts_once"))
        if total in figures
    )


def faults(name: str, figures: dict) -> list[str]:
    """What is wrong with a tile's conflicts, whatever the record says."""
    problems = []
    if figures.get("unknown_accesses"):
        problems.append(f"{figures['unknown_accesses']} accesses to shared memory of unknown wavefronts")
    if notable(figures) and statement(name) is None:
        problems.append(
            f"{figures['conflicts']} of {figures['wavefronts']} wavefronts are bank conflicts (outside of the loop "
            f"{figures['conflicts_once']} of {figures['wavefronts_once']}) and no statement says why"
        )
    return problems

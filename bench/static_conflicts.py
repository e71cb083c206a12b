"""Bank conflicts that are known and why they stay: what bench/static.py asks for before it records any.

A tile whose program needs over NOTABLE times the least possible wavefronts, and over FEW more, in a turn of its loop or
beside it, is a fault unless a statement here is about it. A statement about no such tile is a fault too, so that it
leaves with its cause. How many conflicts a tile has is in bench/results/static.json; more than those is a fault too.
"""

import re
from dataclasses import dataclass

NOTABLE, FEW = 1.15, 16


@dataclass(frozen=True)
class Statement:
    tiles: str  # a regular expression for the beginning of their names
    reason: str
    unknown: int = 0  # accesses whose address depends on what comes out of memory, and why they conflict with nothing


FMA_DOT = "Triton's dot by FMA reads its right operand, which lies along K, at a stride of K"
STATEMENTS = (
    Statement("(loss|classes|rows|logits) ieee ", f"{FMA_DOT}; operations on NVIDIA ask for tf32x3, and AMD has MFMA"),
    Statement("(loss|classes|rows|logits) fp64 ", f"{FMA_DOT}: so it is on sm_100 before Triton 3.9, which takes DMMA"),
    Statement(
        "rows tf32 H64 ", "g is stored transposed for HGMMA; half the rows a program would double the other reads"
    ),
    Statement("classes tf32 H64 ", "as in rows, for the weight's gradient"),
    Statement(
        "(loss|logits) tf32x3 H32\\* ", "sm_100: the low parts of both operands are stored once more for tcgen05"
    ),
    Statement("loss 16bit H32 ", "sm_80: changes of layout, 48 wavefronts once a program"),
    Statement(
        "(sum partials|partial sums)",
        "Triton 3.6 exchanges sums over warps with the summed axis innermost; once a program",
    ),
    Statement("token rows fp64", f"{FMA_DOT}: so it is on sm_120, whose Triton has no DMMA"),
    Statement(
        r"language model H\d+ V\d+ warps8 ",
        "eight warps of few units each: lanes share out a state, and quarters of a warp that want the same of it wait; "
        "unknown as below",
        unknown=4,
    ),
    Statement(
        "language model H",
        "a row of the gradient's table, whichever token's it is: lanes at neighbouring units meet no conflict",
        unknown=8,
    ),
    Statement(
        "language model (sums|update) ",
        "sums over warps are exchanged with the summed axis innermost; once a program, the loss's by one of them",
        unknown=8,
    ),
    Statement(
        "generate grid ",
        "the chosen id's row of the table in shared memory, 32 or 64 bytes side by side",
        unknown=1,
    ),
    Statement("generate ", "Triton 3.6 exchanges sums over warps with the summed axis innermost"),
)


def statement(name: str) -> Statement | None:
    """The statement about a tile, by the name of its build."""
    return next((found for found in STATEMENTS if re.match(found.tiles, name)), None)


def notable(figures: dict) -> bool:
    """Whether a tile has more conflicts than may go without a statement."""
    return any(
        figures[conflicts] > FEW and figures[total] > NOTABLE * (figures[total] - figures[conflicts])
        for total, conflicts in (("wavefronts", "conflicts"), ("wavefronts_once", "conflicts_once"))
        if total in figures
    )


def faults(name: str, figures: dict) -> list[str]:
    """What is wrong with a tile's conflicts, whatever the record says."""
    problems = []
    known = statement(name)
    if figures.get("unknown_accesses", 0) > (known.unknown if known else 0):
        problems.append(f"{figures['unknown_accesses']} accesses to shared memory of unknown wavefronts")
    if notable(figures) and known is None:
        problems.append(
            f"{figures['conflicts']} of {figures['wavefronts']} wavefronts are bank conflicts (outside of the loop "
            f"{figures['conflicts_once']} of {figures['wavefronts_once']}) and no statement says why"
        )
    return problems

"""Shared-memory wavefronts of a kernel against the least possible, from its PTX; no GPU is needed.

The integer instructions of one program are run for all its threads (ptx.py), so that every address in shared memory is
known; what comes out of memory, or of an instruction that is not modelled, is unknown, and so is all that follows from
it. An access whose address is unknown is never taken for one without conflicts: it is counted as unknown.

The rule, on sm_80 and later: 32 banks of 4 bytes; lanes that want the same word share it. Up to 4 bytes a lane all 32
lanes go together. 8 bytes: the halves of a warp go one after the other, or together where each lane's address is that
of the lane beside it (lane ^ 1), or of the lane two further (lane ^ 2), which broadcasts are. 16 bytes: the halves
apart, and each half's quarters as the halves before. ldmatrix and stmatrix: eight rows of 16 bytes at a time. Against a
GPU's counters: the fp32 kernel of the first hardware run, H=128, T=50, B=128, had 27.9 million wavefronts, 22.9 more
than needed; this rule says 27.9 and 22.9. (A 16-byte broadcast as one wavefront would make it 27.1, as four 29.5.)

The least is what the same accesses would take if no two words of a group shared a bank and all groups that can merge
did: the distinct words of a warp, for 16 bytes of each half, by 32.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from . import ptx

LANES, BANKS, WORD = 32, 32, 4
MOST_WAYS = 64
TURNS = 3  # of the main loop, of which the last is counted: the first ones may fill a pipeline
ACCESSES = ("ld", "st", "ldmatrix", "stmatrix", "atom", "red", "cp")
# Instructions that touch shared memory but not by addresses of lanes: matrix instructions read it by descriptor, in the
# order that its swizzle makes free of conflicts; bulk copies and barriers go another way or are single words.
NO_LANES = re.compile(r"(wgmma|tcgen05|mbarrier|fence|membar|cp\.async\.(bulk|commit_group|wait_\w+|mbarrier\.\w+))\b")


def _most_in_a_bank(words: np.ndarray) -> int:
    return int(np.bincount(np.unique(words) % BANKS, minlength=BANKS).max()) if words.size else 0


def _least(words: np.ndarray) -> int:
    return math.ceil(np.unique(words).size / BANKS)


def _broadcasts(addresses: np.ndarray, active: np.ndarray) -> bool:
    """Whether every lane's address is that of lane ^ 1, or every one's that of lane ^ 2."""
    lanes = np.arange(addresses.size)
    return any(np.all((addresses == addresses[lanes ^ step]) | ~active | ~active[lanes ^ step]) for step in (1, 2))


def access(addresses: np.ndarray, width: int, active: np.ndarray | None = None) -> tuple[int, int]:
    """(wavefronts, least) of one load or store of a warp.

    addresses: of the 32 lanes, in bytes; width: bytes of a lane, 1 to 16; active: the lanes that take part, all if
    None.
    """
    if active is None:
        active = np.ones(LANES, bool)
    if width > 16:
        raise ValueError(f"an access of {width} bytes a lane")
    parts = 2 if width > 8 else 1  # that never go together
    halves = 2 if width > 4 else 1  # of each part, that may
    taken = least = 0
    for part in np.split(np.arange(LANES), parts):
        here, on = addresses[part], active[part]
        words = here[:, None] // WORD + np.arange(max(1, width // WORD))
        groups = [on] if halves == 1 or _broadcasts(here, on) else np.split(on, 2)
        firsts = np.split(words, len(groups))
        taken += sum(_most_in_a_bank(w[a]) for w, a in zip(firsts, groups, strict=True))
        least += _least(words[on])
    return taken, least


def atomic(addresses: np.ndarray, width: int, active: np.ndarray) -> tuple[int, int]:
    """(wavefronts, least) of one atomic operation of a warp: lanes that want the same word wait for each other."""
    words = (addresses[active][:, None] // WORD + np.arange(max(1, width // WORD))).ravel()
    return int(np.bincount(words % BANKS, minlength=BANKS).max(initial=0)), math.ceil(words.size / BANKS)


def matrices(addresses: np.ndarray, count: int) -> tuple[int, int]:
    """(wavefronts, least) of ldmatrix or stmatrix over `count` 8x8 matrices: lane i has the address of row i."""
    words = addresses[: 8 * count].reshape(count, 8, 1) // WORD + np.arange(4)
    return sum(map(_most_in_a_bank, words)), sum(map(_least, words))


@dataclass
class Count:
    """Of a program's accesses over some stretch of its run."""

    wavefronts: int = 0
    least: int = 0
    excess: Counter[int] = field(default_factory=Counter)  # wavefronts over the least, by index in the listing

    def add(self, index: int, taken: int, least: int) -> None:
        self.wavefronts += taken
        self.least += least
        if taken > least:
            self.excess[index] += taken - least


@dataclass
class Found:
    """What `count` finds. loop: a turn of the longest loop, or all of a program without loops; once: what is beside it.

    unknown: accesses of the listing that were not run, or of which an address was unknown.
    """

    loop: Count = field(default_factory=Count)
    once: Count = field(default_factory=Count)
    unknown: list[int] = field(default_factory=list)


def is_access(instruction: ptx.Instruction) -> bool:
    """Whether the instruction goes to shared memory by addresses of lanes."""
    name = ".".join(instruction.name)
    if NO_LANES.match(name):
        return False
    return any(part.startswith("shared") for part in instruction.name)


def _width(name: tuple[str, ...]) -> int:
    """Bytes of a lane's access: the type's by the vector's length."""
    kind = re.fullmatch(r"[a-z]+(\d+)(?:x2)?", name[-1])
    if kind is None:
        raise ValueError(f"no type with a width: {name[-1]}")
    bits = int(kind[1])
    vector = next((int(part[1]) for part in name if re.fullmatch(r"v\d", part)), 1)
    return bits // 8 * vector


@functools.cache
def _of_warp(name: str, width: int, addresses: bytes, active: bytes) -> tuple[int, int]:
    """(wavefronts, least) of a warp's access; the same few patterns come again and again."""
    here, on = np.frombuffer(addresses, np.int64), np.frombuffer(active, bool)
    if name in ("ldmatrix", "stmatrix"):
        return matrices(here, width)
    return atomic(here, width, on) if name in ("atom", "red") else access(here, width, on)


def _of_warps(event: ptx.Event, run: ptx.Program) -> list[tuple[int, int]] | None:
    """(wavefronts, least) of each warp's part in an access, or None if it is unknown."""
    name, operands = event.instruction.name, event.instruction.operands
    addresses = run.address(next(operand for operand in operands if operand.startswith("[")))
    if not event.sure or not addresses.known[event.active].all():
        return None
    if name[0] not in ACCESSES or any(part in ("async", "shared_cluster") for part in name[1:] if name[0] != "cp"):
        return None
    if name[0] in ("ldmatrix", "stmatrix"):
        width = next(int(part[1]) for part in name if re.fullmatch(r"x\d", part))
    else:
        width = int(operands[2], 0) if name[0] == "cp" else _width(name)
    found = []
    for first in range(0, len(addresses.bits), LANES):
        active = event.active[first : first + LANES]
        if active.any():
            here = addresses.bits[first : first + LANES].astype(np.int64)
            here = here - here.min() // (BANKS * WORD) * (BANKS * WORD)
            found.append(_of_warp(name[0], width, here.tobytes(), active.tobytes()))
    return found


def count(text: str, arguments: Mapping[int, int] | None = None) -> Found:
    """Wavefronts of a kernel's PTX, summed over the warps of one program.

    arguments: integer arguments of the kernel by position, where the way that it takes depends on them. Where that
    depends on something unknown, several ways are gone until every access was met, and the most expensive one counts.
    """
    kernel = ptx.Kernel(text)
    loop = ptx.longest_loop(kernel)
    accesses = {instruction.index for instruction in kernel.code if is_access(instruction)}
    found, unknown, counted = Found(), set[int](), set[int]()
    ways: list[dict[int, int]] = [{}]
    gone: list[dict[int, int]] = []
    while ways and len(gone) < MOST_WAYS and not accesses <= counted | unknown:
        gone.append(ways.pop())
        run = ptx.Program(kernel, is_access, loop, TURNS, arguments, gone[-1])
        turns, once = defaultdict[int, Count](Count), Count()
        for event in run.events():
            index, each = event.instruction.index, _of_warps(event, run)
            (unknown if each is None else counted).add(index)
            where = once if event.turn is None else turns[event.turn]
            for wavefronts, least in each or ():
                where.add(index, wavefronts, least)
        # Where a loop is left at its head the last turn is not a whole one.
        last = max((turns[turn] for turn in sorted(turns)[-2:]), key=attrgetter("wavefronts"), default=Count())
        found.loop = max(found.loop, once if loop is None else last, key=attrgetter("wavefronts"))
        found.once = max(found.once, Count() if loop is None else once, key=attrgetter("wavefronts"))
        for branch, choices in sorted(run.undecided.items()):
            ways += [gone[-1] | {branch: choice} for choice in range(1, choices)]
    found.unknown = sorted(accesses - counted | unknown)
    return found

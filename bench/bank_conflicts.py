"""Shared-memory wavefronts of a kernel against the least possible, from its PTX; no GPU is needed.

The integer instructions of one warp are run for its 32 lanes from %tid.x on. A value that does not follow from it (an
argument, a loop's counter, a load) counts as one base for all lanes, a multiple of 128 bytes: it moves every lane's
bank alike, and so changes no conflict.
"""

import re
from collections.abc import Callable

BANKS, BANK_BYTES, LANES = 32, 4, 32
_MASK = (1 << 32) - 1
_OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "shl": lambda a, b: a << min(b, 64),
    "shr": lambda a, b: a >> min(b, 64),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "div": lambda a, b: a // b if b else 0,
    "rem": lambda a, b: a % b if b else 0,
    "min": min,
    "max": max,
    "bfe": lambda a, b, c: (a >> b) & ((1 << c) - 1),
}
_ACCESS = re.compile(r"(?:@!?%p\d+ )?(ld|st)\.(?:volatile\.)?shared(?:::cta)?\.(?:v(\d)\.)?[a-z](\d+)\b.*?\[([^\]]*)\]")
_INTEGER = re.compile(r"(\w+)((?:\.\w+)*)\.[busp](?:32|64)\s+(%\w+), (.*);")


def wavefronts(addresses: list[int], width: int) -> tuple[int, int]:
    """Wavefronts of one access of a warp and the least for as many distinct words.

    addresses: of every lane, in bytes; width: bytes of a lane's access. Up to 4 bytes all lanes go together, 8 bytes in
    halves, 16 in quarters. Lanes that want the same word share it.
    """
    group = LANES if width <= 4 else LANES * 4 // width
    taken = least = 0
    for first in range(0, LANES, group):
        words = {
            address // BANK_BYTES + i
            for address in addresses[first : first + group]
            for i in range(max(1, width // BANK_BYTES))
        }
        banks = [word % BANKS for word in words]
        taken += max(banks.count(bank) for bank in set(banks))
        least += -(-len(words) // BANKS)
    return taken, least


def shared_accesses(ptx: str, warp: int = 0) -> list[tuple[str, int, int]]:
    """(instruction, wavefronts, least) of every shared load and store in the order of the text, for one warp."""
    values: dict[str, list[int]] = {}

    def operand(text: str) -> list[int]:
        if re.fullmatch(r"-?\d+", text):
            return [int(text)] * LANES
        if text == "%tid.x":
            return [warp * LANES + lane for lane in range(LANES)]
        return values.get(text, [0] * LANES)

    found = []
    for line in (text.strip() for text in ptx.splitlines()):
        if match := _ACCESS.match(line):
            kind, count, bits, place = match.groups()
            base, *offset = place.replace(" ", "").split("+")
            shift = int(offset[0]) if offset else 0
            width = int(bits) // 8 * int(count or 1)
            found.append((kind, *wavefronts([a + shift for a in operand(base)], width)))
        elif match := _INTEGER.match(line):
            name, _, result, sources = match.groups()
            arguments = [operand(source) for source in sources.split(", ")]
            if (name == "mov" and len(arguments) == 1) or name == "cvt":
                values[result] = arguments[0]
            elif name in _OPERATIONS:
                values[result] = [_OPERATIONS[name](*lane) & _MASK for lane in zip(*arguments, strict=True)]
    return found

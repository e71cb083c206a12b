"""PTX's integer instructions on the bits of their operands, in numpy, for many threads at once."""

import re
from collections.abc import Callable

import numpy as np

INTEGER = re.compile(r"([bsu])(8|16|32|64)$")


def signed(bits: np.ndarray, width: int) -> np.ndarray:
    """The numbers that two's complement of so many bits stands for."""
    return (bits << np.uint64(64 - width)).view(np.int64) >> (64 - width)


def clip(bits: np.ndarray, width: int) -> np.ndarray:
    return bits & np.uint64((1 << width) - 1)


def _shl(a: np.ndarray, by: np.ndarray, width: int) -> np.ndarray:
    return np.where(by < width, a << np.minimum(by, np.uint64(63)), np.uint64(0))


def _shr(a: np.ndarray, by: np.ndarray, width: int, as_signed: bool) -> np.ndarray:
    if as_signed:
        return (signed(a, width) >> np.minimum(by, np.uint64(width - 1)).view(np.int64)).view(np.uint64)
    return np.where(by < width, a >> np.minimum(by, np.uint64(63)), np.uint64(0))


def _divide(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient, rounded to zero, and remainder; of a zero divisor 0 and a."""
    safe = np.where(b == 0, 1, b)
    quotient = np.where(b == 0, 0, np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))).astype(a.dtype)
    return quotient, a - quotient * b


def _extract(a: np.ndarray, first: np.ndarray, length: np.ndarray, width: int, as_signed: bool) -> np.ndarray:
    first, length = first & np.uint64(255), length & np.uint64(255)
    mask = _shl(np.ones_like(first), length, 64) - np.uint64(1)
    found = _shr(a, first, width, as_signed)
    if as_signed:
        top = _shr(found, np.maximum(length, np.uint64(1)) - np.uint64(1), width, False) & np.uint64(1)
        found = np.where((top != 0) & (length > 0), found | ~mask, found & mask)
        return clip(found, width)
    return found & mask


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both, found = a | b << np.uint64(32), np.zeros_like(a)
    for i in range(4):
        choice = selector >> np.uint64(4 * i)
        byte = both >> (np.uint64(8) * (choice & np.uint64(7))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        found |= np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return found


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    found = np.zeros_like(a)
    for i in range(8):
        term = np.full_like(a, ~np.uint64(0))
        for value, bit in ((a, 4), (b, 2), (c, 1)):
            term &= value if i & bit else ~value
        found |= np.where(table >> np.uint64(i) & np.uint64(1), term, np.uint64(0))
    return found


def _funnel(name: tuple[str, ...], low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
    by = by & np.uint64(31) if "wrap" in name else np.minimum(by, np.uint64(32))
    both = low | high << np.uint64(32)
    return both >> by if "r" in name else np.where(by > 0, both >> (np.uint64(32) - by), high)


COMPARE: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
SIMPLE: dict[str, Callable] = {  # alike for signed and unsigned
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lop3": _lop3,
    "prmt": _prmt,
}


def compute(name: tuple[str, ...], operands: list[np.ndarray]) -> np.ndarray | None:
    """The result of an integer instruction from the bits of its operands, or None if it is not modelled."""
    kind = INTEGER.match(name[-1])
    if kind is None or (name[0] == "cvt" and INTEGER.match(name[-2]) is None):
        return None
    is_signed, width, base = kind[1] == "s", int(kind[2]), name[0]
    if base == "shf":
        return _funnel(name, *operands)
    if base == "cvt":
        to = INTEGER.match(name[-2])
        assert to is not None
        value = signed(operands[0], width).view(np.uint64) if is_signed else operands[0]
        return None if "sat" in name else clip(value, int(to[2]))
    if base in SIMPLE:
        return clip(SIMPLE[base](*operands), width)
    if base in ("shl", "shr"):
        a, by = operands
        found = _shl(a, by, width) if base == "shl" else _shr(a, by, width, is_signed)
        return clip(found, width)
    numbers = [signed(a, width) if is_signed else a for a in operands]
    if base in ("mul", "mad"):
        if "hi" in name:
            return None
        product = (numbers[0] * numbers[1]).view(np.uint64)
        out = 2 * width if "wide" in name else width
        return clip(product + operands[2] if base == "mad" else product, out)
    if base in ("div", "rem"):
        return clip(_divide(*numbers)[base == "rem"].view(np.uint64), width)
    if base in ("min", "max"):
        return clip((np.minimum if base == "min" else np.maximum)(*numbers).view(np.uint64), width)
    if base == "abs":
        return clip(np.abs(numbers[0]).view(np.uint64), width)
    if base == "bfe":
        a, first, length = operands
        return _extract(a, first, length, width, is_signed)
    if base == "bfi":
        first, length = operands[2] & np.uint64(255), operands[3] & np.uint64(255)
        mask = _shl(_shl(np.ones_like(first), length, 64) - np.uint64(1), first, width)
        return clip(operands[1] & ~mask | _shl(operands[0], first, width) & mask, width)
    if base == "popc":
        return np.array([int(a).bit_count() for a in operands[0]], np.uint64)
    if base == "brev":
        return np.array([int(f"{int(a):0{width}b}"[::-1], 2) for a in operands[0]], np.uint64)
    return None

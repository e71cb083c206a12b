"""The integer instructions of a PTX kernel, run for all threads of one program at once.

What addresses, predicates and branches are made of is computed exactly, in numpy; all else is unknown: floats, what
comes out of memory, the result of an instruction that is not modelled. What is made from something unknown is unknown.
Threads may part at a branch: those that are furthest behind run first, and so they meet again.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

LANES = 32
ARGUMENT = 4096  # an integer argument of the kernel: masks over sizes are full, strides divide by 16
PROGRAMS = 4  # along every axis of the grid
SYMBOL = 1 << 16  # bytes from one symbol of a memory space to the next
INTEGER = re.compile(r"([bsu])(8|16|32|64)$")
MOVES = ("bra", "brx", "ret", "exit")
MOST_STEPS = 1_000_000
_NAME = re.compile(r"[%a-zA-Z_$][\w$.]*")


@dataclass(frozen=True)
class Value:
    """Of a register in every thread."""

    bits: np.ndarray  # (threads,) uint64
    known: np.ndarray  # (threads,) bool


@dataclass(frozen=True)
class Instruction:
    index: int
    guard: str | None  # a predicate register
    negated: bool
    name: tuple[str, ...]  # split at dots
    operands: tuple[str, ...]

    @functools.cached_property
    def results(self) -> tuple[str, ...]:
        """Registers that it writes."""
        if not self.operands or self.operands[0].startswith("["):
            return ()
        return tuple(_NAME.findall(self.operands[0]))

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        """Registers, and whatever else has a name, that it reads."""
        first = 0 if self.name[0] == "brx" or self.operands and self.operands[0].startswith("[") else 1
        return (*_NAME.findall(" ".join(self.operands[first:])), *([self.guard] if self.guard else []))


def split(text: str) -> tuple[str, ...]:
    """Operands: the parts between the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts if part.strip())


class Kernel:
    """The first entry of a PTX module: its code, labels, arguments and number of threads."""

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//.*", "", ptx)
        entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)(.*?)^\{(.*?)^\}", text, re.S | re.M)
        if entry is None:
            raise ValueError("no kernel in this PTX")
        arguments, directives, body = entry.groups()
        threads = re.search(r"\.reqntid\s+(\d+)", directives)
        self.threads = int(threads[1]) if threads else LANES
        self.arguments = [
            (words[0].lstrip("."), words[-1])
            for words in (argument.replace(".param", "").split() for argument in arguments.split(","))
            if words
        ]
        shared = re.findall(r"\.shared\b[^;\[]*?([\w$]+)\s*[\[;]", text[: entry.start()])
        self.symbols = {name: SYMBOL * i for i, name in enumerate(shared)}
        self.symbols |= {name: SYMBOL * i for i, (_, name) in enumerate(self.arguments)}  # in a space of their own
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, tuple[str, ...]] = {}  # labels that a branch by index chooses from
        for statement in re.sub(r"^\s*\.(loc|file|section|pragma)\b.*$", "", body, flags=re.M).split(";"):
            self._add(statement)

    def _add(self, statement: str) -> None:
        statement, name = statement.lstrip("{} \t\n"), ""
        while label := re.match(r"([$\w]+):(?!:)[{}\s]*", statement):
            name = label[1]
            self.labels[name] = len(self.code)
            statement = statement[label.end() :]
        if statement.startswith(".branchtargets"):
            self.tables[name] = split(statement.removeprefix(".branchtargets"))
        match = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)(.*)$", statement, re.S)
        if match is not None:
            negated, guard, name, operands = match.groups()
            names = tuple(name.replace("::", "_").split("."))
            self.code.append(Instruction(len(self.code), guard, bool(negated), names, split(operands)))

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) of every span that a branch at its end goes back over, the longest first."""
        spans = [
            (self.labels[branch.operands[-1]], branch.index)
            for branch in self.code
            if branch.name[0] == "bra" and self.labels[branch.operands[-1]] <= branch.index
        ]
        return sorted(spans, key=lambda span: span[0] - span[1])


def _signed(bits: np.ndarray, width: int) -> np.ndarray:
    """The numbers that two's complement of so many bits stands for."""
    return (bits << np.uint64(64 - width)).view(np.int64) >> (64 - width)


def _clip(bits: np.ndarray, width: int) -> np.ndarray:
    return bits & np.uint64((1 << width) - 1)


def _shl(a: np.ndarray, by: np.ndarray, width: int) -> np.ndarray:
    return np.where(by < width, a << np.minimum(by, np.uint64(63)), np.uint64(0))


def _shr(a: np.ndarray, by: np.ndarray, width: int, signed: bool) -> np.ndarray:
    if signed:
        return (_signed(a, width) >> np.minimum(by, np.uint64(width - 1)).view(np.int64)).view(np.uint64)
    return np.where(by < width, a >> np.minimum(by, np.uint64(63)), np.uint64(0))


def _divide(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient, rounded to zero, and remainder; of a zero divisor 0 and a."""
    safe = np.where(b == 0, 1, b)
    quotient = np.where(b == 0, 0, np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))).astype(a.dtype)
    return quotient, a - quotient * b


def _extract(a: np.ndarray, first: np.ndarray, length: np.ndarray, width: int, signed: bool) -> np.ndarray:
    first, length = first & np.uint64(255), length & np.uint64(255)
    mask = _shl(np.ones_like(first), length, 64) - np.uint64(1)
    found = _shr(a, first, width, signed)
    if signed:
        top = _shr(found, np.maximum(length, np.uint64(1)) - np.uint64(1), width, False) & np.uint64(1)
        found = np.where((top != 0) & (length > 0), found | ~mask, found & mask)
        return _clip(found, width)
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
    signed, width, base = kind[1] == "s", int(kind[2]), name[0]
    if base == "shf":
        return _funnel(name, *operands)
    if base == "cvt":
        to = INTEGER.match(name[-2])
        assert to is not None
        value = _signed(operands[0], width).view(np.uint64) if signed else operands[0]
        return None if "sat" in name else _clip(value, int(to[2]))
    if base in SIMPLE:
        return _clip(SIMPLE[base](*operands), width)
    if base in ("shl", "shr"):
        found = _shl(*operands, width) if base == "shl" else _shr(*operands, width, signed)
        return _clip(found, width)
    numbers = [_signed(a, width) if signed else a for a in operands]
    if base in ("mul", "mad"):
        if "hi" in name:
            return None
        product = (numbers[0] * numbers[1]).view(np.uint64)
        out = 2 * width if "wide" in name else width
        return _clip(product + operands[2] if base == "mad" else product, out)
    if base in ("div", "rem"):
        return _clip(_divide(*numbers)[base == "rem"].view(np.uint64), width)
    if base in ("min", "max"):
        return _clip((np.minimum if base == "min" else np.maximum)(*numbers).view(np.uint64), width)
    if base == "abs":
        return _clip(np.abs(numbers[0]).view(np.uint64), width)
    if base == "bfe":
        return _extract(*operands, width, signed)
    if base == "bfi":
        first, length = operands[2] & np.uint64(255), operands[3] & np.uint64(255)
        mask = _shl(_shl(np.ones_like(first), length, 64) - np.uint64(1), first, width)
        return _clip(operands[1] & ~mask | _shl(operands[0], first, width) & mask, width)
    if base == "popc":
        return np.array([int(a).bit_count() for a in operands[0]], np.uint64)
    if base == "brev":
        return np.array([int(f"{int(a):0{width}b}"[::-1], 2) for a in operands[0]], np.uint64)
    return None


@dataclass(frozen=True)
class Event:
    """An instruction that was asked for, as it is executed."""

    instruction: Instruction
    active: np.ndarray  # (threads,) bool: those that are there and whose guard is true
    sure: bool  # whether every thread's guard is known
    turn: int | None  # of the loop that is followed, from 0; None outside of it


class Run:
    """One program's run. `events` goes through it; operands can be asked for at each event.

    asked: the instructions that are asked for; only what they and the branches depend on is computed. loop: (first,
    last) of the loop that is followed: left after so many turns, whatever its condition says; other loops run as long
    as theirs does. arguments: of the kernel, by position; ARGUMENT where there is none. A branch that something unknown
    decides is taken back over the loop that is followed, and elsewhere goes as `decided` says: 0 not taken or the first
    of its targets (which holds where nothing is said), 1 taken or the second, and so on. `undecided` are those that
    were met of which it says nothing, with the number of ways that they have.
    """

    def __init__(
        self,
        kernel: Kernel,
        asked: Callable[[Instruction], bool],
        loop: tuple[int, int] | None = None,
        turns: int = 3,
        arguments: Mapping[int, int] | None = None,
        decided: Mapping[int, int] | None = None,
    ) -> None:
        self.kernel, self.loop, self.turns = kernel, loop, turns
        self.arguments, self.decided = arguments or {}, decided or {}
        self.undecided: dict[int, int] = {}
        self.threads = np.arange(kernel.threads)
        self.everywhere = np.ones(kernel.threads, bool)
        self.registers: dict[str, Value] = {}
        self.complete = 0  # turns of the loop that came to its end
        self.always = Value(np.ones(kernel.threads, np.uint64), self.everywhere)
        self.unknown = Value(np.zeros(kernel.threads, np.uint64), ~self.everywhere)
        self._asked = {instruction.index for instruction in kernel.code if asked(instruction)}
        self._needed = self._slice()
        self._constants: dict[str, Value] = {}
        self._taken: dict[int, int] = {}

    def _slice(self) -> set[int]:
        """Instructions whose results go, by whatever way, into those that are asked for or into a branch."""
        by_result: dict[str, list[Instruction]] = {}
        for instruction in self.kernel.code:
            for name in instruction.results:
                by_result.setdefault(name, []).append(instruction)
        open_ = [i for i in self.kernel.code if i.index in self._asked or i.name[0] in MOVES]
        found: set[int] = set()
        seen: set[str] = set()
        while open_:
            for name in open_.pop().sources:
                if name not in seen:
                    seen.add(name)
                    new = [i for i in by_result.get(name, ()) if i.index not in found]
                    found |= {i.index for i in new}
                    open_ += new
        return found

    def known(self, numbers: np.ndarray | int) -> Value:
        return Value(np.broadcast_to(np.asarray(numbers).astype(np.uint64), self.threads.shape), self.everywhere)

    def value(self, text: str) -> Value:
        """Of an operand: a register, a special register, a number, the address of a symbol."""
        if text in self.registers:
            return self.registers[text]
        if text not in self._constants:
            self._constants[text] = self._constant(text)
        return self._constants[text]

    def _constant(self, text: str) -> Value:
        special = {
            "%tid.x": self.threads,
            "%ntid.x": len(self.threads),
            "%laneid": self.threads % LANES,
            "%warpid": self.threads // LANES,
            **{f"%{name}.{axis}": 0 for name in ("ctaid", "clusterid", "cluster_ctaid") for axis in "xyz"},
            **{f"%{name}.{axis}": 0 for name in ("tid",) for axis in "yz"},
            **{f"%{name}.{axis}": 1 for name in ("ntid",) for axis in "yz"},
            **{f"%nctaid.{axis}": PROGRAMS for axis in "xyz"},
            **{f"%cluster_nctaid.{axis}": 1 for axis in "xyz"},
            "%cluster_ctarank": 0,
        }
        if text in special:
            return self.known(special[text])
        if text in self.kernel.symbols:
            return self.known(self.kernel.symbols[text])
        if number := re.fullmatch(r"(-?)(0x[0-9a-fA-F]+|\d+)U?", text):
            return self.known(np.array(int(number[1] + number[2], 0) & (1 << 64) - 1, np.uint64))
        if number := re.fullmatch(r"0[fdFD]([0-9a-fA-F]+)", text):
            return self.known(np.array(int(number[1], 16), np.uint64))
        return self.unknown

    def address(self, operand: str) -> Value:
        """Of an operand in brackets."""
        base, offset = re.fullmatch(r"\[\s*([^\s+]+?)\s*(?:\+\s*(-?\w+)\s*)?\]", operand).groups()
        found = self.value(base)
        return Value(found.bits + np.uint64(int(offset or "0", 0) & (1 << 64) - 1), found.known)

    def events(self) -> Iterator[Event]:
        code, at = self.kernel.code, np.zeros(self.threads.shape, np.int64)
        stops = [i.index for i in code if i.index in self._asked | self._needed or i.name[0] in MOVES]
        after = np.searchsorted(stops, np.arange(len(code) + 1))  # of each place, the first of `stops` from it on
        for _ in range(MOST_STEPS):
            index = int(at.min())
            if after[index] == len(stops):
                return
            here, index = at == index, stops[after[index]]
            if not here.all():
                index = min(index, int(at[~here].min()))
            instruction = code[index]
            if index not in self._asked and index not in self._needed and instruction.name[0] not in MOVES:
                at[here] = index
                continue
            guard = self._guard(instruction)
            active, sure = here & guard.known & (guard.bits != 0), bool(guard.known[here].all())
            at[here] = index + 1
            if instruction.name[0] == "bra":
                self._branch(instruction, here, active, sure, at)
            elif instruction.name[0] == "brx":
                self._jump(instruction, active, sure, at)
            elif instruction.name[0] in MOVES:
                at[active] = len(code)
            else:
                if index in self._asked:
                    inside = self.loop is not None and self.loop[0] <= index <= self.loop[1]
                    yield Event(instruction, active, sure, self._taken.get(self.loop[1], 0) if inside else None)
                self._execute(instruction, here, guard)
        raise RuntimeError(f"no end after {MOST_STEPS} instructions")

    def _guard(self, instruction: Instruction) -> Value:
        if instruction.guard is None:
            return self.always
        found = self.value(instruction.guard)
        return Value(found.bits ^ np.uint64(1), found.known) if instruction.negated else found

    def _branch(self, branch: Instruction, here: np.ndarray, active: np.ndarray, sure: bool, at: np.ndarray) -> None:
        target = self.kernel.labels[branch.operands[-1]]
        followed = self.loop is not None and branch.index == self.loop[1]
        if followed:
            self.complete += 1
            active = here if not sure else active
        elif not sure and self._decide(branch.index, 2):
            active = here
        if target > branch.index:
            at[active] = target
            return
        if not active.any():
            return
        self._taken[branch.index] = self._taken.get(branch.index, 0) + 1
        if not followed or self._taken[branch.index] < self.turns:
            at[active] = target
        elif branch.guard is None:
            at[active] = self._exit(target, branch.index)

    def _decide(self, index: int, ways: int) -> int:
        if index not in self.decided:
            self.undecided[index] = ways
        return self.decided.get(index, 0)

    def _jump(self, branch: Instruction, active: np.ndarray, sure: bool, at: np.ndarray) -> None:
        """A branch to one of a table's labels."""
        choice, table = self.value(branch.operands[0]), self.kernel.tables[branch.operands[1]]
        targets = np.array([self.kernel.labels[label] for label in table])
        if sure and choice.known[active].all():
            at[active] = targets[np.minimum(choice.bits[active], np.uint64(len(table) - 1)).astype(np.int64)]
        else:
            at[active] = targets[self._decide(branch.index, len(table))]

    def _exit(self, first: int, last: int) -> int:
        """Where a loop without a condition at its end goes on when it is left."""
        targets = (
            self.kernel.labels[inner.operands[-1]]
            for inner in self.kernel.code[first:last]
            if inner.name[0] == "bra"
        )
        return next((target for target in targets if target > last), len(self.kernel.code))

    def _execute(self, instruction: Instruction, here: np.ndarray, guard: Value) -> None:
        names = instruction.results
        if not names:
            return
        found = self._results(instruction)
        everywhere = guard is self.always and here.all()
        for i, name in enumerate(names):
            new = found[i] if i < len(found) else self.unknown
            if not everywhere:
                old, write = self.registers.get(name, self.unknown), here & (guard.bits != 0)
                known = np.where(write, new.known, old.known) & (guard.known | ~here)
                new = Value(np.where(write, new.bits, old.bits), known)
            self.registers[name] = new

    def _results(self, instruction: Instruction) -> list[Value]:
        """Of an instruction's results those that are modelled."""
        name, operands = instruction.name, instruction.operands[1:]
        if "{" in instruction.operands[0] or any(o.startswith("{") for o in operands):
            return []
        if name[:2] == ("ld", "param"):
            return [self._argument(self.address(operands[0]), name[-1])]
        if any(operand.startswith(("[", "(")) for operand in operands):
            return []
        if name[0] == "elect":
            return [self.known(0), self.known(self.threads % LANES == 0)]
        values = [self._operand(operand) for operand in operands]
        if name[0] == "shfl":
            return [self._shuffle(name[2], *values)]
        if name[0] == "setp":
            return self._compare(name, values)
        if name[0] == "selp":
            return [_select(*values)]
        if name[-1] == "pred":
            return [_logic(name[0], values)]
        bits = compute(name, [value.bits for value in values])
        if bits is None:
            return []
        return [Value(bits, np.logical_and.reduce([value.known for value in values]))]

    def _operand(self, text: str) -> Value:
        if text.startswith("!"):
            value = self.value(text[1:])
            return Value(value.bits ^ np.uint64(1), value.known)
        return self.value(text)

    def _argument(self, address: Value, kind: str) -> Value:
        """What an argument holds: pointers lie far apart, integers are ARGUMENT, others unknown."""
        place = address.bits // np.uint64(SYMBOL)
        held = np.zeros(self.threads.shape, np.uint64)
        known = address.known & (address.bits % np.uint64(SYMBOL) == 0)
        for i, (type_, _) in enumerate(self.kernel.arguments):
            pointer = type_ == "u64"
            held = np.where(place == i, np.uint64((i + 1) << 32 if pointer else self.arguments.get(i, ARGUMENT)), held)
            known = known & ((place != i) | (INTEGER.match(type_) is not None))
        if INTEGER.match(kind) is None:
            return self.unknown
        return Value(held, known)

    def _shuffle(self, mode: str, source: Value, by: Value, clamp: Value, _: Value) -> Value:
        lane, distance = self.threads % LANES, by.bits.astype(np.int64)
        other = {"idx": distance & 31, "bfly": lane ^ distance, "up": lane - distance, "down": lane + distance}[mode]
        other = np.where((other < 0) | (other >= LANES), lane, other) + self.threads // LANES * LANES
        plain = clamp.known & (clamp.bits == (0 if mode == "up" else 31))  # no smaller segments
        return Value(source.bits[other], source.known[other] & by.known & plain)

    def _compare(self, name: tuple[str, ...], values: list[Value]) -> list[Value]:
        kind = INTEGER.match(name[-1])
        if kind is None or name[1] not in COMPARE:
            return []
        a, b = (_signed(v.bits, int(kind[2])) if kind[1] == "s" else _clip(v.bits, int(kind[2])) for v in values[:2])
        found = Value(COMPARE[name[1]](a, b).astype(np.uint64), values[0].known & values[1].known)
        if len(name) == 4:
            return [_logic(name[2], [found, values[2]])]
        return [found, Value(found.bits ^ np.uint64(1), found.known)]


def _select(a: Value, b: Value, condition: Value) -> Value:
    chosen = condition.bits != 0
    same = a.known & b.known & (a.bits == b.bits)
    return Value(
        np.where(chosen, a.bits, b.bits), np.where(condition.known, np.where(chosen, a.known, b.known), same)
    )


def _logic(operation: str, values: list[Value]) -> Value:
    """Of predicates, where one alone may decide."""
    a, *others = (Value((value.bits != 0).astype(np.uint64), value.known) for value in values)
    if operation == "mov":
        return a
    if operation == "not":
        return Value(a.bits ^ np.uint64(1), a.known)
    (b,) = others
    known = a.known & b.known
    if operation in ("and", "or"):
        decides = np.uint64(operation == "or")
        known |= (a.known & (a.bits == decides)) | (b.known & (b.bits == decides))
        # An unknown operand must not decide: give it the neutral value.
        x, y = (np.where(v.known, v.bits, np.uint64(1) - decides) for v in (a, b))
        return Value(x & y if operation == "and" else x | y, known)
    return Value(a.bits ^ b.bits if operation == "xor" else a.bits, known if operation == "xor" else known & False)

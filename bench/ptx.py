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

from .ptx_integers import COMPARE, INTEGER, clip, compute, signed

LANES = 32
ARGUMENT = 4096  # an integer argument of the kernel: masks over sizes are full, strides divide by 16
PROGRAMS = 4  # along every axis of the grid
SYMBOL = 1 << 16  # bytes from one symbol of a memory space to the next
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
        first = 0 if self.name[0] == "brx" or (self.operands and self.operands[0].startswith("[")) else 1
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


def _up_to_its_brace(text: str) -> str:
    """What stands before the brace that closes one opened before the text."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise ValueError("a brace is not closed in this PTX")


class Kernel:
    """The first entry of a PTX module: its code, labels, arguments and number of threads."""

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//.*", "", ptx)
        entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)(.*?)\{", text, re.S)
        if entry is None:
            raise ValueError("no kernel in this PTX")
        (arguments, directives), body = entry.groups(), _up_to_its_brace(text[entry.end() :])
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
        self.labels: dict[str, list[int]] = {}
        self.tables: dict[str, tuple[str, ...]] = {}  # labels that a branch by index chooses from
        for statement in re.sub(r"^\s*\.(loc|file|section|pragma)\b.*$", "", body, flags=re.M).split(";"):
            self._add(statement)

    def _add(self, statement: str) -> None:
        statement, name = statement.lstrip("{} \t\n"), ""
        while label := re.match(r"([$\w]+):(?!:)[{}\s]*", statement):
            name = label[1]
            self.labels.setdefault(name, []).append(len(self.code))
            statement = statement[label.end() :]
        if statement.startswith(".branchtargets"):
            self.tables[name] = split(statement.removeprefix(".branchtargets"))
        match = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)(.*)$", statement, re.S)
        if match is not None:
            negated, guard, name, operands = match.groups()
            names = tuple(name.replace("::", "_").split("."))
            self.code.append(Instruction(len(self.code), guard, bool(negated), names, split(operands)))

    def targets(self, branch: Instruction) -> list[int]:
        """Where a branch goes: of a label the nearest place, as blocks of inline assembly have labels of their own."""
        name, operands = branch.name[0], branch.operands
        labels = operands[-1:] if name == "bra" else self.tables[operands[1]] if name == "brx" else ()
        return [min(self.labels[label], key=lambda place: abs(place - branch.index)) for label in labels]


@dataclass(frozen=True)
class Loop:
    head: int
    body: frozenset[int]  # indexes of its instructions, inner loops' included


def longest_loop(kernel: Kernel) -> Loop | None:
    """The loop of the most instructions: a head and all from which it is reached again without leaving it."""
    after = _successors(kernel)
    dominators = _dominators(after)
    before: dict[int, list[int]] = {}
    for block, (_, targets) in after.items():
        for target in targets:
            before.setdefault(target, []).append(block)
    best: Loop | None = None
    for head in after:
        ends = [block for block in before.get(head, ()) if head in dominators.get(block, ())]
        blocks = {head}
        while ends:
            block = ends.pop()
            if block not in blocks:
                blocks.add(block)
                ends += before.get(block, ())
        if len(blocks) > 1 or head in after[head][1]:
            body = frozenset(i for block in blocks for i in range(block, after[block][0]))
            if best is None or len(body) > len(best.body):
                best = Loop(head, body)
    return best


def _successors(kernel: Kernel) -> dict[int, tuple[int, list[int]]]:
    """By the first instruction of each block of straight code: the block's end, and the blocks after it."""
    code, targets = kernel.code, {}
    for instruction in code:
        if instruction.name[0] in MOVES:
            targets[instruction.index] = kernel.targets(instruction)
    firsts = {0, *(index + 1 for index in targets), *(place for places in targets.values() for place in places)}
    order = sorted(firsts - {len(code)})
    blocks = {}
    for first, end in zip(order, [*order[1:], len(code)], strict=True):
        last = code[end - 1]
        falls = last.index not in targets or last.guard is not None
        found = [place for place in targets.get(last.index, []) if place < len(code)]
        blocks[first] = (end, found + [end] * (falls and end < len(code)))
    return blocks


def _dominators(after: dict[int, tuple[int, list[int]]]) -> dict[int, set[int]]:
    """By block: those that every way to it from the start goes through."""
    found: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in [*found]:
            for target in after[block][1]:
                new = (found[target] & found[block] if target in found else found[block]) | {target}
                if found.get(target) != new and target != 0:
                    found[target] = new
                    changed = True
    return found


@dataclass(frozen=True)
class Event:
    """An instruction that was asked for, as it is executed."""

    instruction: Instruction
    active: np.ndarray  # (threads,) bool: those that are there and whose guard is true
    sure: bool  # whether every thread's guard is known
    turn: int | None  # of the loop that is followed, from 0; None outside of it


class Program:
    """One program's run. `events` goes through it; operands can be asked for at each event.

    asked: the instructions that are asked for; only what they and the branches depend on is computed. loop: the one
    that is followed: left in its turn `turns`, whatever its condition says; other loops run as long as theirs does.
    arguments: of the kernel, by position; ARGUMENT where there is none. A branch that something unknown decides stays
    in the loop that is followed if that is the question, and elsewhere goes as `decided` says: 0 not taken or the first
    of its targets (which holds where nothing is said), 1 taken or the second, and so on. `undecided` are those that
    were met of which it says nothing, with the number of ways that they have.
    """

    def __init__(
        self,
        kernel: Kernel,
        asked: Callable[[Instruction], bool],
        loop: Loop | None = None,
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
        self.turn = -1  # of the loop
        self.always = Value(np.ones(kernel.threads, np.uint64), self.everywhere)
        self.unknown = Value(np.zeros(kernel.threads, np.uint64), ~self.everywhere)
        self._asked = {instruction.index for instruction in kernel.code if asked(instruction)}
        self._needed = self._slice()
        self._constants: dict[str, Value] = {}

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
        special: dict[str, np.ndarray | int] = {
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
        parts = re.fullmatch(r"\[\s*([^\s+]+?)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if parts is None:
            raise ValueError(f"no address: {operand}")
        base, offset = parts.groups()
        found = self.value(base)
        return Value(found.bits + np.uint64(int(offset or "0", 0) & (1 << 64) - 1), found.known)

    def events(self) -> Iterator[Event]:
        code, at = self.kernel.code, np.zeros(self.threads.shape, np.int64)
        head = -1 if self.loop is None else self.loop.head
        needed = self._asked | self._needed | {head}
        stops = [i.index for i in code if i.index in needed or i.name[0] in MOVES]
        after = np.searchsorted(stops, np.arange(len(code) + 1))  # of each place, the first of `stops` from it on
        for _ in range(MOST_STEPS):
            index = int(at.min())
            if after[index] == len(stops):
                return
            here, index = at == index, stops[after[index]]
            if not here.all():
                index = min(index, int(at[~here].min()))
            instruction = code[index]
            if index not in needed and instruction.name[0] not in MOVES:
                at[here] = index
                continue
            self.turn += index == head
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
                    inside = self.loop is not None and index in self.loop.body
                    yield Event(instruction, active, sure, self.turn if inside else None)
                self._execute(instruction, here, guard)
        raise RuntimeError(f"no end after {MOST_STEPS} instructions")

    def _guard(self, instruction: Instruction) -> Value:
        if instruction.guard is None:
            return self.always
        return self._operand(f"!{instruction.guard}" if instruction.negated else instruction.guard)

    def _branch(self, branch: Instruction, here: np.ndarray, active: np.ndarray, sure: bool, at: np.ndarray) -> None:
        (target,) = self.kernel.targets(branch)
        stays = [self.loop is not None and place in self.loop.body for place in (branch.index + 1, target)]
        if self.loop is not None and branch.index in self.loop.body and branch.guard is not None and sum(stays) == 1:
            if self.turn + 1 >= self.turns or not sure:
                active = here if stays[1] == (self.turn + 1 < self.turns) else ~self.everywhere
        elif not sure and target > branch.index and self._decide(branch.index, 2):
            active = here
        at[active] = target

    def _decide(self, index: int, ways: int) -> int:
        if index not in self.decided:
            self.undecided[index] = ways
        return self.decided.get(index, 0)

    def _jump(self, branch: Instruction, active: np.ndarray, sure: bool, at: np.ndarray) -> None:
        """A branch to one of a table's labels."""
        choice, targets = self.value(branch.operands[0]), np.array(self.kernel.targets(branch))
        if sure and choice.known[active].all():
            at[active] = targets[np.minimum(choice.bits[active], np.uint64(len(targets) - 1)).astype(np.int64)]
        else:
            at[active] = targets[self._decide(branch.index, len(targets))]

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
        return _not(self.value(text[1:])) if text.startswith("!") else self.value(text)

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
        a, b = (signed(v.bits, int(kind[2])) if kind[1] == "s" else clip(v.bits, int(kind[2])) for v in values[:2])
        found = Value(COMPARE[name[1]](a, b).astype(np.uint64), values[0].known & values[1].known)
        if len(name) == 4:
            return [_logic(name[2], [found, values[2]])]
        return [found, _not(found)]


def _not(a: Value) -> Value:
    """Of a predicate."""
    return Value(a.bits ^ np.uint64(1), a.known)


def _select(a: Value, b: Value, condition: Value) -> Value:
    chosen = condition.bits != 0
    same = a.known & b.known & (a.bits == b.bits)
    return Value(np.where(chosen, a.bits, b.bits), np.where(condition.known, np.where(chosen, a.known, b.known), same))


def _logic(operation: str, values: list[Value]) -> Value:
    """Of predicates, where one alone may decide."""
    a, *others = (Value((value.bits != 0).astype(np.uint64), value.known) for value in values)
    if operation == "mov":
        return a
    if operation == "not":
        return _not(a)
    (b,) = others
    known = a.known & b.known
    if operation in ("and", "or"):
        decides = np.uint64(operation == "or")
        known |= (a.known & (a.bits == decides)) | (b.known & (b.bits == decides))
        # An unknown operand must not decide: give it the neutral value.
        x, y = (np.where(v.known, v.bits, np.uint64(1) - decides) for v in (a, b))
        return Value(x & y if operation == "and" else x | y, known)
    return Value(a.bits ^ b.bits if operation == "xor" else a.bits, known if operation == "xor" else known & False)

"""Which of the shipped tiles every run of the tests compiles: one in six, but of each kind at least one.

A kind is a word of a case's name (hidden size, dtype, form, rows, warps, options) or a target, beside the kernel; and
of every kernel on every target the tile with the most registers by the record, which is the first one to spill. All
tiles take six minutes of two cores under each Triton: `--check --all`, `pytest -m slow`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def kinds_of(case: Any) -> set[tuple[str, str]]:
    """What a case stands for."""
    return {(case.kernel, word) for word in (*case.name.split(), case.target)}


def largest_of(cases: Sequence[Any], recorded: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Any]:
    """Of every kernel on every target the case with the most registers; the first one where none is recorded.

    recorded: figures by target and case, of any version of Triton.
    """
    largest: dict[tuple[str, str], tuple[int, Any]] = {}
    for case in cases:
        registers = recorded.get(case.target, {}).get(case.name, {}).get("registers", 0)
        most, _ = largest.get((case.kernel, case.target), (-1, None))
        if registers > most:
            largest[case.kernel, case.target] = registers, case
    return [case for _, case in largest.values()]


def sample(cases: Sequence[Any], recorded: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Any]:
    """Some of the cases, in their order: the largest, and every kind once, as evenly over the targets as may be."""
    taken = {id(case): case for case in largest_of(cases, recorded)}
    missing = {kind for case in cases for kind in kinds_of(case)}
    missing -= {kind for case in taken.values() for kind in kinds_of(case)}
    of_target = Counter(case.target for case in taken.values())
    while missing:
        case = max(cases, key=lambda case: (len(kinds_of(case) & missing), -of_target[case.target]))
        taken[id(case)] = case
        of_target[case.target] += 1
        missing -= kinds_of(case)
    return [case for case in cases if id(case) in taken]

"""Which of the shipped tiles every run of the tests compiles: one in six, but of each kind at least one.

A kind is a word of a build's name (hidden size, dtype, form, rows, warps, options) or a target, beside the kernel; and
of every kernel on every target the tile with the most registers by the record, which is the first one to spill. All
tiles take six minutes of two cores under each Triton: `--check --all`, `pytest -m slow`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def kinds_of(build: Any) -> set[tuple[str, str]]:
    """What a build stands for."""
    return {(build.kernel, word) for word in (*build.name.split(), build.target)}


def largest_of(builds: Sequence[Any], recorded: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Any]:
    """Of every kernel on every target the build with the most registers; the first one where none is recorded.

    recorded: figures by target and build, of any version of Triton.
    """
    largest: dict[tuple[str, str], tuple[int, Any]] = {}
    for build in builds:
        registers = recorded.get(build.target, {}).get(build.name, {}).get("registers", 0)
        most, _ = largest.get((build.kernel, build.target), (-1, None))
        if registers > most:
            largest[build.kernel, build.target] = registers, build
    return [build for _, build in largest.values()]


def sample(builds: Sequence[Any], recorded: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Any]:
    """Some of the builds, in their order: the largest, and every kind once, as evenly over the targets as may be."""
    taken = {id(build): build for build in largest_of(builds, recorded)}
    missing = {kind for build in builds for kind in kinds_of(build)}
    missing -= {kind for build in taken.values() for kind in kinds_of(build)}
    of_target = Counter(build.target for build in taken.values())
    while missing:
        build = max(builds, key=lambda build: (len(kinds_of(build) & missing), -of_target[build.target]))
        taken[id(build)] = build
        of_target[build.target] += 1
        missing -= kinds_of(build)
    return [build for build in builds if id(build) in taken]

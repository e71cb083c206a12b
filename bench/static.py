"""Static figures of the Triton kernels, compiled for GPUs that need not be there.

    python bench/static.py            compile every shipped tile for every target, print the table
    python bench/static.py --write    and record it in bench/results/static.json, under this Triton's version;
                                      with --only these tiles and no others
    python bench/static.py --check    and fail where one is worse than the record: a sixth of all (static_sample.py)
    python bench/static.py --check --all    every tile; so does --only

Needs Triton and numpy alone (torch is not imported). Recorded for each tile: registers a thread, stack in bytes
(anything but 0 is a spill), shared memory in bytes, the matrix instructions, and inside the time loop, per warp and
step: instructions, barriers, shared loads and stores, matrix instructions and FMAs. The time loop is the longest span
of code that a branch at its end goes back over. On NVIDIA also, per program and step: wavefronts of shared memory and
how many of them are bank conflicts (wavefronts.py); static_conflicts.py says why those that there are may stay.
"""

import argparse
import importlib
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import triton
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "static.json"
# How much worse than the record a figure may be before --check fails: (ratio, absolute).
TOLERANCE = {
    "registers": (1.1, 8),
    "stack": (1.0, 0),
    "shared": (1.0, 0),
    "instructions": (1.05, 4),
    "barriers": (1.0, 0),
    "conflicts": (1.0, 0),
    "conflicts_once": (1.0, 0),
    "unknown_accesses": (1.0, 0),
}

if str(ROOT) not in sys.path:  # this checkout's, also where charrnn_fast and so torch are missing
    sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from charrnn_fast.bench import static_builds, static_conflicts, static_figures, static_sample
    from charrnn_fast.bench.static_builds import TARGETS, Build, Types
else:
    from bench import static_builds, static_conflicts, static_figures, static_sample
    from bench.static_builds import TARGETS, Build, Types


def records() -> dict[str, dict[str, dict[str, dict]]]:
    """Everything that is recorded: figures by version of Triton, target and build."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def recorded(version: str, target: str) -> dict[str, dict]:
    """The recorded figures of a target under a version of Triton, by build; empty if there are none."""
    return records().get(version, {}).get(target, {})


def signature_of(build: Build) -> Types:
    """The types of a kernel's arguments by name; "constexpr" for those that are compiled in."""
    return {
        name: build.types.get(name, "constexpr" if name in build.constants or name.endswith("_ptr") else "i32")
        for name in build.function.arg_names
    }


def positions(build: Build) -> dict[int, int]:
    """A build's values by their position among the arguments of the compiled kernel."""
    names: list[str] = []
    for name, kind in signature_of(build).items():
        names += [name] * (0 if kind == "constexpr" else len(kind) if isinstance(kind, tuple) else 1)
    return {names.index(name): value for name, value in build.values.items()}


def compiled(build: Build):
    signature = signature_of(build)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(len(kind))}
            continue
        divisible = build.divisible and name.startswith("stride_") and "tokens" not in name
        if kind.startswith("*") or (divisible and kind == "i32"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: build.constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    source = source_class(build.function)(build.function, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[build.target].gpu, options=build.options)


def source_class(kernel) -> type:
    """How triton.compile takes a kernel: of Triton's own language or of Gluon."""
    if getattr(kernel, "is_gluon", bool)():
        return importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    return ASTSource


PER_STEP = ["instructions", "barriers", "shared_loads", "shared_stores", "matrix_instructions", "fma"]
PER_STEP += ["wavefronts", "conflicts"]


def figures(build: Build) -> dict:
    """Compile and measure it."""
    found = static_figures.of_compiled(compiled(build), positions(build))
    if build.team:
        tiles, warps = static_builds.load("elman_grid_tiles"), build.options["num_warps"]
        at_once = tiles.programs_at_once(found["registers"], found["shared"], warps, tiles.CHIPS[build.target])
        found |= {"team": build.team, "at_once": at_once}
    if build.steps > 1:
        found |= {name: round(found[name] / build.steps, 2) for name in PER_STEP if name in found}
    return found


def faults(build: Build, found: dict) -> list[str]:
    """What no shipped tile may have, whatever the record says."""
    problems = []
    if found["stack"]:
        problems.append(f"spills: {found['stack']} bytes of stack")
    if found["shared"] > build.shared:
        problems.append(f"shared memory {found['shared']} is more than {build.shared}")
    if build.matrix not in (None, bool(found["matrix"])):
        problems.append(f"matrix instructions: meant {build.matrix}, found {found['matrix']}")
    return problems + static_conflicts.faults(build.name, found)


def is_worse(name: str, found: dict, recorded: dict) -> bool:
    """Whether a figure is worse than the recorded one by more than TOLERANCE."""
    ratio, slack = TOLERANCE[name]
    return found.get(name, 0) > max(recorded.get(name, 0) * ratio, recorded.get(name, 0) + slack)


def regressions(found: dict, recorded: dict | None) -> list[str]:
    """Where the figures are worse than the recorded ones by more than TOLERANCE."""
    if recorded is None:
        return ["not in the record; run bench/static.py --write"]
    if "wavefronts" not in recorded:  # from before they were counted
        found = {name: value for name, value in found.items() if name in recorded}
    problems = [
        f"{name} {found[name]}, recorded {recorded.get(name, 0)}"
        for name in TOLERANCE
        if is_worse(name, found, recorded)
    ]
    if found["matrix"] != recorded["matrix"]:
        problems.append(f"matrix instructions {found['matrix']}, recorded {recorded['matrix']}")
    return problems


def report(target: str, results: dict[str, dict]) -> None:
    columns = ["registers", "stack", "shared", "instructions", "barriers", "shared_loads", "shared_stores", "fma"]
    columns += ["wavefronts", "conflicts"]
    print(f"\n{target}, Triton {triton.__version__}: loop figures are per warp and time step, wavefronts per program")
    heads = ("regs", "stack", "shared", "instr", "barr", "lds", "sts", "fma", "wavefr", "confl")
    print(f"{'tile':72}" + "".join(f"{head:>8}" for head in heads) + "  matrix")
    for name, found in results.items():
        matrix = " ".join(f"{kind} x{found['matrix_instructions']}" for kind in found["matrix"])
        print(f"{name:72}" + "".join(f"{found.get(column, '-')!s:>8}" for column in columns) + f"  {matrix}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="record the figures under this Triton's version")
    parser.add_argument("--check", action="store_true", help="fail where a figure is worse than the record")
    parser.add_argument("--all", action="store_true", help="with --check: every tile and not a sample of them")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (repeatable)")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="tiles with this regular expression in their names"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")

    record = records()
    ours = record.setdefault(triton.__version__, {})
    builds = {target: static_builds.all_builds(target) for target in TARGETS}
    chosen = [build for of in builds.values() for build in of if re.search(options.only, build.name)]
    if options.check and not options.all and not options.only:
        chosen = static_sample.sample(chosen, ours)
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        pending = {
            target: [(build, pool.submit(figures, build)) for build in chosen if build.target == target]
            for target in options.target or TARGETS
        }
        for target, of in pending.items():
            results = {build.name: future.result() for build, future in of}
            report(target, results)
            for build, _ in of:
                problems = faults(build, results[build.name])
                if options.check:
                    problems += regressions(results[build.name], ours.get(target, {}).get(build.name))
                for problem in problems:
                    print(f"FAILED {target}: {build.name}: {problem}")
                failed += bool(problems)
            known = ours.get(target, {}) | results if options.only else results
            ours[target] = {build.name: known[build.name] for build in builds[target] if build.name in known}
    if options.write and not failed:
        text = json.dumps(dict(sorted(record.items())), indent=1)
        one_line = re.compile(r"\{\s+(\"registers\"[^}]*?)\s+\}")  # a build
        RECORD.write_text(one_line.sub(lambda tile: "{" + " ".join(tile[1].split()) + "}", text) + "\n")
        print(f"\nwritten to {RECORD.relative_to(ROOT)}")
    print(f"\n{sum(map(len, pending.values()))} tiles compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

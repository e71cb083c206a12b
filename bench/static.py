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
    from charrnn_fast.bench import static_cases, static_figures, static_sample
    from charrnn_fast.bench.static_cases import TARGETS, Case, all_cases, load
else:
    from bench import static_cases, static_figures, static_sample
    from bench.static_cases import TARGETS, Case, all_cases, load
elman_cases, elman_grid_cases, case_name, clip_cases, generate_cases = (
    static_cases.elman_cases,
    static_cases.elman_grid_cases,
    static_cases.case_name,
    static_cases.clip_cases,
    static_cases.generate_cases,
)
longest_loop, nvidia_figures, of_compiled = (
    static_figures.longest_loop,
    static_figures.nvidia_figures,
    static_figures.of_compiled,
)


def recorded(version: str, target: str) -> dict[str, dict]:
    """The recorded figures of a target under a version of Triton, by case; empty if there are none."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record.get(version, {}).get(target, {})


def signature_of(case: Case) -> dict[str, str | tuple[str, ...]]:
    """The types of a kernel's arguments by name; "constexpr" for those that are compiled in."""
    kernel = getattr(load(case.module), case.kernel)
    return {
        name: case.types.get(name, "constexpr" if name in case.constants or name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }


def positions(case: Case) -> dict[int, int]:
    """A case's values by their position among the arguments of the compiled kernel."""
    names: list[str] = []
    for name, kind in signature_of(case).items():
        names += [name] * (0 if kind == "constexpr" else len(kind) if isinstance(kind, tuple) else 1)
    return {names.index(name): value for name, value in case.values}


def compile_case(case: Case):
    kernel, signature = getattr(load(case.module), case.kernel), signature_of(case)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(len(kind))}
            continue
        divisible = case.divisible and name.startswith("stride_") and "tokens" not in name
        if kind.startswith("*") or (divisible and kind == "i32"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: case.constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    source = source_class(kernel)(kernel, signature, constants, attributes)
    target, _ = TARGETS[case.target]
    return triton.compile(source, target=target, options=case.options)


def source_class(kernel) -> type:
    """How triton.compile takes a kernel: of Triton's own language or of Gluon."""
    if getattr(kernel, "is_gluon", bool)():
        return importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    return ASTSource


PER_STEP = (
    "instructions",
    "barriers",
    "shared_loads",
    "shared_stores",
    "matrix_instructions",
    "fma",
    "wavefronts",
    "conflicts",
)


def figures(case: Case) -> dict:
    """Compile one case and measure it."""
    found = of_compiled(compile_case(case), positions(case))
    if case.team:
        tiles, warps = load("elman_grid_tiles"), case.options["num_warps"]
        at_once = tiles.programs_at_once(found["registers"], found["shared"], warps, tiles.CHIPS[case.target])
        found |= {"team": case.team, "at_once": at_once}
    if case.steps > 1:
        found |= {name: round(found[name] / case.steps, 2) for name in PER_STEP if name in found}
    return found


def faults(case: Case, found: dict) -> list[str]:
    """What no shipped tile may have, whatever the record says."""
    problems = []
    if found["stack"]:
        problems.append(f"spills: {found['stack']} bytes of stack")
    if found["shared"] > case.shared:
        problems.append(f"shared memory {found['shared']} is more than {case.shared}")
    if case.matrix not in (None, bool(found["matrix"])):
        problems.append(f"matrix instructions: meant {case.matrix}, found {found['matrix']}")
    return problems + load("static_conflicts", "bench").faults(case.name, found)


def regressions(found: dict, recorded: dict | None) -> list[str]:
    """Where the figures are worse than the recorded ones by more than TOLERANCE."""
    if recorded is None:
        return ["not in the record; run bench/static.py --write"]
    if "wavefronts" not in recorded:  # from before they were counted
        found = {name: value for name, value in found.items() if name in recorded}
    problems = [
        f"{name} {found[name]}, recorded {recorded.get(name, 0)}"
        for name, (ratio, slack) in TOLERANCE.items()
        if found.get(name, 0) > max(recorded.get(name, 0) * ratio, recorded.get(name, 0) + slack)
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

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    ours = record.setdefault(triton.__version__, {})
    cases = {target: all_cases(target) for target in TARGETS}
    if options.only:
        cases = {target: [case for case in of if re.search(options.only, case.name)] for target, of in cases.items()}
    elif options.check and not options.all:
        few = static_sample.sample([case for of in cases.values() for case in of], ours)
        cases = {target: [case for case in few if case.target == target] for target in TARGETS}
    cases = {target: cases[target] for target in options.target or TARGETS}
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        pending = {target: [pool.submit(figures, case) for case in cases[target]] for target in cases}
        for target, futures in pending.items():
            results = {case.name: future.result() for case, future in zip(cases[target], futures, strict=True)}
            report(target, results)
            for case in cases[target]:
                problems = faults(case, results[case.name])
                if options.check:
                    problems += regressions(results[case.name], ours.get(target, {}).get(case.name))
                for problem in problems:
                    print(f"FAILED {target}: {case.name}: {problem}")
                failed += bool(problems)
            known = ours.get(target, {}) | results if options.only else results
            ours[target] = {case.name: known[case.name] for case in all_cases(target) if case.name in known}
    if options.write and not failed:
        record = {version: record[version] for version in sorted(record)}
        text = json.dumps(record, indent=1)
        one_line_each = re.sub(
            r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda tile: "{" + " ".join(tile[1].split()) + "}", text
        )
        RECORD.write_text(one_line_each + "\n")
        print(f"\nwritten to {RECORD.relative_to(ROOT)}")
    print(f"\n{sum(map(len, cases.values()))} tiles compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

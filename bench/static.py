"""Static figures of the Triton kernels, compiled for GPUs that need not be there.

    python bench/static.py            compile every shipped tile for every target, print the table
    python bench/static.py --write    and record it in bench/results/static.json, under this Triton's version
    python bench/static.py --check    and fail where a figure is worse than the record

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
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "static.json"
# Target and the shared memory one program can have on it, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
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
POINTER = {"fp64": "*fp64", "ieee": "*fp32", "tf32x3": "*fp32", "tf32": "*fp32", "16bit": "*bf16"}


def load(module: str, folder: str = "kernels.triton"):
    """A module of the kernels folder, imported from this checkout without charrnn_fast (and so without torch)."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"{folder}.{module}")


_figures = load("static_figures", "bench")
longest_loop, nvidia_figures, of_compiled = _figures.longest_loop, _figures.nvidia_figures, _figures.of_compiled


@dataclass(frozen=True)
class Case:
    """One kernel with one tile and one set of options, for one target."""

    name: str
    target: str
    module: str
    kernel: str
    types: dict[str, str | tuple[str, ...]]  # types of the pointers that are there (the others are None) and of scalars
    constants: dict[str, object]
    divisible: bool  # strides are multiples of 16, as they are where H is
    options: dict[str, object]
    matrix: bool | None  # whether a matrix instruction is meant; None: either will do
    shared: int  # bytes of shared memory that it may have
    values: tuple[tuple[str, int], ...] = ()  # arguments on which the accesses that are counted depend


def elman_cases(target: str) -> list[Case]:
    """Every tile of the Elman table as the kernel with every option that adds work, and on sm_90 as the plain one too.

    "full" has packed input, tokens of the largest V, h0, grad_h_n and an H that does not fill the tile. "plain" has
    an H that does, and no such options but token input with V = 28 (recipe d2l): forward up to H = 32, and in the
    backward kernel that sums.
    """
    tiles = load("elman_tiles")
    return [
        elman_case(step, kind, width, tile, full, target)
        for step, table in (("forward", tiles.TILES), ("backward", tiles.TILES), ("backward_sums", tiles.SUM_TILES))
        for (kind, width), entries in table.items()
        for tile in entries
        if target in tile.targets
        for full in ((False, True) if target == "sm_90" else (True,))
    ]


def case_name(operation: str, step: str, kind: str, width: int, tile, full: bool) -> str:
    """What the record calls a tile's case."""
    options = "full" if full else "plain"
    return f"{operation} {step} {kind} H{width} rows{tile.block_b} {tile.side} warps{tile.warps} {options}"


def recorded(version: str, target: str) -> dict[str, dict]:
    """The recorded figures of a target under a version of Triton, by case; empty if there are none."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record.get(version, {}).get(target, {})


def elman_case(step: str, kind: str, width: int, tile, full: bool, target: str) -> Case:
    value = POINTER[kind]
    types = {name: value for name in ("weight_ptr", "weight_reverse_ptr", "out_ptr")}
    if full:
        types |= {"h0_ptr": value, "steps_ptr": "*i64", "grad_h_n_ptr": value}
    constants = {
        "H": width - 1 if full else width,
        "BLOCK_B": tile.block_b,
        "BLOCK_H": width,
        "W_LEFT": tile.w_left,
        "TANH": True,
        "HAS_H0": full,
        "PACKED": full,
        "PRECISION": kind if value == "*fp32" else "ieee",
        "WIDE": False,
    }
    tokens = full or width <= 32
    if step == "forward":
        kernel = "elman_forward_kernel"
        types |= {"x_ptr": value, "h_n_ptr": value}
        constants |= {"TOKENS": tokens}
    else:
        kernel = "elman_backward_kernel"
        sums = step == "backward_sums"
        tokens = sums
        accumulator = "*fp64" if kind == "fp64" else "*fp32"
        types |= {"grad_out_ptr": value, "grad_h0_ptr": value}
        types |= (
            {"partial_weight_ptr": accumulator, "partial_table_ptr": accumulator}
            if sums
            else {"grad_x_ptr": value, "h_prev_ptr": value}
        )
        constants |= {
            "BLOCK_V": load("elman_tiles").MAX_SUM_VOCAB if full and sums else 32,
            "HAS_GRAD_OUT": True,
            "HAS_GRAD_H_N": full,
            "GRAD_X": not sums,
            "SAVE_H_PREV": not sums,
            "GRAD_WEIGHT": sums,
            "GRAD_TABLE": sums,
        }
    if tokens:
        types |= {"tokens_ptr": "*i64"}
    name = case_name("elman", step, kind, width, tile, full)
    matrix = kind != "ieee" or target == "gfx942"
    if (kind, target) == ("fp64", "sm_100"):
        matrix = None  # DMMA from Triton 3.9 on, FMA before
    options = tile.launch_options(target)
    shared = min(TARGETS[target][1], tile.shared_kb * 1024)
    return Case(name, target, "elman_kernels", kernel, types, constants, not full, options, matrix, shared)


def linear_cross_entropy_cases(target: str) -> list[Case]:
    """Every tile of the linear cross-entropy table, with the options that add the most work.

    That is a bias, the mean, an H that does not fill the tiles, and in the kernel that owns classes all of them, so
    that it has all three gradients to make.
    """
    tiles = load("linear_cross_entropy_tiles")
    return [
        linear_cross_entropy_case(step, kind, tile, target)
        for (step, kind), entries in tiles.TILES.items()
        for tile in entries
        if target in tile.targets
    ]


def linear_cross_entropy_case(step: str, kind: str, tile, target: str) -> Case:
    value, accumulator = POINTER[kind], "*fp64" if kind == "fp64" else "*fp32"
    streams = step in ("loss", "logits") and tile.max_h > tile.block_h
    V = 1000 if tile.max_v > tile.block_v and step != "classes" else tile.block_v - 4
    types = {name: value for name in ("hidden_ptr", "weight_ptr", "bias_ptr")} | {"target_ptr": "*i64"}
    constants = {
        "H": tile.multiple * (999 // tile.multiple) if streams else tile.block_h - (tile.multiple == 1),
        "V": V,
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_H": tile.block_h,
        "HAS_BIAS": True,
        "PRECISION": kind if value == "*fp32" else "ieee",
    }
    if step == "loss":
        module, kernel = "linear_cross_entropy_kernels", "loss_kernel"
        types |= {"lse_ptr": accumulator, "totals_ptr": accumulator}
        constants |= {"SPLIT": False, "LOSS_ROWS": False}
    else:
        module = "linear_cross_entropy_grad_kernels"
        types |= {"lse_ptr": accumulator, "count_ptr": accumulator, "grad_loss_ptr": value}
        constants |= {"MEAN": True}
        kernel = {"classes": "grad_by_classes_kernel", "rows": "grad_by_rows_kernel", "logits": "grad_logits_kernel"}[
            step
        ]
        types |= {"grad_logits_ptr" if step == "logits" else "grad_hidden_ptr": value}
        if step == "classes":
            types |= {"grad_weight_ptr": accumulator}
            constants |= {"GRAD_HIDDEN": True, "PARTIAL": True, "HALVES": tile.halves}
        elif step == "rows":
            constants |= {"SPLIT": False}
    width = f"{tile.multiple}*" if streams else tile.block_h
    name = f"{step} {kind} H{width} N{tile.block_n} V{tile.block_v} warps{tile.warps}" + " halves" * tile.halves
    matrix = kind != "ieee" or target == "gfx942"
    if (kind, target) == ("fp64", "sm_100"):
        matrix = None  # DMMA from Triton 3.9 on, FMA before
    elif step == "loss" and not streams:
        matrix = None  # one tile of everything leaves no loop to look into
    elif step in ("loss", "logits") and target in ("sm_100", "gfx942"):
        matrix = None  # code behind the kernel's end that jumps back into it can look like the longest loop
    options = tile.launch_options(target)
    shared = min(TARGETS[target][1], 99 * 1024)
    return Case(name, target, module, kernel, types, constants, tile.multiple > 1, options, matrix, shared)


def sum_cases(target: str) -> list[Case]:
    """The kernels beside those with tiles: sums over the programs of the loss and of the weight's gradient."""
    launchers = load("linear_cross_entropy_tiles")
    partials = {"H": 32, "V": 28, "BLOCK_P": launchers.SUM_PROGRAMS, "BLOCK": launchers.SUM_COLUMNS, "HAS_BIAS": True}
    cases = []
    for module, kernel, warps, constants, types in (
        (
            "linear_cross_entropy_grad_kernels",
            "sum_partials_kernel",
            launchers.SUM_WARPS,
            partials,
            {"partial_ptr": "*fp32", "grad_weight_ptr": "*fp32", "grad_bias_ptr": "*fp32"},
        ),
        (
            "linear_cross_entropy_kernels",
            "loss_of_splits_kernel",
            4,
            {"BLOCK_N": 128, "LOSS_ROWS": True},
            dict.fromkeys(("partial_lse_ptr", "chosen_ptr", "lse_ptr", "loss_ptr", "totals_ptr"), "*fp32")
            | {"target_ptr": "*i64"},
        ),
        (
            "linear_cross_entropy_kernels",
            "total_kernel",
            4,
            {"BLOCK": 1024, "LOSS": True, "MEAN": True},
            dict.fromkeys(("totals_ptr", "loss_ptr", "count_ptr"), "*fp32"),
        ),
    ):
        options = load("targets").launch_options(warps, target, all_registers=False)
        name = kernel.removesuffix("_kernel").replace("_", " ")
        cases.append(Case(name, target, module, kernel, types, constants, False, options, False, 48 * 1024))
    return cases


def clip_cases(target: str) -> list[Case]:
    """The clipping kernels: one launch and two, with pointer arguments and with a table of every dtype."""
    kernels = load("clip_grad_norm_kernels")
    d2l, large = (896, 1024, 32, 32, 896, 28), (14336, 262144, 512, 512, 14336, 28)
    small = (3584, 16384, 128, 128, 3584, 28)
    return [
        clip_case("clip_small_kernel", "d2l step", target, d2l, *kernels.small_tile(sum(d2l)), step=True),
        clip_case("clip_small_kernel", "H128", target, small, *kernels.small_tile(sum(small)), step=False),
        *(
            clip_case(kernel, name, target, numels, kernels.BLOCK, kernels.WARPS, step=kernel == "scale_kernel")
            for kernel in ("norm_kernel", "scale_kernel")
            for name, numels in (("H512", large), ("table", ()))
        ),
    ]


def clip_case(kernel: str, name: str, target: str, numels: tuple[int, ...], block: int, warps: int, step: bool) -> Case:
    kernels = load("clip_grad_norm_kernels")
    kinds = (1,) if numels else tuple(range(len(kernels.KINDS)))
    firsts = [sum(-(-n // block) for n in numels[:i]) for i in range(len(numels))]
    pointers = ("*fp32",) * len(numels)
    types = {"norm_ptr": "*fp32", "partial_ptr": "*fp64", "max_norm_bits": "i64", "lr_bits": "i64"}
    types |= {"grad_ptrs": pointers} if numels else {"table_ptr": "*i64"}
    types |= {"param_ptrs": pointers} if numels and step else {}
    constants = {
        "grad_ptrs": (),
        "param_ptrs": (),
        "NUMELS": numels,
        "FIRSTS": tuple(firsts),
        "KIND_OF": (1,) * len(numels),
        "PRESENT": kinds,
        "BLOCK": block,
        "BLOCK_P": kernels.MAX_PROGRAMS,
        "ALIGNED": True,
        "CLIP": True,
        "STEP": step,
        "DOUBLE": 0 in kinds,
    }
    title = f"clip {kernel.removesuffix('_kernel')} {name}"
    options = load("targets").launch_options(warps, target, all_registers=False)
    case = Case(title, target, "clip_grad_norm_kernels", kernel, types, constants, False, options, False, 48 * 1024)
    return case if kernel == "clip_small_kernel" else replace(case, values=(("chunks", 12),))


def generate_cases(target: str) -> list[Case]:
    """The decoding kernel by H, V and L, with everything that sampling adds, and twice greedy."""
    return [
        *(generate_case(target, *sizes, sampled=False) for sizes in (("fp32", 32, 28, 1), ("fp32", 256, 90, 1))),
        *(
            generate_case(target, *sizes, sampled=True)
            for sizes in (
                ("fp32", 32, 28, 1),
                ("fp32", 16, 64, 1),
                ("fp32", 64, 90, 1),
                ("fp32", 128, 90, 1),
                ("fp32", 256, 90, 1),
                ("fp32", 256, 1024, 1),
                ("fp32", 512, 28, 3),
                ("bf16", 256, 90, 2),
                ("fp64", 32, 28, 1),
                ("fp64", 64, 90, 1),
                ("fp64", 256, 90, 2),
            )
        ),
    ]


def generate_case(target: str, kind: str, H: int, V: int, L: int, sampled: bool) -> Case:
    value, number = f"*{kind}", "*fp64" if kind == "fp64" else "*fp32"
    tile = load("generate_tiles").generate_tile(H, V, L, int(number[3:]) // 8)
    types = {name: value for name in ("rows_ptr", "weight_hh_ptr", "head_ptr", "head_bias_ptr")}
    types |= {"prompt_ptr": "*i64", "ids_ptr": "*i64", "states_ptr": number, "sharpness_bits": "i64"}
    types |= {"weight_ih_ptr": value} if L > 1 else {}
    types |= {"uniforms_ptr": "*fp64", "logits_ptr": number} if sampled else {}
    constants = tile.constants() | {"TANH": True, "STACKED": L > 1, "SAMPLE": sampled, "TOP_K": sampled}
    name = f"generate {kind} H{H} V{V} L{L} warps{tile.warps} {'sampled' if sampled else 'greedy'}"
    options = tile.launch_options(target)
    values = (("P", 1), ("N", 1000), ("V", V), ("L", L))
    case = Case(name, target, "generate_kernels", "generate_kernel", types, constants, False, options, False, 48 * 1024)
    return replace(case, values=values)


def all_cases(target: str) -> list[Case]:
    """Of every kernel that is shipped."""
    makers = (elman_cases, linear_cross_entropy_cases, sum_cases, clip_cases, generate_cases)
    return [case for cases in makers for case in cases(target)]


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
    kernel, signature, attributes = getattr(load(case.module), case.kernel), signature_of(case), {}
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


def figures(case: Case) -> dict:
    """Compile one case and measure it."""
    return of_compiled(compile_case(case), positions(case))


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
    print(f"{'tile':64}" + "".join(f"{head:>8}" for head in heads) + "  matrix")
    for name, found in results.items():
        matrix = " ".join(f"{kind} x{found['matrix_instructions']}" for kind in found["matrix"])
        print(f"{name:64}" + "".join(f"{found.get(column, '-'):>8}" for column in columns) + f"  {matrix}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="record the figures under this Triton's version")
    parser.add_argument("--check", action="store_true", help="fail where a figure is worse than the record")
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
    if options.only and options.write:
        parser.error("--write records all tiles, so there is no --only with it")
    cases = {
        target: [case for case in all_cases(target) if re.search(options.only, case.name)]
        for target in options.target or TARGETS
    }
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
            ours[target] = results
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

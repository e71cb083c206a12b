"""What bench/static.py compiles: every shipped kernel and tile, with options, for each target. Imports Triton alone."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
# Target and the shared memory one program can have on it, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TILES_OF = {"sm_120": "sm_80"}  # consumer Blackwell has Ampere's matrix instructions, and its tiles
POINTER = {"fp64": "*fp64", "fp32": "*fp32", "ieee": "*fp32", "tf32x3": "*fp32", "tf32": "*fp32", "16bit": "*bf16"}


def load(module: str, folder: str = "kernels.triton"):
    """A module of the kernels folder, imported from this checkout without charrnn_fast (and so without torch)."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"{folder}.{module}")


@dataclass(frozen=True)
class Case:
    """One kernel with one tile and one set of options, for one target."""

    name: str
    target: str
    module: str
    kernel: str
    types: Mapping[str, str | tuple[str, ...]]  # of the pointers that are there (the others are None) and of scalars
    constants: Mapping[str, object]
    divisible: bool  # strides are multiples of 16, as they are where H is
    options: Mapping[str, object]
    matrix: bool | None  # whether a matrix instruction is meant; None: either will do
    shared: int  # bytes of shared memory that it may have
    steps: int = 1  # time steps in one round of the loop
    values: tuple[tuple[str, int], ...] = ()  # arguments on which the accesses that are counted depend
    team: int = 0  # programs that wait for each other, and so have to run at once


def elman_cases(target: str) -> list[Case]:
    """Every tile of the Elman table as the kernel with every option that adds work, and on sm_90 as the plain one too.

    "full" has packed input, tokens, h0, grad_h_n and an H that does not fill the width. "plain" has an H that does, and
    no such options but token input forward up to H = 32 (recipe d2l). The forward kernel gets
    projected input or features; the backward kernel sums the gradient of W or leaves it to a product.
    """
    tiles = load("elman_tiles")
    cases = [
        elman_case(step, kind, width, replace(tile, ahead=ahead), full, target)
        for (kind, width), entries in tiles.TILES.items()
        for tile in entries
        if TILES_OF.get(target, target) in tile.targets and tile.shared_kb <= max(99, TARGETS[target][1] // 1024)
        for step, ahead in {
            "forward": tile.ahead,
            "forward_inputs": tile.ahead_inputs,
            "backward": tile.ahead,
            "backward_sums": tile.ahead_sums,
        }.items()
        if ahead
        for full in ((False, True) if target == "sm_90" else (True,))
    ]
    return list({case.name: case for case in cases}.values())  # fp32 and tf32 share tiles


def case_name(step: str, kind: str, width: int, tile, full: bool) -> str:
    """What the record calls a tile's case."""
    options = "full" if full else "plain"
    lanes = f" lanes{tile.lanes_n}x{tile.lanes_k}" if tile.form == "fma" else ""
    return f"elman {step} {POINTER[kind][1:]} H{width} {tile.form} rows{tile.rows}{lanes} warps{tile.warps} {options}"


def elman_case(step: str, kind: str, width: int, tile, full: bool, target: str) -> Case:
    value = POINTER[kind]
    types = {name: value for name in ("weight_ptr", "weight_reverse_ptr", "out_ptr")}
    if full:
        types |= {"h0_ptr": value, "steps_ptr": "*i64", "grad_h_n_ptr": value}
    if step.startswith("forward"):
        kernel = "elman_forward_kernel"
        types |= {name: value for name in ("x_ptr", "h_n_ptr", "bias_ih_ptr", "bias_ih_reverse_ptr")}
        types |= {"bias_hh_ptr": value, "bias_hh_reverse_ptr": value} if full else {}
        if step == "forward_inputs":
            types |= {"weight_ih_ptr": value, "weight_ih_reverse_ptr": value}
        elif full or width <= 32:
            types |= {"tokens_ptr": "*i64"}
    else:
        kernel = "elman_backward_kernel"
        accumulator = "*fp64" if kind == "fp64" else "*fp32"
        types |= {name: value for name in ("grad_out_ptr", "grad_x_ptr", "grad_h0_ptr")}
        types |= {"partial_bias_ptr": accumulator}
        if step == "backward_sums":
            types |= {"partial_weight_ptr": accumulator}
        elif full:
            types |= {"h_prev_ptr": value}
    features = tile.most_inputs - full if step == "forward_inputs" else 0
    constants: dict[str, object] = {
        "F": load("elman_forms").Form.of(tile, width - full, float_of(kind), inputs=features)
    }
    if "tokens_ptr" not in types:
        constants |= {"stride_x_h": 1}
    return Case(
        name=case_name(step, kind, width, tile, full),
        target=target,
        module="elman_kernels",
        kernel=kernel,
        types=types,
        constants=constants,
        divisible=not full,
        options=tile.launch_options(TILES_OF.get(target, target)),
        matrix=tile.form != "fma",
        shared=min(TARGETS[target][1], tile.shared_kb * 1024),
        steps=tile.ahead,
    )


GRID_SIZES = (192, 256, 384, 512, 768, 1024, 1536, 2048)


def elman_grid_cases(target: str) -> list[Case]:
    """The recurrence across the chip, every tile at the largest hidden size that it is for, and one at those between.

    "full", and on sm_90 "plain" too, are as in elman_cases.
    """
    tiles = load("elman_grid_tiles")
    return [
        elman_grid_case(step, kind, hidden, tile, full, target)
        for (kind, width), entries in tiles.GRID_TILES.items()
        for hidden in GRID_SIZES
        if tiles.grid_width(kind, hidden) == width and (kind in ("tf32", "16bit") or hidden == width)
        for tile in (entries if hidden == width else entries[:1])
        if target in tile.targets
        for step in ("forward", "backward")
        for full in ((False, True) if target == "sm_90" else (True,))
    ]


def elman_grid_case(step: str, kind: str, hidden: int, tile, full: bool, target: str) -> Case:
    value, options = POINTER[kind], "full" if full else "plain"
    name = f"elman grid {step} {value[1:]} H{hidden} {tile.form} units{tile.units} rows{tile.rows} warps{tile.warps}"
    types = {name: value for name in ("weight_ptr", "weight_reverse_ptr", "out_ptr")} | {"counters_ptr": "*i32"}
    if full:
        types |= {"h0_ptr": value, "steps_ptr": "*i64"}
    if step == "forward":
        types |= {name: value for name in ("x_ptr", "h_n_ptr", "bias_ih_ptr", "bias_ih_reverse_ptr")}
        if full:
            types |= {"tokens_ptr": "*i64", "bias_hh_ptr": value, "bias_hh_reverse_ptr": value}
    else:
        types |= {name: value for name in ("grad_out_ptr", "grad_x_ptr", "grad_h0_ptr")}
        types |= {"partial_bias_ptr": "*fp64" if kind == "fp64" else "*fp32"}
        if full:
            types |= {"grad_h_n_ptr": value, "h_prev_ptr": value}
    form = load("elman_grid_forms").GridForm.of(tile, hidden - full, float_of(kind))
    sizes = {"T": 64, "B": tile.rows, "D": 1, "V": 28, "reverse": 0, "first_step": 0, "num_steps": 65, "first_team": 0}
    kernel = f"elman_grid_{step}_kernel"
    arguments = getattr(load("elman_grid_kernels"), kernel).arg_names
    return Case(
        name=f"{name} {options}",
        target=target,
        module="elman_grid_kernels",
        kernel=kernel,
        types=types,
        constants={"F": form} | ({} if "tokens_ptr" in types else {"stride_x_h": 1}),
        divisible=not full,
        options=tile.launch_options(target),
        matrix=tile.form != "fma",
        shared=48 * 1024,
        values=tuple((name, size) for name, size in sizes.items() if name in arguments),
        team=tile.programs(hidden),
    )


def elman_sum_cases(target: str) -> list[Case]:
    """The kernels that sum after the backward one: rows by token id (V = 28, H = 32), and partial sums."""
    tiles = load("elman_tiles")
    block_v, block_c = tiles.token_blocks(28, 32)
    blocks = {"BLOCK_N": tiles.TOKEN_ROWS, "BLOCK_V": block_v, "BLOCK_C": block_c}
    cases = []
    for kind, precision in (("tf32x3", "tf32x3"), ("16bit", "ieee"), ("fp64", "ieee")):
        kind, precision = ("fp32", "ieee") if kind == "tf32x3" and target == "gfx942" else (kind, precision)
        types = {"grad_x_ptr": POINTER[kind], "tokens_ptr": "*i64"}
        types |= {"partial_ptr": "*fp64" if kind == "fp64" else "*fp32"}
        options = load("targets").launch_options(tiles.TOKEN_WARPS, TILES_OF.get(target, target))
        constants = blocks | {"PRECISION": precision}
        kernel = ("elman_sums_kernels", "rows_by_token_kernel", types, constants, True, options)
        cases.append(Case(f"token rows {kind}", target, *kernel, None, TARGETS[target][1]))
    types = {f"{role}_{name}_ptr": "*fp32" for role in ("partial", "grad") for name in ("weight", "bias", "table")}
    options = load("targets").launch_options(tiles.PARTIAL_WARPS, TILES_OF.get(target, target))
    constants = {"BLOCK_P": tiles.PARTIAL_SUMS, "BLOCK": tiles.PARTIAL_ELEMENTS}
    kernel = ("elman_sums_kernels", "sum_partials_kernel", types, constants, True, options)
    sizes = (("programs", 256), ("weight_numel", 1024), ("bias_numel", 32), ("table_numel", 896))
    return [*cases, Case("partial sums of the recurrence", target, *kernel, None, TARGETS[target][1], values=sizes)]


def float_of(kind: str) -> triton.language.dtype:
    """The dtype of a kind's tensors, of 16 bits bfloat16."""
    return getattr(triton.language, {"fp64": "float64", "16bit": "bfloat16"}.get(kind, "float32"))


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
    H = tile.multiple * (999 // tile.multiple) if streams else tile.block_h - (tile.multiple == 1)
    precision = kind if value == "*fp32" else "ieee"
    constants: dict[str, object] = {"F": load("linear_cross_entropy_kernels").Form.of(tile, H, V, True, precision)}
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
            constants |= {"GRAD_HIDDEN": True, "PARTIAL": True}
        elif step == "rows":
            constants |= {"SPLIT": False}
    width = f"{tile.multiple}*" if streams else tile.block_h
    name = f"{step} {kind} H{width} N{tile.block_n} V{tile.block_v} warps{tile.warps}" + " halves" * tile.halves
    matrix: bool | None = kind != "ieee" or target == "gfx942"
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


def windows_cases(target: str) -> list[Case]:
    """The gather of a batch, from a corpus of bytes."""
    kernel = load("windows_kernels")
    constants = {"BLOCK_T": kernel.BLOCK_T, "BLOCK_B": kernel.BLOCK_B}
    types: dict[str, str | tuple[str, ...]] = {"corpus_ptr": "*u8", "starts_ptr": "*i64", "window_ptr": "*i64"}
    options = load("targets").launch_options(kernel.WARPS, target)
    of = ("windows_kernels", "windows_kernel", types, constants, False, options, False, 48 * 1024)
    return [Case("windows of bytes", target, *of)]


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


def clip_case(
    kernel: str, name: str, target: str, numels: tuple[int, ...], block: int, warps: int, *, step: bool
) -> Case:
    kernels = load("clip_grad_norm_kernels")
    kinds = (1,) if numels else tuple(range(len(kernels.KINDS)))
    firsts = [sum(-(-n // block) for n in numels[:i]) for i in range(len(numels))]
    pointers = ("*fp32",) * len(numels)
    types: dict[str, str | tuple[str, ...]] = {"norm_ptr": "*fp32", "partial_ptr": "*fp64"}
    types |= {"max_norm_bits": "i64", "lr_bits": "i64"}
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
    constants = {"TANH": True, "STACKED": L > 1, "SAMPLE": sampled, "TOP_K": sampled, "F": tile}
    name = f"generate {kind} H{H} V{V} L{L} warps{tile.warps} {'sampled' if sampled else 'greedy'}"
    options = tile.launch_options(target)
    values = (("P", 1), ("N", 1000), ("V", V), ("L", L))
    case = Case(name, target, "generate_kernels", "generate_kernel", types, constants, False, options, False, 48 * 1024)
    return replace(case, values=values)


def generate_grid_cases(target: str) -> list[Case]:
    """The decoding kernel across the chip by H and V: greedy, and drawing with an H that does not fill the programs."""
    tiles = load("generate_grid_tiles")
    return [
        generate_grid_case(target, kind, hidden, vocab, sampled, 1)
        for hidden in (256, 384, 512, 1024, 2048)
        for kind in ("fp32", "bf16")
        for vocab, sampled in ((28, False), (90, True))
        if target in tiles.NVIDIA
    ] + [
        generate_grid_case(target, kind, hidden, vocab, sampled, layers)
        for kind, hidden, vocab, sampled, layers in (
            ("fp32", 512, 28, False, 2),
            ("fp32", 512, 90, True, 2),
            ("bf16", 512, 90, True, 2),
            ("fp32", 256, 90, True, 4),
            ("fp32", 256, 90, True, 2),
            ("fp32", 768, 90, True, 1),
        )
        if target in tiles.NVIDIA
    ]


def generate_grid_case(target: str, kind: str, hidden: int, vocab: int, sampled: bool, layers: int) -> Case:
    tile = load("generate_grid_tiles").grid_tile(hidden, 4, layers)
    dtype = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16}[kind]
    form = load("generate_grid_kernels").grid_form(
        tile, hidden - sampled, vocab, dtype, sample=sampled, top_k=sampled, layers=layers
    )
    types: dict[str, str | tuple[str, ...]] = dict.fromkeys(("table_ptr", "weight_ptr", "head_ptr"), f"*{kind}")
    types |= {"head_bias_ptr": f"*{kind}", "states_ptr": "*fp32", "partials_ptr": "*fp32", "counters_ptr": "*i32"}
    types |= {"prompt_ptr": "*i64", "ids_ptr": "*i64", "sharpness_bits": "i64"}
    types |= {"uniforms_ptr": "*fp64"} if sampled else {}
    types |= dict.fromkeys(("weight_ih_ptr", "bias_ptr"), f"*{kind}") if layers > 1 else {}
    of_layers = f" L{layers}" if layers > 1 else ""
    choice = "sampled" if sampled else "greedy"
    values = {"P": 1, "N": 1000, "V": vocab, "top_k": 3, "first_step": 0, "num_steps": 1001, "first_team": 0}
    return Case(
        name=f"generate grid {kind} H{hidden} V{vocab}{of_layers} units{tile.units} warps{tile.warps} {choice}",
        target=target,
        module="generate_grid_kernels",
        kernel="generate_grid_kernel",
        types=types,
        constants={"F": form},
        divisible=False,
        options=tile.launch_options(target),
        matrix=False,
        shared=48 * 1024,
        values=tuple(values.items()),
        team=tile.programs(hidden),
    )


def all_cases(target: str) -> list[Case]:
    """Of every kernel that is shipped."""
    makers: list[Callable[[str], list[Case]]] = [elman_cases, elman_sum_cases]
    makers.append(load("static_language_model", "bench").language_model_cases)
    if target not in TILES_OF:
        makers += [elman_grid_cases, linear_cross_entropy_cases, sum_cases, clip_cases, generate_cases]
        makers += [generate_grid_cases, windows_cases]
    return [case for cases in makers for case in cases(target)]

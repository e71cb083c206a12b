"""What bench/static.py compiles: every shipped kernel and tile, with options, for each target. Imports Triton alone."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import triton.language as tl
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent


class Target(NamedTuple):
    gpu: GPUTarget
    shared: int  # bytes of shared memory that one program can have
    tiles: str  # the target whose tiles it takes


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, "sm_80"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, "sm_90"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, "sm_100"),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, "sm_80"),  # it has Ampere's matrix instructions
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, "gfx942"),
}
POINTER = {"fp64": "*fp64", "fp32": "*fp32", "ieee": "*fp32", "tf32x3": "*fp32", "tf32": "*fp32", "16bit": "*bf16"}
DTYPES = {"*fp64": tl.float64, "*fp32": tl.float32, "*bf16": tl.bfloat16}
Types = dict[str, str | tuple[str, ...]]


def load(module: str) -> Any:
    """A module of kernels/triton, imported from this checkout without charrnn_fast (and so without torch)."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"kernels.triton.{module}")


@dataclass(frozen=True)
class Build:
    """One kernel with one tile and one set of options, for one target."""

    name: str
    target: str
    module: str
    kernel: str
    types: Types  # of the pointers that are there (the others are None) and of scalars
    constants: Mapping[str, object]
    tile: Any  # it has the launch_options
    divisible: bool = False  # strides are multiples of 16, as they are where H is
    matrix: bool | None = False  # whether a matrix instruction is meant; None: either will do
    shared: int = 48 * 1024  # bytes of shared memory that it may have
    steps: int = 1  # time steps in one round of the loop
    values: Mapping[str, int] = field(default_factory=dict)  # arguments on which the accesses that are counted depend
    team: int = 0  # programs that wait for each other, and so have to run at once

    @property
    def function(self) -> Any:
        return getattr(load(self.module), self.kernel)

    @property
    def options(self) -> dict[str, object]:
        return self.tile.launch_options(TARGETS[self.target].tiles)


class Warps(NamedTuple):
    """In a tile's place, of a kernel with one size of program."""

    warps: int
    all_registers: bool = True

    def launch_options(self, target: str) -> dict[str, object]:
        return load("targets").launch_options(self.warps, target, all_registers=self.all_registers)


def pointers(kind: str, names: str) -> Types:
    """The arguments of these names, all of one type."""
    return {f"{name}_ptr": kind for name in names.split()}


def accumulator(kind: str) -> str:
    """What sums are kept in."""
    return "*fp64" if kind == "fp64" else "*fp32"


def elman_builds(target: str) -> list[Build]:
    """Every tile of the Elman table as the kernel with every option that adds work, and on sm_90 as the plain one too.

    "full" has packed input, tokens, h0, grad_h_n and an H that does not fill the width. "plain" has an H that does, and
    no such options but token input forward up to H = 32 (recipe d2l). The forward kernel gets
    projected input or features; the backward kernel sums the gradient of W or leaves it to a product.
    """
    builds = [
        elman_build(step, kind, width, replace(tile, ahead=ahead), full, target)
        for (kind, width), entries in load("elman_tiles").TILES.items()
        for tile in entries
        if TARGETS[target].tiles in tile.targets and tile.shared_kb <= max(99, TARGETS[target].shared // 1024)
        for step, ahead in {
            "forward": tile.ahead,
            "forward_inputs": tile.ahead_inputs,
            "backward": tile.ahead,
            "backward_sums": tile.ahead_sums,
        }.items()
        if ahead
        for full in ((False, True) if target == "sm_90" else (True,))
    ]
    return list({build.name: build for build in builds}.values())  # fp32 and tf32 share tiles


def elman_name(step: str, kind: str, width: int, tile, full: bool) -> str:
    """What the record calls the build of a tile."""
    options = "full" if full else "plain"
    lanes = f" lanes{tile.lanes_n}x{tile.lanes_k}" if tile.form == "fma" else ""
    return f"elman {step} {POINTER[kind][1:]} H{width} {tile.form} rows{tile.rows}{lanes} warps{tile.warps} {options}"


def elman_build(step: str, kind: str, width: int, tile, full: bool, target: str) -> Build:
    inputs = tile.most_inputs - full if step == "forward_inputs" else 0
    form = load("elman_forms").Form.of(tile, width - full, DTYPES[POINTER[kind]], inputs=inputs)
    tokens = step == "forward" and (full or width <= 32)
    return Build(
        elman_name(step, kind, width, tile, full),
        target,
        module="elman_kernels",
        kernel=f"elman_{step.partition('_')[0]}_kernel",
        types=recurrence_types(step, kind, full, tokens),
        constants={"F": form} | ({} if tokens else {"stride_x_h": 1}),
        tile=tile,
        divisible=not full,
        matrix=tile.form != "fma",
        shared=min(TARGETS[target].shared, tile.shared_kb * 1024),
        steps=tile.ahead,
    )


def recurrence_types(step: str, kind: str, full: bool, tokens: bool) -> Types:
    """Of the recurrence's kernels, those of one program and those across the chip."""
    value, sums = POINTER[kind], accumulator(kind)
    types = pointers(value, "weight weight_reverse out")
    types |= pointers(value, "h0") | pointers("*i64", "steps") if full else {}
    types |= pointers("*i64", "tokens") if tokens else {}
    if step.startswith("forward"):
        types |= pointers(value, "x h_n bias_ih bias_ih_reverse")
        types |= pointers(value, "bias_hh bias_hh_reverse") if full else {}
        return types | (pointers(value, "weight_ih weight_ih_reverse") if step == "forward_inputs" else {})
    types |= pointers(value, "grad_out grad_x grad_h0") | pointers(sums, "partial_bias")
    types |= pointers(value, "grad_h_n") if full else {}
    if step == "backward_sums":
        return types | pointers(sums, "partial_weight")
    return types | (pointers(value, "h_prev") if full else {})


GRID_SIZES = (192, 256, 384, 512, 768, 1024, 1536, 2048)


def elman_grid_builds(target: str) -> list[Build]:
    """The recurrence across the chip, every tile at the largest hidden size that it is for, and one at those between.

    "full", and on sm_90 "plain" too, are as in elman_builds.
    """
    tiles = load("elman_grid_tiles")
    return [
        elman_grid_build(step, kind, hidden, tile, full, target)
        for (kind, width), entries in tiles.GRID_TILES.items()
        for hidden in GRID_SIZES
        if tiles.grid_width(kind, hidden) == width and (kind in ("tf32", "16bit") or hidden == width)
        for tile in (entries if hidden == width else entries[:1])
        if target in tile.targets
        for step in ("forward", "backward")
        for full in ((False, True) if target == "sm_90" else (True,))
    ]


def elman_grid_build(step: str, kind: str, hidden: int, tile, full: bool, target: str) -> Build:
    value, options = POINTER[kind], "full" if full else "plain"
    tokens = full and step == "forward"
    form = load("elman_grid_forms").GridForm.of(tile, hidden - full, DTYPES[value])
    sizes = {"T": 64, "B": tile.rows, "D": 1, "V": 28, "reverse": 0, "first_step": 0, "num_steps": 65, "first_team": 0}
    kernel = f"elman_grid_{step}_kernel"
    arguments = getattr(load("elman_grid_kernels"), kernel).arg_names
    sizes_of = f"{tile.form} units{tile.units} rows{tile.rows} warps{tile.warps}"
    return Build(
        f"elman grid {step} {value[1:]} H{hidden} {sizes_of} {options}",
        target,
        module="elman_grid_kernels",
        kernel=kernel,
        types=recurrence_types(step, kind, full, tokens) | pointers("*i32", "counters"),
        constants={"F": form} | ({} if tokens else {"stride_x_h": 1}),
        tile=tile,
        divisible=not full,
        matrix=tile.form != "fma",
        values={name: size for name, size in sizes.items() if name in arguments},
        team=tile.programs(hidden),
    )


def elman_sum_builds(target: str) -> list[Build]:
    """The kernels that sum after the backward one: rows by token id (V = 28, H = 32), and partial sums."""
    tiles = load("elman_tiles")
    more: dict[str, Any] = {"divisible": True, "matrix": None, "shared": TARGETS[target].shared}
    block_v, block_c = tiles.token_blocks(28, 32)
    blocks = {"BLOCK_N": tiles.TOKEN_ROWS, "BLOCK_V": block_v, "BLOCK_C": block_c}
    of, builds = ("elman_sums_kernels", "rows_by_token_kernel"), []
    for kind in ("fp32" if target == "gfx942" else "tf32x3", "16bit", "fp64"):
        types = pointers(POINTER[kind], "grad_x") | pointers("*i64", "tokens") | pointers(accumulator(kind), "partial")
        constants = blocks | {"PRECISION": kind if kind == "tf32x3" else "ieee"}
        builds.append(Build(f"token rows {kind}", target, *of, types, constants, Warps(tiles.TOKEN_WARPS), **more))
    types = pointers("*fp32", "partial_weight partial_bias partial_table grad_weight grad_bias grad_table")
    constants = {"BLOCK_P": tiles.PARTIAL_SUMS, "BLOCK": tiles.PARTIAL_ELEMENTS}
    name, of = "partial sums of the recurrence", ("elman_sums_kernels", "sum_partials_kernel")
    more |= {"values": {"programs": 256, "weight_numel": 1024, "bias_numel": 32, "table_numel": 896}}
    return [*builds, Build(name, target, *of, types, constants, Warps(tiles.PARTIAL_WARPS), **more)]


def linear_cross_entropy_builds(target: str) -> list[Build]:
    """Every tile of the linear cross-entropy table, with the options that add the most work.

    That is a bias, the mean, an H that does not fill the tiles, and in the kernel that owns classes all of them, so
    that it has all three gradients to make.
    """
    return [
        linear_cross_entropy_build(step, kind, tile, target)
        for (step, kind), entries in load("linear_cross_entropy_tiles").TILES.items()
        for tile in entries
        if target in tile.targets
    ]


def linear_cross_entropy_build(step: str, kind: str, tile, target: str) -> Build:
    value, sums = POINTER[kind], accumulator(kind)
    streams = step in ("loss", "logits") and tile.max_h > tile.block_h
    types = pointers(value, "hidden weight bias") | pointers("*i64", "target") | pointers(sums, "lse")
    H = tile.multiple * (999 // tile.multiple) if streams else tile.block_h - (tile.multiple == 1)
    V = 1000 if tile.max_v > tile.block_v and step != "classes" else tile.block_v - 4
    precision = kind if value == "*fp32" else "ieee"
    constants = {"F": load("linear_cross_entropy_kernels").Form.of(tile, H, V, True, precision)}
    if step == "loss":
        kernel = "loss_kernel"
        types |= pointers(sums, "totals")
        constants |= {"SPLIT": False, "LOSS_ROWS": False}
    else:
        kernel = "grad_logits_kernel" if step == "logits" else f"grad_by_{step}_kernel"
        types |= pointers(sums, "count") | pointers(value, "grad_loss")
        types |= pointers(value, "grad_logits" if step == "logits" else "grad_hidden")
        constants |= {"MEAN": True}
        if step == "classes":
            types |= pointers(sums, "grad_weight")
            constants |= {"GRAD_HIDDEN": True, "PARTIAL": True}
        elif step == "rows":
            constants |= {"SPLIT": False}
    width = f"{tile.multiple}*" if streams else tile.block_h
    matrix: bool | None = kind != "ieee" or target == "gfx942"
    if (kind, target) == ("fp64", "sm_100"):
        matrix = None  # DMMA from Triton 3.9 on, FMA before
    elif step == "loss" and not streams:
        matrix = None  # one tile of everything leaves no loop to look into
    elif step in ("loss", "logits") and target in ("sm_100", "gfx942"):
        matrix = None  # code behind the kernel's end that jumps back into it can look like the longest loop
    return Build(
        f"{step} {kind} H{width} N{tile.block_n} V{tile.block_v} warps{tile.warps}" + " halves" * tile.halves,
        target,
        module="linear_cross_entropy_kernels" if step == "loss" else "linear_cross_entropy_grad_kernels",
        kernel=kernel,
        types=types,
        constants=constants,
        tile=tile,
        divisible=tile.multiple > 1,
        matrix=matrix,
        shared=min(TARGETS[target].shared, 99 * 1024),
    )


def sum_builds(target: str) -> list[Build]:
    """The kernels beside those with tiles: sums over the programs of the loss and of the weight's gradient."""
    tiles = load("linear_cross_entropy_tiles")
    partials = {"H": 32, "V": 28, "BLOCK_P": tiles.SUM_PROGRAMS, "BLOCK": tiles.SUM_COLUMNS, "HAS_BIAS": True}
    of_splits = pointers("*fp32", "partial_lse chosen lse loss totals") | pointers("*i64", "target")
    kernels: list[tuple[str, str, Types, dict[str, object], int]] = [
        ("_grad", "sum_partials", pointers("*fp32", "partial grad_weight grad_bias"), partials, tiles.SUM_WARPS),
        ("", "loss_of_splits", of_splits, {"BLOCK_N": 128, "LOSS_ROWS": True}, 4),
        ("", "total", pointers("*fp32", "totals loss count"), {"BLOCK": 1024, "LOSS": True, "MEAN": True}, 4),
    ]
    builds = []
    for part, kernel, types, constants, warps in kernels:
        of = (f"linear_cross_entropy{part}_kernels", f"{kernel}_kernel", types, constants, Warps(warps, False))
        builds.append(Build(kernel.replace("_", " "), target, *of))
    return builds


def windows_builds(target: str) -> list[Build]:
    """The gather of a batch, from a corpus of bytes."""
    kernels = load("windows_kernels")
    types = pointers("*u8", "corpus") | pointers("*i64", "starts window")
    constants, warps = {"BLOCK_T": kernels.BLOCK_T, "BLOCK_B": kernels.BLOCK_B}, Warps(kernels.WARPS)
    return [Build("windows of bytes", target, "windows_kernels", "windows_kernel", types, constants, warps)]


def clip_builds(target: str) -> list[Build]:
    """The clipping kernels: one launch and two, with pointer arguments and with a table of every dtype."""
    kernels = load("clip_grad_norm_kernels")
    d2l, large = (896, 1024, 32, 32, 896, 28), (14336, 262144, 512, 512, 14336, 28)
    small = (3584, 16384, 128, 128, 3584, 28)
    return [
        clip_build("clip_small_kernel", "d2l step", target, d2l, *kernels.small_tile(sum(d2l)), step=True),
        clip_build("clip_small_kernel", "H128", target, small, *kernels.small_tile(sum(small)), step=False),
        *(
            clip_build(kernel, name, target, numels, kernels.BLOCK, kernels.WARPS, step=kernel == "scale_kernel")
            for kernel in ("norm_kernel", "scale_kernel")
            for name, numels in (("H512", large), ("table", ()))
        ),
    ]


def clip_build(
    kernel: str, name: str, target: str, numels: tuple[int, ...], block: int, warps: int, *, step: bool
) -> Build:
    kernels = load("clip_grad_norm_kernels")
    kinds = (1,) if numels else tuple(range(len(kernels.KINDS)))
    lists = ("*fp32",) * len(numels)
    types = pointers("*fp32", "norm") | pointers("*fp64", "partial") | {"max_norm_bits": "i64", "lr_bits": "i64"}
    types |= {"grad_ptrs": lists} if numels else pointers("*i64", "table")
    types |= {"param_ptrs": lists} if numels and step else {}
    constants = {
        "grad_ptrs": (),
        "param_ptrs": (),
        "NUMELS": numels,
        "FIRSTS": tuple(sum(-(-n // block) for n in numels[:i]) for i in range(len(numels))),
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
    values = {} if kernel == "clip_small_kernel" else {"chunks": 12}
    of = ("clip_grad_norm_kernels", kernel, types, constants, Warps(warps, False))
    return Build(title, target, *of, values=values)


GREEDY = {"fp32": ((32, 28, 1), (256, 90, 1))}  # H, V, L
SAMPLED = {
    "fp32": ((32, 28, 1), (16, 64, 1), (64, 90, 1), (128, 90, 1), (256, 90, 1), (256, 1024, 1), (512, 28, 3)),
    "bf16": ((256, 90, 2),),
    "fp64": ((32, 28, 1), (64, 90, 1), (256, 90, 2)),
}


def generate_builds(target: str) -> list[Build]:
    """The decoding kernel by H, V and L, with everything that sampling adds, and twice greedy."""
    return [
        generate_build(target, kind, *sizes, sampled=table is SAMPLED)
        for table in (GREEDY, SAMPLED)
        for kind, of_kind in table.items()
        for sizes in of_kind
    ]


def generate_build(target: str, kind: str, H: int, V: int, L: int, sampled: bool) -> Build:
    value, number = f"*{kind}", accumulator(kind)
    tile = load("generate_tiles").generate_tile(H, V, L, int(number[3:]) // 8)
    types = pointers(value, "rows weight_hh head head_bias") | pointers("*i64", "prompt ids")
    types |= pointers(number, "states") | {"sharpness_bits": "i64"}
    types |= pointers(value, "weight_ih") if L > 1 else {}
    types |= pointers("*fp64", "uniforms") | pointers(number, "logits") if sampled else {}
    return Build(
        f"generate {kind} H{H} V{V} L{L} warps{tile.warps} {'sampled' if sampled else 'greedy'}",
        target,
        module="generate_kernels",
        kernel="generate_kernel",
        types=types,
        constants={"F": tile, "TANH": True, "STACKED": L > 1, "SAMPLE": sampled, "TOP_K": sampled},
        tile=tile,
        values={"P": 1, "N": 1000, "V": V, "L": L},
    )


def generate_grid_builds(target: str) -> list[Build]:
    """The decoding kernel across the chip by H: greedy, and drawing with an H that does not fill the programs."""
    if target not in load("generate_grid_tiles").NVIDIA:
        return []
    sizes = [
        *((kind, H, 1, s) for H in (256, 384, 512, 1024, 2048) for kind in ("fp32", "bf16") for s in (False, True)),
        *(("fp32", 512, 2, False), ("fp32", 512, 2, True), ("bf16", 512, 2, True)),
        *(("fp32", 256, 4, True), ("fp32", 256, 2, True), ("fp32", 768, 1, True)),
    ]
    return [generate_grid_build(target, *size) for size in sizes]


def generate_grid_build(target: str, kind: str, hidden: int, layers: int, sampled: bool) -> Build:
    value, V = f"*{kind}", 90 if sampled else 28
    tile = load("generate_grid_tiles").grid_tile(hidden, 4, layers)
    of = (tile, hidden - sampled, V, DTYPES[value])
    types = pointers(value, "table weight head head_bias") | pointers("*fp32", "states partials")
    types |= pointers("*i32", "counters") | pointers("*i64", "prompt ids") | {"sharpness_bits": "i64"}
    types |= pointers("*fp64", "uniforms") if sampled else {}
    types |= pointers(value, "weight_ih bias") if layers > 1 else {}
    of_layers = f" L{layers}" if layers > 1 else ""
    choice = "sampled" if sampled else "greedy"
    return Build(
        f"generate grid {kind} H{hidden} V{V}{of_layers} units{tile.units} warps{tile.warps} {choice}",
        target,
        module="generate_grid_kernels",
        kernel="generate_grid_kernel",
        types=types,
        constants={"F": load("generate_grid_kernels").grid_form(*of, sample=sampled, top_k=sampled, layers=layers)},
        tile=tile,
        values={"P": 1, "N": 1000, "V": V, "top_k": 3, "first_step": 0, "num_steps": 1001, "first_team": 0},
        team=tile.programs(hidden),
    )


# Of d2l's recipe first; then every tile at the largest sizes that it is for.
LANGUAGE_MODELS = ((32, 28), (32, 32), (32, 97), (64, 28), (64, 64), (64, 128), (128, 28), (128, 32))  # H, V


def language_model_builds(target: str) -> list[Build]:
    """A training step's three kernels: the rows' one by H and V, the others by what an optimizer adds."""
    find_tile = load("language_model_forms").find_tile
    tiles = {sizes: find_tile(*sizes, TARGETS[target].tiles) for sizes in LANGUAGE_MODELS}
    first = LANGUAGE_MODELS[0]
    return [
        *(
            language_model_build(target, *sizes, tile, grads=True)
            for sizes, tile in tiles.items()
            if tile is not None and tile.head_form(*sizes).shared_kb * 1024 <= TARGETS[target].shared
        ),
        language_model_build(target, *first, tiles[first], grads=False),
        language_model_sums_build(target, *first),
        *(language_model_update_build(target, *first, adam=adam) for adam in (False, True)),
    ]


def language_model_build(target: str, H: int, V: int, tile, grads: bool) -> Build:
    types = pointers("*fp32", "weight_ih weight_hh head_weight bias_ih bias_hh head_bias h0 h_n states losses")
    types |= pointers("*fp32", "partial") if grads else {}
    types |= pointers("*u8", "tokens targets") | pointers("*i64", "starts")
    constants = {"GRADS": grads, "F": tile.form(H, V, True), "HEAD": tile.head_form(H, V)}
    return Build(
        f"language model H{H} V{V} warps{tile.warps} {'training' if grads else 'loss'}",
        target,
        module="language_model_kernels",
        kernel="language_model_kernel",
        types=types,
        constants=constants | {"stride_tokens_t": 1, "stride_targets_t": 1},
        tile=tile,
        shared=TARGETS[target].shared,
        values={"T": 8, "B": 4},
    )


def language_model_sums_build(target: str, H: int, V: int) -> Build:
    """With Adam's counts of steps, which it advances."""
    forms = load("language_model_forms")
    grads = "grad_weight_ih grad_weight_hh grad_head_weight grad_bias_ih grad_bias_hh grad_head_bias"
    types = pointers("*fp32", f"{grads} partial losses loss squares upstream")
    types |= pointers("*fp32", "step_0 step_1 step_2 step_3 step_4 step_5")
    constants = {"H": H, "V": V, "TRAINED": 63, "BLOCK_P": forms.SUM_PROGRAMS, "BLOCK": forms.SUM_ELEMENTS}
    of = ("language_model_update_kernels", "language_model_sums_kernel", types, constants, Warps(forms.SUM_WARPS))
    return Build(f"language model sums H{H} V{V}", target, *of, values={"programs": 1024})


def language_model_update_build(target: str, H: int, V: int, adam: bool) -> Build:
    forms = load("language_model_forms")
    roles = ("grad", "param", "first", "second", "step") if adam else ("grad", "param")
    types = pointers("*fp32", " ".join(f"{role}_{i}" for role in roles for i in range(6)) + " squares norm")
    numels = (V * H, H * H, V * H, H, H, V)
    constants = {"NUMELS": numels, "CLIP": True, "ADAM": adam, "BLOCK": forms.UPDATE_ELEMENTS}
    of = ("language_model_update_kernels", "language_model_update_kernel", types, constants, Warps(forms.UPDATE_WARPS))
    return Build(f"language model update H{H} V{V} {'Adam' if adam else 'SGD'}", target, *of, values={"squares": 90})


def all_builds(target: str) -> list[Build]:
    """Of every kernel that is shipped."""
    makers = [elman_builds, elman_sum_builds, language_model_builds]
    if TARGETS[target].tiles == target:
        makers += [elman_grid_builds, linear_cross_entropy_builds, sum_builds, clip_builds, generate_builds]
        makers += [generate_grid_builds, windows_builds]
    return [build for builds in makers for build in builds(target)]

"""Every shipped tile compiled for GPUs that are not here, against the figures in bench/results/static.json."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import triton

from charrnn_fast.bench import static, static_conflicts, static_sample
from charrnn_fast.bench.static_builds import (
    TARGETS,
    all_builds,
    elman_builds,
    elman_grid_builds,
    generate_grid_builds,
    load,
)
from charrnn_fast.bench.static_figures import longest_loop

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "static.py"
RECORD = json.loads((SCRIPT.parent / "results" / "static.json").read_text())


def in_a_process(*arguments: str) -> subprocess.CompletedProcess:
    """Python in a process of its own: this one may have the interpreter in place of the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


needs_record = pytest.mark.skipif(
    triton.__version__ not in RECORD, reason=f"no figures are recorded for Triton {triton.__version__}"
)


# The interpreter does not see what only a compiler refuses (a loop variable that changes type, say), and the recorded
# cases are two of many sets of options.
OPTIONS = textwrap.dedent("""
    import dataclasses
    from charrnn_fast.bench import static, static_builds

    def compile_with(build, types=(), **constants):
        types, constants = build.types | dict(types), build.constants | constants
        static.compiled(dataclasses.replace(build, types=types, constants=constants))

    def without(build, *names):
        types = {name: kind for name, kind in build.types.items() if name not in names}
        return dataclasses.replace(build, types=types)

    def plain(step, kind, width, form):
        begin = f"elman {step} {kind} H{width} {form} "
        builds = (build for build in static_builds.elman_builds("sm_90") if build.name.startswith(begin))
        return next(build for build in builds if build.name.endswith(" plain"))

    for kind, width, form in (("fp32", 32, "fma"), ("bf16", 128, "mma")):
        forward, backward = plain("forward", kind, width, form), plain("backward", kind, width, form)
        wide = {"stride_x_b": "i64", "stride_out_b": "i64", "stride_h0_b": "i64"}
        wide_form = dataclasses.replace(forward.constants["F"], wide=True)
        relu = dataclasses.replace(forward.constants["F"], tanh=False)
        value = forward.types["x_ptr"]
        compile_with(forward, wide, F=wide_form)
        compile_with(forward, F=relu)
        compile_with(forward, stride_x_b=1, stride_out_b=1, stride_out_t=1)
        compile_with(without(forward, "bias_ih_ptr", "bias_ih_reverse_ptr"))
        compile_with(forward, {"tokens_ptr": "*i32"}, stride_x_h=1)
        compile_with(forward, {"tokens_ptr": "*i64", "stride_x_t": "i64"}, F=wide_form)
        compile_with(backward, wide | {"stride_grad_out_b": "i64"}, F=wide_form)
        compile_with(backward, F=relu)
        compile_with(backward, {"grad_h_n_ptr": value})
        compile_with(without(backward, "grad_out_ptr"), {"h_prev_ptr": value})
        compile_with(backward, {"h_prev_ptr": value, "h0_ptr": value})
    sums = plain("backward_sums", "fp32", 32, "fma")
    compile_with(sums, F=dataclasses.replace(sums.constants["F"], tanh=False))
    compile_with(sums, {"h0_ptr": "*fp32", "steps_ptr": "*i64"})
    for build in static_builds.generate_builds("sm_90"):
        if " fp32 H32 " in build.name:
            compile_with(build, TANH=False)
            compile_with(without(build, "logits_ptr"), TOP_K=False)
    for build in static_builds.clip_builds("sm_90"):
        compile_with(build, {"lr_ptr": "*fp64", "norm_ptr": "*bf16"}, ALIGNED=False, CLIP=False)
""")


# The launchers on CPU tensors with a driver that claims to be an H100: all of a launch but the launch itself.
DRIVER = textwrap.dedent("""
    import torch

    from charrnn_fast.bench.gate_tiles import compiling_for_absent

    absent = compiling_for_absent(torch.device("cpu"))
    absent.__enter__()

    def compiled(kernel, times, what):
        (cache, *_), = kernel.device_caches.values()
        assert len(cache) == times, f"{kernel.__name__}: {len(cache)} compilations for {what}"
""")

LAUNCHES = textwrap.dedent("""
    from charrnn_fast.kernels.triton.elman import elman_backward, elman_forward
    from charrnn_fast.kernels.triton.elman_kernels import elman_backward_kernel, elman_forward_kernel

    def launch(T, H, dtype, precision, packed):
        B, D = 9, 2
        options = {"reverse": (False, True), "precision": precision}
        shape = (T, B)
        if packed:
            options["batch_sizes"] = torch.tensor([B] + [3] * (T - 1))
            shape = (B + 3 * (T - 1),)
            options["tokens"] = torch.zeros(shape, dtype=torch.int64)
        x = torch.zeros(28, D * H, dtype=dtype) if packed else torch.zeros(*shape, D * H, dtype=dtype)
        weights = [torch.zeros(H, H, dtype=dtype)] * D
        out, h_n = elman_forward(x, weights, torch.zeros(D, B, H, dtype=dtype), **options)
        if packed:
            options["num_tokens"] = 28
        elman_backward(out, h_n, out, weights, **options)

    for T in (5, 1, 2, 16, 17, 64):
        launch(T, 32, torch.float32, "tf32", False)
    for kernel in (elman_forward_kernel, elman_backward_kernel):
        compiled(kernel, 1, "six lengths")
    launch(5, 33, torch.float32, "ieee", True)
    launch(5, 100, torch.bfloat16, "ieee", False)

    from charrnn_fast.kernels.triton import elman_grid
    from charrnn_fast.kernels.triton.elman_grid_kernels import elman_grid_backward_kernel, elman_grid_forward_kernel

    asked = []
    elman_grid._resident = lambda compiled, *rest: asked.append(compiled.metadata.launch_cooperative_grid) or 132
    for T in (5, 2, 16, 17, 64):
        launch(T, 512, torch.bfloat16, "ieee", False)
    launch(5, 400, torch.float32, "tf32", True)
    assert asked == [True] * 4  # once a kernel: none is asked about again
    for kernel in (elman_grid_forward_kernel, elman_grid_backward_kernel):
        compiled(kernel, 2, "five lengths")

    from charrnn_fast.kernels.triton.clip_grad_norm import clip_and_sgd_step_, clip_grad_norm_
    from charrnn_fast.kernels.triton.clip_grad_norm_kernels import clip_small_kernel
    from charrnn_fast.kernels.triton.generate import generate
    from charrnn_fast.kernels.triton.generate_kernels import generate_kernel

    def tensors(*sizes, dtype=torch.float32):
        return [torch.zeros(size, dtype=dtype) for size in sizes]

    for max_norm, lr in ((1.0, 0.1), (0.0, 1.0), (2.0, 16.0)):
        clip_and_sgd_step_(tensors(900, 1, 16), tensors(900, 1, 16), max_norm, lr)
    compiled(clip_small_kernel, 1, "three thresholds and learning rates")
    for sizes in ((40000, 3), (5,) * 70):
        clip_grad_norm_([*tensors(*sizes), *tensors(7, dtype=torch.bfloat16)], 1.0)
        clip_and_sgd_step_(tensors(*sizes), tensors(*sizes), None, torch.tensor(0.1))

    def decode(H, V, L, P, N, **options):
        square = torch.zeros(H, H)
        layers = [None, *[square] * (L - 1)], [square] * L, [None, *[torch.zeros(H)] * (L - 1)]
        prompt = torch.zeros(1, P, dtype=torch.int64)
        generate(prompt, N, torch.zeros(V, H), *layers, torch.zeros(V, H), torch.zeros(V), **options)

    for P, N in ((1, 1), (16, 1), (5, 1000)):
        decode(32, 28, 1, P, N)
    compiled(generate_kernel, 1, "three lengths")
    decode(200, 90, 2, 3, 4, uniforms=torch.zeros(1, 4), top_k=1, temperature=0.5, nonlinearity="relu")
""")


LOSS_LAUNCHES = textwrap.dedent("""
    from charrnn_fast.kernels.triton.linear_cross_entropy import linear_cross_entropy
    from charrnn_fast.kernels.triton.linear_cross_entropy_grad_kernels import grad_by_classes_kernel
    from charrnn_fast.kernels.triton.linear_cross_entropy_kernels import loss_kernel, total_kernel

    def launch(N, H, V, dtype, precision="ieee", reduction="mean", bias=True, ignore_index=-100):
        hidden, weight = torch.zeros(N, H, dtype=dtype), torch.zeros(V, H, dtype=dtype)
        target = torch.zeros(N, dtype=torch.int64)
        linear_cross_entropy(
            hidden, weight, weight[:, 0] if bias else None, target, ignore_index, reduction, precision=precision
        )

    for N in (1, 2, 16, 17, 31, 1024):
        launch(N, 32, 28, torch.float32, "tf32x3")
    for kernel, times in ((loss_kernel, 1), (total_kernel, 1), (grad_by_classes_kernel, 2)):
        compiled(kernel, times, "six row counts")  # the gradient by one program, and partial sums by several
    launch(1024, 31, 28, torch.float32, "tf32", "none", bias=False)
    launch(3, 60, 3000, torch.bfloat16, ignore_index=2**40)  # classes split over programs
    launch(1024, 60, 3000, torch.float64, reduction="sum")
    launch(40, 300, 28, torch.float16, reduction="none")  # GEMMs
    launch(40, 1, 2, torch.float32)
""")


STEP_LAUNCHES = textwrap.dedent("""
    from charrnn_fast.kernels.triton.language_model import language_model_loss, language_model_step
    from charrnn_fast.kernels.triton.language_model_kernels import language_model_kernel
    from charrnn_fast.kernels.triton.language_model_types import Adam, Moments, Weights, positions, windows
    from charrnn_fast.kernels.triton.language_model_update_kernels import language_model_sums_kernel
    from charrnn_fast.kernels.triton.language_model_update_kernels import language_model_update_kernel

    def zeros(*sizes):
        return Weights(*[None if None in size else torch.zeros(size) for size in sizes])

    H, V = 8, 5
    weights = zeros((H, V), (H, H), (V, H), (H,), (H,), (V,))
    corpus = torch.zeros(4000, dtype=torch.uint8)
    for B, T, lr in ((1, 1, 0.1), (2, 16, 1.0), (33, 5, 1e-3), (1024, 17, 2.0)):
        batch = positions(corpus, torch.zeros(B, dtype=torch.int64), T)
        language_model_step(weights, batch, torch.zeros(B, H), trained=[True] * 6, lr=lr, max_norm=lr)
    for kernel in (language_model_kernel, language_model_sums_kernel, language_model_update_kernel):
        compiled(kernel, 1, "four batches")

    weights = zeros((H, V), (H, H), (V, H), (H,), (None,), (None,))
    ids = torch.zeros(3, 4, dtype=torch.int64)
    state = [None if w is None else Moments(torch.zeros_like(w), torch.zeros_like(w), torch.zeros(())) for w in weights]
    trained, lr = [True, True, False, True, False, False], torch.tensor(0.1)
    adam = Adam(state, 0.9, 0.999, 1e-8)
    language_model_step(weights, windows(ids, ids), trained=trained, lr=lr, adam=adam, nonlinearity="relu")
    language_model_loss(weights, windows(ids, ids))
""")


def check(*arguments: str) -> None:
    result = in_a_process(str(SCRIPT), "--check", *arguments)
    assert result.returncode == 0, result.stderr[-2000:] + "\n".join(
        line for line in result.stdout.splitlines() if "FAILED" in line
    )
    assert "\n0 tiles compiled" not in result.stdout


@needs_record
def test_no_figure_of_a_sample_got_worse():
    check()


@needs_record
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_no_figure_got_worse(target):
    check("--all", "--target", target)


def run_script(script: str, file: Path | None = None) -> None:
    """file: where the script has to lie, if it has kernels, whose source Triton reads."""
    if file is not None:
        file.write_text(script)
    result = in_a_process(*(["-c", script] if file is None else [str(file)]))
    assert result.returncode == 0, result.stderr[-4000:]


def test_other_options_compile():
    run_script(OPTIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests on a GPU launch them")
@pytest.mark.parametrize("launches", [LAUNCHES, LOSS_LAUNCHES, STEP_LAUNCHES], ids=["most", "loss", "training step"])
def test_launchers_compile_what_they_launch_and_once_for_all_lengths(launches):
    run_script(DRIVER + launches)


def test_record_covers_both_ends_of_the_supported_versions():
    assert {"3.6.0", "3.9.0"} <= RECORD.keys()
    for targets in RECORD.values():
        assert targets.keys() == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}


def test_record_holds_every_shipped_tile_and_no_other():
    for targets in RECORD.values():
        for target, tiles in targets.items():
            assert tiles.keys() == {build.name for build in all_builds(target)}


def test_a_sample_has_every_kind_of_tile_and_the_largest_of_each_kernel():
    builds = [build for target in TARGETS for build in all_builds(target)]
    sizes, kinds = ("H192", "H256", "H384", "H512", "H768", "H1024", "H1536", "H2048"), ("fp32", "bf16", "fp64", "mma3")
    for record in RECORD.values():
        taken = static_sample.sample(builds, record)
        assert len(taken) <= len(builds) / 6  # of a run that has to come back
        names = [build.name for build in taken]
        for step in ("forward", "backward"):
            for word in sizes + kinds:
                assert any(name.startswith(f"elman grid {step} ") and f" {word} " in name for name in names), word
        chosen = {(build.target, build.name) for build in taken}
        for kernel, target in {(build.kernel, build.target) for build in builds}:
            of_kernel = [build.name for build in builds if (build.kernel, build.target) == (kernel, target)]
            most = max(record[target][name]["registers"] for name in of_kernel)
            assert any((target, name) in chosen and record[target][name]["registers"] == most for name in of_kernel)


def test_a_step_of_the_recurrence_has_one_barrier_and_no_more_instructions_than_its_prototypes():
    """The prototypes had no masks, biases, packed rows or h0, and 91, 93 and 149 instructions forward (Triton 3.9)."""
    for version, targets in RECORD.items():
        for target, tiles in targets.items():
            for name, found in tiles.items():
                if name.startswith("elman") and not name.startswith("elman grid"):
                    assert found["barriers"] <= 1, (version, target, name)
        forward = "elman forward fp32 H{} fma rows1 lanes{} warps{} plain"
        for width, lanes, warps, most in ((64, "16x2", 4, 103), (128, "16x2", 8, 149)):
            assert targets["sm_90"][forward.format(width, lanes, warps)]["instructions"] <= most


def test_programs_of_a_grid_that_is_chosen_run_at_once():
    """A team that does not fit the chip is compiled all the same, and the table of tiles does not choose it there."""
    tiles, kinds = load("elman_grid_tiles"), {"fp64": "fp64", "bf16": "16bit"}
    for version, targets in RECORD.items():
        for target, chip in tiles.CHIPS.items():
            builds = {build.name: build for build in elman_grid_builds(target)}
            assert {build.team for build in builds.values()} >= {12, 16, 24, 32, 48, 64, 96, 128}
            for name, build in builds.items():
                found, hidden = targets[target][name], build.constants["F"].hidden
                assert found["stack"] == 0, (version, target, name)
                assert found["barriers"] == 2, (version, target, name)
                assert found["team"] == build.team == build.constants["F"].programs
                if found["at_once"] < build.team:
                    kind = next((kind for key, kind in kinds.items() if f" {key} " in name), "tf32")
                    for rows in (1, 16, 128):
                        assert tiles.find_grid_tile(kind, hidden, target, rows, chip.processors, "bf16") is None


def test_programs_of_a_decoder_that_goes_across_the_chip_run_at_once():
    tiles, chips = load("generate_grid_tiles"), load("elman_grid_tiles").CHIPS
    for version, targets in RECORD.items():
        for target, chip in chips.items():
            builds = generate_grid_builds(target)
            assert {build.constants["F"].hidden for build in builds} >= {256, 384, 512, 1024}
            for build in builds:
                found, form = targets[target][build.name], build.constants["F"]
                assert found["stack"] == found["conflicts"] == 0, (version, target, build.name)
                most = (6 if form.sample else 3) + 2 * (form.layers - 1)
                assert found["barriers"] <= most, (version, target, build.name)
                assert found["team"] == build.team == form.programs
                if found["at_once"] < build.team:
                    given = (form.hidden, 28, form.layers, 1, 4, target, chip.processors)
                    assert "do not run at once" in tiles.why_not_grid(*given), (target, build.name)


def test_conflicts_are_recorded_for_every_tile_and_stated_where_they_are_many():
    """The statements cover the record, and none of them is about nothing."""
    used = set()
    for targets in RECORD.values():
        for target, tiles in targets.items():
            for name, figures in tiles.items():
                counted = {"wavefronts", "conflicts", "unknown_accesses"} <= figures.keys()
                assert counted or target == "gfx942" or static_conflicts.statement(name) is not None
                assert static_conflicts.faults(name, figures) == []
                if target != "gfx942" and (static_conflicts.notable(figures) or figures.get("unknown_accesses", 1)):
                    used.add(static_conflicts.statement(name))
    assert used == set(static_conflicts.STATEMENTS)


def test_check_notices_what_is_worse():
    build = next(build for build in elman_builds("sm_90") if " fp32 H128 mma " in build.name)
    good = RECORD["3.9.0"]["sm_90"][build.name]
    assert static.regressions(good, good) == []
    assert static.faults(build, good) == []
    assert static.regressions(good | {"instructions": good["instructions"] * 2}, good)
    assert static.regressions(good | {"barriers": good["barriers"] + 1}, good)
    assert static.regressions(good | {"registers": 255}, good)
    assert static.regressions(good | {"shared": good["shared"] + 1}, good)
    counted = good | {"wavefronts": 100, "conflicts": 3, "wavefronts_once": 0, "conflicts_once": 0}
    assert static.regressions(counted, counted) == []
    assert static.regressions(counted | {"conflicts": 4}, counted)
    assert static.regressions(counted | {"conflicts_once": 1}, counted)
    assert static.regressions(counted | {"unknown_accesses": 1}, counted)
    assert static.regressions(good | {"matrix": []}, good)
    assert static.regressions(good, None)
    assert static.faults(build, good | {"stack": 8})
    assert static.faults(build, good | {"matrix": []})
    assert static.faults(build, good | {"shared": 2**20})
    assert static.faults(build, good | {"unknown_accesses": 1})
    unheard = dataclasses.replace(build, name="a tile that no statement is about")
    assert not static.faults(unheard, counted | {"conflicts": 12})
    assert static.faults(unheard, counted | {"conflicts": 50})
    assert static.faults(unheard, counted | {"wavefronts_once": 100, "conflicts_once": 50})


# What the check is for. The recurrence as it was in its first run on hardware reads W through a dot by FMA, as this one
# does: 22.9 million wavefronts of its 6,400 steps (T=50, B=128) were conflicts, by the GPU's counters. A Gluon kernel
# that keeps W in registers and reads its state back as groups of four has none, and one barrier a step.
SHARED_MEMORY = textwrap.dedent("""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    from charrnn_fast.bench import static, static_figures

    @triton.jit
    def by_dot(w_ptr, out_ptr, T, K: tl.constexpr):
        k = tl.arange(0, K)
        w = tl.load(w_ptr + k[:, None] * K + k[None, :])
        h = tl.zeros((1, K), tl.float32)
        for t in range(T):
            h = tl.dot(h, tl.trans(w), input_precision="ieee")
            tl.store(out_ptr + t * K + k[None, :], h)

    @gluon.jit
    def in_registers(w_ptr, out_ptr, T, K: gl.constexpr, WARPS: gl.constexpr):
        threads: gl.constexpr = [16, 1, 2, 1]
        P: gl.constexpr = gl.BlockedLayout([K // 64, K // 8, 1, 4], threads, [WARPS, 1, 1, 1], [3, 2, 1, 0])
        N: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P)))
        OUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(1, P)))
        n = gl.arange(0, K, layout=N)
        w = gl.load(w_ptr + gl.arange(0, K, layout=N)).expand_dims(1).expand_dims(2).expand_dims(3)
        own = gl.arange(0, K, layout=OUT)
        shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        even = gl.allocate_shared_memory(gl.float32, [K], shared)
        odd = gl.allocate_shared_memory(gl.float32, [K], shared)
        h = gl.zeros([K // 8, 2, 4], gl.float32, layout=gl.SliceLayout(0, P))
        for t in range(0, T, 2):
            new = gl.sum(gl.sum(gl.sum(w * h.expand_dims(0), axis=1), axis=2), axis=1)
            even.store(new)
            gl.store(out_ptr + own, new)
            h = even.reshape([K // 8, 2, 4]).load(gl.SliceLayout(0, P))
            new = gl.sum(gl.sum(gl.sum(w * h.expand_dims(0), axis=1), axis=2), axis=1)
            odd.store(new)
            gl.store(out_ptr + own, new)
            h = odd.reshape([K // 8, 2, 4]).load(gl.SliceLayout(0, P))

    def figures(kernel, warps, **constants):
        signature = {"w_ptr": "*fp32", "out_ptr": "*fp32", "T": "i32"} | dict.fromkeys(constants, "constexpr")
        attributes = {(i,): [["tt.divisibility", 16]] for i in range(2)}
        source = static.source_class(kernel)(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", 90, 32)
        return static_figures.of_compiled(triton.compile(source, target=target, options={"num_warps": warps}))

    old = figures(by_dot, 4, K=128)
    assert old["unknown_accesses"] == 0, old
    assert round(6400 * old["conflicts"] / 1e6, 1) == 22.9, old
    new = figures(in_registers, 4, K=128, WARPS=4)
    assert new["conflicts"] == new["conflicts_once"] == new["unknown_accesses"] == 0, new
    assert new["wavefronts"] > 0 and new["barriers"] == 2, new
""")


def test_conflicts_and_barriers_of_triton_and_gluon_kernels(tmp_path):
    run_script(SHARED_MEMORY, tmp_path / "kernels.py")


def test_longest_loop_is_the_span_of_its_backward_branch():
    listing = ["L0:", "a", "b", "bra L0", "c", "L1:", "d", "e", "f", "bra L1", "bra L2", "L2:", "g"]
    lines = [("label", text[:-1]) if text.endswith(":") else ("instruction", text) for text in listing]

    def branch_target(text):
        return text[4:] if text.startswith("bra ") else None

    assert longest_loop(lines, branch_target) == ["d", "e", "f", "bra L1"]

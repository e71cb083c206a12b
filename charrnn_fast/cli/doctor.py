"""charrnn-fast doctor: what runs on this machine and is right, what does not and why, what could be faster and how."""

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from charrnn_fast import __version__
from charrnn_fast.cli import selftest
from charrnn_fast.cli.options import WIDTH, at_least, find_device
from charrnn_fast.errors import InputError
from charrnn_fast.kernels import native
from charrnn_fast.lm import capture
from charrnn_fast.ops import backends

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = (32, 128, 256, 512, 1024)
BROKEN = 1  # the exit code


def add_parser(commands) -> None:
    p = commands.add_parser(
        "doctor",
        help="what runs here and is right, why the rest does not, what could be faster",
        description="Print versions and devices, which backend runs by hidden size and why the others do not, a test "
        "of every operation of every backend against the reference (some two seconds), and advice. Exit code 1 if "
        "something is broken.",
    )
    p.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: the CPU and every GPU)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the parameters (default: float32)")
    p.add_argument("--hidden-size", type=at_least(1, WIDTH), metavar="H", nargs="+", default=SIZES, help="hidden sizes")
    p.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    print(f"charrnn_fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"torch {torch.__version__}, triton {_version('triton')}, {torch.get_num_threads()} CPU threads")
    print(f"C compiler: {_compiler() or 'none found'}")
    print(f"native kernels: {native.available() or native.isa()}")
    names = [options.device] if options.device else ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    broken, advice = 0, []
    for name in names:
        device, dtype = find_device(name), DTYPES[options.dtype]
        title = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        print(f"\n{name} ({title}), {options.dtype}")
        why_not = capture.why_not_on(device)
        print("  training steps: " + ("captured as CUDA graphs" if why_not is None else f"not captured: {why_not}"))
        sizes, of_one = options.hidden_size, {"operation": "generate", "num_classes": selftest.V}
        _print_choices([(H, {"hidden_size": H}) for H in sizes], dtype, device, "hidden size ")
        _print_choices([(H, {"hidden_size": H, **of_one}) for H in sizes], dtype, device, "generate, hidden size ")
        model = {"hidden_size": selftest.H, "batch_size": selftest.B, "num_classes": selftest.V}
        others = [operation for operation in backends.TABLE if operation not in ("elman", "generate")]
        _print_choices([(name, {"operation": name, **model}) for name in others], dtype, device)
        run, _ = selftest.backends_that_run(device, dtype)
        outcomes = selftest.run(device, dtype, run)
        _print_outcomes(outcomes, dtype)
        wrong = [o for o in outcomes if not o.right(dtype)]
        broken += len(wrong)
        advice += [f"{o.operation} of '{o.backend}' is wrong on {name}: {_around(o.backend, run)}" for o in wrong]
        if not wrong:
            advice += _advice(device, dtype, run)
    print()
    for line in advice or ["nothing to mend"]:
        print(f"advice: {line}")
    return BROKEN if broken else 0


def _print_choices(
    asked: list[tuple[object, dict[str, Any]]], dtype: torch.dtype, device: torch.device, what: str = ""
) -> None:
    """What runs each of the cases asked for, (name, arguments of `explain`): those of one answer in one line."""
    answers: dict[tuple, list[str]] = {}
    for name, question in asked:
        try:
            explanation = backends.explain(dtype=dtype, device=device, **question)
        except (ValueError, RuntimeError) as error:
            raise InputError(str(error)) from None
        answers.setdefault((explanation.backend, explanation.how, *explanation.why_not.items()), []).append(str(name))
    for (backend, how, *others), of in answers.items():
        print(f"  {what}{', '.join(of)}: {backend}" + (f", {how}" if how else ""))
        for other, why in others:
            print(f"    not {other}: {why}")


def _print_outcomes(outcomes: list[selftest.Outcome], dtype: torch.dtype) -> None:
    """A table, one row an operation: the error of each backend."""
    names = list(dict.fromkeys(o.backend for o in outcomes))
    print(f"  {'errors against the reference':30}" + "".join(f"{name:>12}" for name in names))
    for operation in selftest.OPERATIONS:
        row = {o.backend: o for o in outcomes if o.operation == operation}
        cells = ["-" if row[n].error is None and row[n].problem is None else _cell(row[n], dtype) for n in names]
        print(f"    {operation:28}" + "".join(f"{cell:>12}" for cell in cells))
    for o in outcomes:
        if o.problem is not None:
            print(f"    {o.operation} of '{o.backend}' raised {o.problem}")


def _cell(outcome: selftest.Outcome, dtype: torch.dtype) -> str:
    if outcome.problem is not None:
        return "BROKEN"
    return f"{outcome.error:.1e}" if outcome.right(dtype) else f"WRONG {outcome.error:.0e}"


def _around(backend: str, run: list[str]) -> str:
    other = next((name for name in run if name != backend), "torch")
    return f"reinstall, and until then set CHARRNN_BACKEND={other}"


def _advice(device: torch.device, dtype: torch.dtype, run: list[str]) -> list[str]:
    """What is slower than it should be, and what to do about it."""
    lines = []
    if device.type == "cpu":
        if (why := native.available()) is not None:
            action = "reinstall the package" if _compiler() else "install gcc or clang, then reinstall the package"
            lines.append(
                f"the CPU kernels are not there ({why}): {action}; without them training is 2 to 6 times slower"
            )
        elif os.environ.get("CHARRNN_ISA"):
            lines.append(f"CHARRNN_ISA={os.environ['CHARRNN_ISA']} forces one instruction set: unset it")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if torch.get_num_threads() > cores:
            lines.append(f"{torch.get_num_threads()} threads share {cores} cores: set OMP_NUM_THREADS={cores}")
        elif torch.get_num_threads() < cores // 2:
            lines.append(f"{torch.get_num_threads()} of {cores} cores are used: unset OMP_NUM_THREADS, or raise it")
    elif "triton" not in run:
        why = backends.explain(selftest.H, dtype, device).why_not.get("triton", "another was asked for")
        lines.append(f"the GPU kernels do not run on {device}: {why}")
    if os.environ.get("CHARRNN_BACKEND"):
        lines.append(f"CHARRNN_BACKEND={os.environ['CHARRNN_BACKEND']} chooses the backend: unset it for the fastest")
    if len(run) > 1 and run[0] != "torch":
        ours, theirs = (selftest.milliseconds(name, device, dtype) for name in (run[0], "torch"))
        print(f"  forward and backward, T=64, B=32, H=128: {run[0]} {ours:.2f} ms, torch {theirs:.2f} ms")
        if ours > theirs:
            lines.append(f"'{run[0]}' is slower than 'torch' on {device}: other work on the machine? else report it")
    return lines


def _compiler() -> str | None:
    """The C compiler that a build of the CPU kernels would use, or None."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name.split()[0])):
            return path
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""charrnn-fast doctor: what runs on this machine, and for what does not, why."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from charrnn_fast import __version__
from charrnn_fast.cli.options import WIDTH, at_least, find_device
from charrnn_fast.errors import InputError
from charrnn_fast.kernels import native
from charrnn_fast.lm import capture
from charrnn_fast.ops import backends

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = (32, 128, 256, 512, 1024)


def add_parser(commands) -> None:
    p = commands.add_parser(
        "doctor",
        help="which backend runs here, and why the others do not",
        description="Print versions, devices, whether training steps are captured as CUDA graphs and, by hidden size, "
        "which backend runs and why the others do not.",
    )
    p.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: the CPU and every GPU)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the parameters (default: float32)")
    p.add_argument("--hidden-size", type=at_least(1, WIDTH), metavar="H", nargs="+", default=SIZES, help="hidden sizes")
    p.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    print(f"charrnn_fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"torch {torch.__version__}, triton {_version('triton')}, {torch.get_num_threads()} CPU threads")
    print(f"native kernels: {native.available() or native.isa()}")
    names = [options.device] if options.device else ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for name in names:
        device = find_device(name)
        title = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        print(f"\n{name} ({title}), {options.dtype}")
        why_not = capture.why_not_on(device)
        print("  training steps: " + ("captured as CUDA graphs" if why_not is None else f"not captured: {why_not}"))
        for hidden_size in options.hidden_size:
            try:
                explanation = backends.explain(hidden_size, DTYPES[options.dtype], device)
            except (ValueError, RuntimeError) as error:
                raise InputError(str(error)) from None
            print(f"  hidden size {hidden_size}: {explanation.backend}")
            for other, why in explanation.why_not.items():
                print(f"    not {other}: {why}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""charrnn-fast bench: how fast this library is here, beside whatever else is installed."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from charrnn_fast.cli.options import find_device
from charrnn_fast.errors import InputError

PEERS = (
    *("torch.nn.RNN", "reference", "torch.compile", "jax", "onnxruntime", "openvino", "tensorflow"),
    *("flashrnn", "flaggems", "xma"),
)
SECONDS = {False: 90.0, True: 30.0}  # from the first row on, by --quick; the row that is under way is finished


def add_parser(commands) -> None:
    p = commands.add_parser(
        "bench",
        help="how fast this library is on this machine, beside its peers",
        description="Time this library and its peers by turns on this machine: a table, pictures, and one sentence.",
    )
    p.add_argument("--quick", action="store_true", help="fewer sizes, well under a minute")
    p.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    p.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        metavar="P",
        help=f"what to compare with, among {', '.join(PEERS)} (default: all that are installed and build in seconds)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("charrnn-bench"),
        metavar="DIR",
        help="folder for the results and pictures (default: charrnn-bench)",
    )
    instead = p.add_mutually_exclusive_group()
    instead.add_argument("--profile", action="store_true", help="instead: where the time of one training step goes")
    instead.add_argument("--host", action="store_true", help="instead: what a call costs before any kernel works")
    p.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    device = find_device(options.device)
    if options.profile:
        from charrnn_fast.bench import step_profile

        print(step_profile.table(step_profile.profile_step(device)))
        return 0
    if options.host:
        from charrnn_fast.bench import host, host_steps

        print(host.table(host.sides()))
        if host_steps.why_not() is None:
            print()
            print(host_steps.table(host_steps.steps()))
        return 0
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} is a file: expected a folder")
    content = _run_suite(options, device)
    from charrnn_fast.bench import report

    report.write(content, options.out / f"{device.type}.json")
    print(report.text(content))
    print(f"results: {options.out / f'{device.type}.json'}")
    for path in _pictures(content, options.out):
        print(f"picture: {path}")
    print(report.sentence(content))
    return 0


def _run_suite(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every row within the time, behind a progress bar; what a recorded run holds."""
    from charrnn_fast.bench import measure, report, suite

    peers = [p for p in suite.PEERS if (p.key in options.peers if options.peers else not p.takes_minutes)]
    content: dict[str, Any] = {
        "command": " ".join(["charrnn-fast bench", *_arguments(options)]),
        "machine": measure.machine(device),
        "rates": {"fp32": measure.rates(device)},
        "rows": [],
        "sweeps": [],
    }
    print(report.describe(content), flush=True)
    seconds = 0.25 if options.quick else 0.5
    run = suite.Run(content["rates"], device, peers, seconds=seconds, least=3)
    until = time.monotonic() + SECONDS[options.quick]
    # A sweep shows how our own cost grows; one side beside it is enough.
    sweeps = suite.Run(content["rates"], device, peers[:1], seconds=seconds / 2, least=3)
    wanted = (("rows", suite.cases(options.quick), run), ("sweeps", suite.sweep_cases(options.quick), sweeps))
    bar = tqdm(total=sum(len(cases) for _, cases, _ in wanted), unit="row", disable=not sys.stderr.isatty())
    with bar:
        for kind, cases, how in wanted:
            for row in suite.rows(cases, how, until):
                content[kind].append(row)
                bar.update()
    return content


def _arguments(options: argparse.Namespace) -> list[str]:
    """The options that shape a run, as they were given."""
    given = ["--quick"] if options.quick else []
    given += ["--device", options.device] if options.device != "cpu" else []
    return given + (["--peers", *options.peers] if options.peers else [])


def _pictures(content: dict[str, Any], folder: Path) -> list[Path]:
    try:
        from charrnn_fast.bench.plots import draw

        return draw(content, folder)
    except ImportError as error:
        print(f"charrnn-fast: no pictures: {error}; pip install matplotlib", file=sys.stderr)
        return []

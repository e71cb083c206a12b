"""Prints, after pytest-benchmark's own table, the one that matters: ratios measured round by round in this run."""

import shlex
from pathlib import Path

import pytest
import torch

from charrnn_fast.bench import measure, report
from charrnn_fast.bench.grid import DTYPES
from charrnn_fast.bench.measure import CPU
from charrnn_fast.bench.suite import PEERS, Case, Run, row_of

ROWS: list[dict] = []
RATES: dict[str, dict[str, dict[str, float]]] = {}  # by device and dtype


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, metavar="FILE", help="write the results to this JSON file")
    parser.addoption("--seconds", type=float, default=2.0, help="time budget per configuration, all sides together")


@pytest.fixture
def row(benchmark, pytestconfig):
    """Measures a case on a device, our side under pytest-benchmark, and keeps the row for the table."""

    def take(case: Case, device: torch.device = CPU) -> dict:
        known = RATES.setdefault(device.type, {})
        if case.dtype not in known:
            known[case.dtype] = measure.rates(device, DTYPES[case.dtype])

        def drive(before, target, rounds):
            benchmark.pedantic(target, setup=before, rounds=rounds, iterations=1)

        peers = PEERS[:1] if case.sweep else PEERS  # a sweep shows how our own cost grows
        run = Run(known, device, peers, pytestconfig.getoption("--seconds"), drive=drive)
        ROWS.append(row_of(case, run))
        return ROWS[-1]

    return take


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    device = torch.device(next(iter(RATES)))
    content = {
        "command": "python -m pytest " + shlex.join(map(str, config.invocation_params.args)),
        "machine": measure.machine(device),
        "rates": RATES[device.type],
        "rows": [row for row in ROWS if "sweep" not in row],
        "sweeps": [row for row in ROWS if "sweep" in row],
    }
    terminalreporter.section("times charrnn_fast's speed: median (quartiles), above 1 means charrnn_fast is faster")
    terminalreporter.write_line(report.text(content))
    if path := config.getoption("--record"):
        report.write(content, path)
